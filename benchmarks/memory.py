"""Device memory of a full-size step, by lever, each beside its limit; counted on tensors without storage.

`python -m benchmarks.memory`. With `--real`: also a real step of the 2B architecture, random weights, every lever, at
a small size, under the same count: about 4 GB of memory, minutes.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.table import show
from tests.full_size import NATIVE, configs_of, transformer_config

GIB = 2**30
INT8: dict[str, Any] = {"base_precision": "int8", "offload_activations": True}
HOST: dict[str, Any] = {"stream_blocks": 2, "offload_activations": True}
EVERY: dict[str, Any] = {"stream_blocks": 1, "offload_activations": True, "ff_chunks": 8, "optimizer_offload": True}
NAMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8, activations on the host": INT8,
    "streamed, activations on the host": HOST,
    "streamed, activations on the host, 8 chunks": {**HOST, "ff_chunks": 8},
    "every lever": EVERY,
}
LIMITS: dict[str, tuple[float | None, ...]] = {  # GiB, in the order of NAMES; None: no limit
    "2b": (8, 6, 2.7, None, 2.0),
    "5b": (18.5, 12, 4.3, None, 3.5),
    "1.5-5b": (None, None, None, 7.5, 6.5),
}
SMALL = "9x64x96"


def main() -> bool:
    """Count and print; returns whether all figures are within their limits."""
    import torch

    from shared.geometry import Bucket
    from train.config import TrainConfig
    from train.forecast import forecast

    within = True
    for kind, limits in LIMITS.items():
        figures: list[tuple[str, float, float | None, str]] = []
        with tempfile.TemporaryDirectory() as folder:
            model = configs_of(Path(folder) / kind, kind)
            for (name, levers), limit in zip(NAMES.items(), limits, strict=True):
                planned = forecast(TrainConfig(**levers), model, Bucket.parse(NATIVE[kind]), torch.bfloat16)
                figures.append(
                    (f"{name} (host {planned.host_bytes / GIB:.1f})", planned.device.total / GIB, limit, " GiB")
                )
        within &= show(f"device memory of a step, {kind} at {NATIVE[kind]}, rank 64, batch 1, bfloat16", figures)
    if "--real" in sys.argv[1:]:
        real_step()
    return within


def real_step() -> None:
    """Take two steps of the 2B architecture with real tensors, and print the peak of the second beside the plan's."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    from shared.geometry import Bucket
    from shared.ledger import Ledger
    from shared.lora import trainable
    from shared.models import Checkpoint
    from train.config import TrainConfig
    from train.forecast import batch_of, forecast
    from train.host import host_category
    from train.lora import make_lora
    from train.memory import prepare
    from train.objective import batch_loss
    from train.optim import gathered, make_optimizer, take_optimizer_step

    cpu, config, bucket = torch.device("cpu"), TrainConfig(**EVERY), Bucket.parse(SMALL)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**transformer_config("2b"))
    torch.nn.Module.to(transformer, torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data.uniform_(-0.02, 0.02, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        model: Checkpoint = configs_of(Path(folder) / "2b", "2b")
        planned = forecast(config, model, bucket, torch.bfloat16)
    with Ledger(host_category) as ledger:
        visit = make_lora(transformer, config, None)
        prepare(transformer.train(), config, cpu)
        parameters = trainable(transformer)
        ledger.label(transformer.parameters(), "weights")
        ledger.label(transformer.buffers(), "weights")
        ledger.label(parameters, "LoRA")
        optimizer = make_optimizer(config, parameters)
        before = [parameter.detach().clone() for parameter in parameters[-2:]]
        batch = batch_of(1, model.facts, bucket)
        names = ("moments", "posterior_noise", "noise", "prompt_embeds")
        draws: dict[str, Any] = {name: torch.randn(getattr(batch, name).shape, generator=generator) for name in names}
        batch = replace(batch, timesteps=torch.tensor([500]), **draws)
        visit.see(0, batch.places)
        for _ in range(2):
            started = time.perf_counter()
            ledger.start_anew()
            with torch.autocast("cpu", torch.bfloat16):
                loss = batch_loss(transformer, batch, model.facts, torch.linspace(0.99, 0.01, 1000), torch.bfloat16)
            loss.sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(gathered(optimizer), 1.0)
            take_optimizer_step(optimizer)
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
        assert torch.isfinite(loss).all()
        assert torch.isfinite(norm)
        assert any(not torch.equal(old, new) for old, new in zip(before, parameters[-2:], strict=True))
        device, host = (ledger.peaks[place].total / GIB for place in ("device", "host"))
    show(
        f"a real step, 2b at {SMALL}, every lever, {seconds:.0f} s, loss {loss.item():.4f}, gradient {norm:.2e}",
        [
            ("device, tracked", device, None, " GiB"),
            ("device, planned", planned.device.total / GIB, None, " GiB"),
            ("host, tracked", host, None, " GiB"),
            ("host, planned", planned.host.total / GIB, None, " GiB"),
            ("process at its peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, None, " GiB"),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
