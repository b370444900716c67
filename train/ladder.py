"""Which levers to add so that a step fits: the first that do, from those that cost least speed to those that cost most.

Each rung holds what the rung before it holds and takes less device memory, and none changes a number of the run: the
first that fits is found by halving, each tried by counting a step with it. Levers that change numbers
(`--base_precision`, `--use_8bit_adam`) are not advised: a run may be told to use them, and is then counted with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shared.errors import ConfigError
from train.config import TrainConfig
from train.forecast import Forecast, check_countable

GIB = 2**30
CONTEXT_BYTES = GIB // 2  # of CUDA, cuBLAS and cuDNN
SHARE = 0.9  # of a card that a step may hold: the rest is for kernels' workspaces and what the allocator cannot use
LADDER: tuple[tuple[str, Any], ...] = (
    ("gradient_checkpointing", True),
    ("offload_activations", True),
    ("ff_chunks", 4),
    ("stream_blocks", 2),
    ("optimizer_offload", True),
    ("stream_blocks", 1),
    ("ff_chunks", 8),
)


def room(device_memory: int) -> int:
    """Bytes that a step may hold on a card of so many."""
    return int(SHARE * device_memory) - CONTEXT_BYTES


def rungs(config: TrainConfig, precision: str, processes: int = 1) -> list[dict[str, Any]]:
    """What to change in a configuration, ever more; each is a configuration that the trainer takes.

    Args:
        precision: `no`, `fp16` or `bf16`.
        processes: of the run.
    """
    found: list[dict[str, Any]] = []
    changes: dict[str, Any] = {}
    for name, value in LADDER:
        now = getattr(config, name)
        if not (now == 0 or now > value if name == "stream_blocks" else now < value):
            continue  # it has that already, or more
        more = {**changes, name: value}
        if config.compile and name != "gradient_checkpointing":
            more["compile"] = False
        try:
            check_countable(replace(config, **more), precision, processes)
        except ConfigError:  # does not go with what was asked for; the next ones may
            continue
        changes = more
        found.append(changes)
    return found


def advise(
    ladder: list[dict[str, Any]], limit: int, count: Callable[[dict[str, Any]], Forecast]
) -> tuple[dict[str, Any], Forecast] | None:
    """The first rung on which a step holds at most `limit` bytes of the device, and that step; None: there is none.

    Args:
        ladder: of `rungs`.
        count: counts a step with these changes.
    """
    best = None
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        counted = count(ladder[middle])
        if counted.device.total <= limit:
            best, high = (ladder[middle], counted), middle
        else:
            low = middle + 1
    return best


def flags_of(changes: dict[str, Any]) -> str:
    """Changes as the command line has them."""
    words = []
    for name, value in changes.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words.append(f"--{name} {value}")
    return " ".join(words)
