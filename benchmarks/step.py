"""What a training step costs beside the bare forward, backward, clip and optimizer step on tensors in memory.

`python -m benchmarks.step`: both in one process, in turns of `--log_steps 10`, so that the machine's mood is the same
for both, and the loop's wait for the device at the end of each ten is counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.table import show
from tests import tiny_model
from tests.conftest import moving_square, write_video

if TYPE_CHECKING:
    from train.run import Run

BLOCKS, LOG_STEPS = 50, 10
STEPS = (BLOCKS + 1) * LOG_STEPS
LIMIT = 1.03


def small_run(folder: Path, steps: int) -> Run:
    """A run of a small model on eight clips, ready for its first step; all of it lies in a folder."""
    from accelerate import Accelerator

    from preprocess.config import PreprocessConfig
    from preprocess.pipeline import preprocess
    from train.config import TrainConfig
    from train.setup import open_run

    model = tiny_model.build(folder / "model", heads=4, layers=4)
    (folder / "clips").mkdir()
    for number in range(8):
        write_video(folder / "clips" / f"{number}.mp4", moving_square(number, 17, 128, 192))
        (folder / "clips" / f"{number}.txt").write_text(f"square {number}")
    cache = str(folder / "cache")
    preprocess(
        PreprocessConfig(cache=cache, pretrained_model_name_or_path=str(model), height=128, width=192,
                         dataset_name=str(folder / "clips"), max_num_frames=17)
    )  # fmt: skip
    (folder / "run").mkdir()
    config = TrainConfig(cache=cache, output_dir=str(folder / "run"), rank=16, max_train_steps=steps)
    return open_run(config, Accelerator(mixed_precision="no"))


def main() -> bool:
    """Measure and print; returns whether the ratio is within its limit."""
    import torch

    from shared.lora import trainable
    from train.data import Requests, micro_batches
    from train.metrics import Metrics
    from train.objective import Batch, noisy_input, velocity_loss
    from train.reading import collate
    from train.step import settle, take_step

    with tempfile.TemporaryDirectory() as name:
        run = small_run(Path(name), STEPS)
        requests = Requests(run.samples, run.sampler, run.deal, 0, range(STEPS), run.draws)
        batches = micro_batches(run.reader, requests, num_workers=0, pin_memory=False)
        metrics = Metrics(run.output_dir, 0)

        held = collate([run.reader[request] for request in next(iter(requests))])
        assert isinstance(held, Batch)
        noisy, target = noisy_input(held, run.facts, run.schedule)
        bare_optimizer = torch.optim.AdamW(trainable(run.state.transformer), lr=1e-4)

        def bare() -> None:
            predicted = run.model(
                hidden_states=noisy, encoder_hidden_states=held.prompt_embeds.float(), timestep=held.timesteps,
                return_dict=False,
            )[0]  # fmt: skip
            velocity_loss(predicted, target).mean().backward()
            torch.nn.utils.clip_grad_norm_(trainable(run.state.transformer), 1.0)
            bare_optimizer.step()
            bare_optimizer.zero_grad()

        def whole(block: int) -> None:
            steps = range(block * LOG_STEPS, (block + 1) * LOG_STEPS)
            taken = [take_step(run, step, batches, stopping=False, lora_norm=step == steps[-1]) for step in steps]
            rows, _ = settle(run, taken)
            for row in rows:
                metrics.write(row)

        def bare_block() -> None:
            for _ in range(LOG_STEPS):
                bare()

        whole_seconds: list[float] = []
        bare_seconds: list[float] = []
        for block in range(BLOCKS + 1):
            for seconds, work in ((whole_seconds, lambda block=block: whole(block)), (bare_seconds, bare_block)):
                started = time.perf_counter()
                work()
                seconds.append((time.perf_counter() - started) / LOG_STEPS)
        batches.close()
        metrics.close()
    whole_step, bare_step = (statistics.median(seconds[1:]) for seconds in (whole_seconds, bare_seconds))
    paired = float(np.median(np.array(whole_seconds[1:]) / np.array(bare_seconds[1:])))
    return show(
        f"a training step against the bare one, medians of {BLOCKS} times {LOG_STEPS}, in turns",
        [
            ("bare step", bare_step * 1e3, None, " ms"),
            ("training step (reading, draws, metrics included)", whole_step * 1e3, None, " ms"),
            ("ratio", whole_step / bare_step, LIMIT, ""),
            ("ratio, median of pairs", paired, None, ""),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
