"""`python -m tests.recorded FOLDER --cache ...`: stage 2, with what each rank drew and the gradients it had, on file.

Under torchrun too. With `TEST_SLOW_MAIN` the main process takes as many seconds over each checkpoint; with
`TEST_SLEEP_AFTER` it sleeps for good once it has written the row of that step.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TENSORS = ("moments", "posterior_noise", "noise", "prompt_embeds")
OF_IMAGES = ("image_moments", "image_posterior_noise", "image_factors")  # where the batch has them


def main(folder: Path, argv: list[str]) -> int:
    """Run stage 2 and write `rank-<r>.jsonl`, a line per place, and `rank-<r>-step-<s>.safetensors`."""
    from accelerate import Accelerator
    from safetensors.torch import save_file

    from train import loop
    from train import step as steps_module
    from train.__main__ import main as train
    from train.metrics import Metrics

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    batch_loss, clip, take_step = steps_module.batch_loss, Accelerator.clip_grad_norm_, loop.take_step
    write, save_checkpoint = Metrics.write, loop.save_checkpoint
    steps: list[int] = []

    def record_draws(model: Any, batch: Any, *rest: Any) -> Any:
        with (folder / f"rank-{rank}.jsonl").open("a", encoding="utf-8") as file:
            for row, place in enumerate(batch.places):
                names = [*TENSORS, *(name for name in OF_IMAGES if getattr(batch, name) is not None)]
                drawn = {
                    name: hashlib.sha256(getattr(batch, name)[row].numpy().tobytes()).hexdigest() for name in names
                }
                told = {"world": world, "step": steps[-1], "place": place, "weight": batch.weights[row].item()}
                file.write(json.dumps({**told, "timestep": batch.timesteps[row].item(), **drawn}) + "\n")
        assert not getattr(model, "find_unused_parameters", False)
        return batch_loss(model, batch, *rest)

    def record_gradients(self: Any, parameters: Any, *rest: Any) -> Any:
        gradients = {str(number): parameter.grad.clone() for number, parameter in enumerate(parameters)}
        save_file(gradients, folder / f"rank-{rank}-step-{steps[-1]}.safetensors")
        return clip(self, parameters, *rest)

    def note_step(run: Any, step: int, *rest: Any, **settings: Any) -> Any:
        steps.append(step)
        return take_step(run, step, *rest, **settings)

    def write_and_sleep(self: Any, row: Any) -> None:
        write(self, row)
        if row["step"] == int(os.environ.get("TEST_SLEEP_AFTER", "0")):
            time.sleep(600)

    def save_slowly(*args: Any) -> Any:
        time.sleep(float(os.environ.get("TEST_SLOW_MAIN", "0")))
        return save_checkpoint(*args)

    folder.mkdir(parents=True, exist_ok=True)
    for owner, name, function in (
        (steps_module, "batch_loss", record_draws),
        (loop, "take_step", note_step),
        (loop, "save_checkpoint", save_slowly),
        (Accelerator, "clip_grad_norm_", record_gradients),
        (Metrics, "write", write_and_sleep),
    ):
        setattr(owner, name, function)
    return train(argv)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
