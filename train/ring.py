"""Memory that workers fill and the main process reads, slot after slot, for as long as a run lasts.

torch sends each tensor of a worker through shared memory of its own: made, mapped by both sides, page by page, and
thrown away, which for clips of megabytes takes longer than to read them. Here the memory is made once. A worker writes
a micro-batch into the slot that it was told, and sends only where things lie; the main process looks at them in place.

With S slots, micro-batch n lies in slot n mod S. A DataLoader of W workers has at most P * W tasks on their way, and
gives out the next one when it hands over a batch: where H batches at most are held after that, P * W + H slots are
enough that none is written which is still looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.errors import ConfigError

SHARED_MEMORY = "/dev/shm"
ALIGNMENT = 64  # bytes: a cache line


@dataclass(frozen=True)
class Placed:
    """Where an array lies in a slot.

    Attributes:
        offset: from the slot's start, in bytes.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Ring:
    """Slots of shared memory. A spawned worker that is given one sees the same memory.

    Args:
        slots: how many.
        slot_bytes: size of each; see `packed_bytes`.

    Raises:
        ConfigError: the machine's shared memory does not hold them, which would end a worker by a bus error.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        free = _free_bytes()
        if free is not None and slots * slot_bytes > free:
            raise ConfigError(
                f"--dataloader_num_workers: {SHARED_MEMORY} has {free / 2**20:.0f} MiB free; must have "
                f"{slots * slot_bytes / 2**20:.0f}; give the container more (docker run --shm-size), take fewer "
                "workers, or 0: a thread reads then"
            )
        self._memory = torch.empty((slots, slot_bytes), dtype=torch.uint8).share_memory_()

    def write(self, slot: int, columns: Mapping[str, Sequence[Any]]) -> dict[str, Placed]:
        """Stack equal arrays or tensors of a micro-batch, by name, into a slot."""
        memory, offset, found = self._memory[slot], 0, {}
        for name, values in columns.items():
            first = torch.as_tensor(values[0]) if not isinstance(values[0], np.ndarray) else _one_of(values)
            placed = Placed(offset, (len(values), *first.shape), first.dtype)
            target = _view(memory, placed)
            if isinstance(values[0], np.ndarray):
                np.stack(values, out=target.numpy())
            else:
                torch.stack(list(values), out=target)
            found[name] = placed
            offset += _aligned(target.nbytes)
        assert offset <= self._memory.shape[1], "a micro-batch larger than its slot"
        return found

    def read(self, slot: int, placed: Mapping[str, Placed]) -> dict[str, torch.Tensor]:
        """What lies in a slot, in place: it holds until `slots - 1` others have been asked for."""
        return {name: _view(self._memory[slot], one) for name, one in placed.items()}


def packed_bytes(sizes: Sequence[int]) -> int:
    """How large a slot is that holds arrays of these sizes, in bytes."""
    return sum(_aligned(size) for size in sizes)


def _view(memory: torch.Tensor, placed: Placed) -> torch.Tensor:
    size = placed.dtype.itemsize * int(np.prod(placed.shape, dtype=np.int64))
    return memory[placed.offset : placed.offset + size].view(placed.dtype).view(placed.shape)


def _one_of(values: Sequence[np.ndarray]) -> torch.Tensor:
    """Of their shape, in a dtype that holds all of them, on the meta device: they are read-only, which torch warns of.

    Data sets of one run may be stored in different dtypes.
    """
    dtype = torch.from_numpy(np.empty(0, np.result_type(*values))).dtype
    return torch.empty(values[0].shape, dtype=dtype, device="meta")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _free_bytes() -> int | None:
    """Of the machine's shared memory; None where it is not a file system, as on a Mac."""
    try:
        told = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return told.f_bavail * told.f_frsize
