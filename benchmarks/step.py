"""What a training step costs beside the bare forward, backward, clip and optimizer step on tensors in memory.

`python -m benchmarks.step`: both in one process, in turns, so that the machine's mood is the same for both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import show
from tests import tiny_model
from tests.conftest import moving_square, write_video

STEPS = 50
LIMIT = 1.05


def main() -> bool:
    """Measure and print; returns whether the ratio is within its limit."""
    import torch
    from accelerate import Accelerator

    from preprocess.config import PreprocessConfig
    from preprocess.pipeline import preprocess
    from shared.lora import trainable
    from train.config import TrainConfig
    from train.data import Requests, collate, micro_batches
    from train.loop import take_step
    from train.metrics import Metrics
    from train.objective import Batch, noisy_input, velocity_loss
    from train.setup import open_run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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
        config = TrainConfig(cache=cache, output_dir=str(folder / "run"), rank=16, max_train_steps=10 * STEPS)
        run = open_run(config, Accelerator(mixed_precision="no"))
        requests = Requests(run.samples, run.sampler, run.deal, 0, range(10 * STEPS), run.draws)
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

        def whole(step: int) -> None:
            row, _ = take_step(run, step, batches, [])
            metrics.write(row)

        whole_seconds: list[float] = []
        bare_seconds: list[float] = []
        for step in range(STEPS + 5):
            for seconds, work in ((whole_seconds, lambda step=step: whole(step)), (bare_seconds, bare)):
                started = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - started)
        batches.close()
        metrics.close()
    ratio = statistics.median(whole_seconds[5:]) / statistics.median(bare_seconds[5:])
    paired = float(np.median(np.array(whole_seconds[5:]) / np.array(bare_seconds[5:])))
    return show(
        f"a training step against the bare one, medians of {STEPS}, in turns",
        [
            ("bare step", statistics.median(bare_seconds[5:]) * 1e3, None, " ms"),
            (
                "training step (reading, draws, metrics included)",
                statistics.median(whole_seconds[5:]) * 1e3,
                None,
                " ms",
            ),
            ("ratio", ratio, LIMIT, ""),
            ("ratio, median of pairs", paired, None, ""),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
