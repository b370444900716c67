"""Several GPUs: the list of videos is dealt to the processes of a launcher, each with a GPU of its own.

    torchrun --nproc_per_node 2 -m infer ...

Each process resolves the same request and takes every WORLD_SIZE-th recipe, from its RANK on. They never talk: no video
depends on another one, so that the videos are those of a single process, and where one process fails the launcher
ends the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from shared.errors import ConfigError

Item = TypeVar("Item")


def world() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a launcher.

    Raises:
        ConfigError: RANK and WORLD_SIZE, which a launcher sets, are not numbers that go together.
    """
    told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in told) or int(told[0]) >= int(told[1]):
        raise ConfigError(
            f"RANK={told[0]} WORLD_SIZE={told[1]}: must be a process's number and how many there are; start it with "
            "torchrun, or unset both"
        )
    return int(told[0]), int(told[1])


def own_share(items: Sequence[Item]) -> list[Item]:
    """Of all items, in order, those of this process."""
    rank, size = world()
    return list(items[rank::size])


def take_own_gpu() -> None:
    """Have this process compute on the GPU of its LOCAL_RANK. Not run where this was written, which had no GPU.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    import torch

    rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(f"LOCAL_RANK={rank}: this machine has {count} GPUs; give --nproc_per_node {count}")
    torch.cuda.set_device(rank)
