"""The device, lent to another process: what a run holds on it waits on the host, and comes back bit by bit.

Storages are emptied, not tensors replaced: whoever refers to one, be it a view, a tied weight, a quantised tensor's
scales, an optimizer's state or a block's slot, finds it as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shared.ledger import tensors_of
from train.blocks import StagedBlock
from train.run import Run


def is_needed(device: torch.device) -> bool:
    """Whether another process could use the memory: a CPU's is everyone's."""
    return device.type == "cuda"


@contextmanager
def off_device(run: Run) -> Iterator[None]:
    """Inside, the device's memory is free for another process.

    What stays: the CUDA context, and DDP's buckets, as large as the LoRA's gradients. On a CPU nothing need move. The
    tests make it move all the same; on a GPU this has not been run.
    """
    device = run.accelerator.device
    if not is_needed(device):
        yield
        return
    with emptied(tensor for tensor in held_tensors(run) if tensor.device.type == device.type):
        torch.cuda.empty_cache()  # what the allocator keeps is no other process's
        yield


def held_tensors(run: Run) -> Iterator[torch.Tensor]:
    """The plain tensors that a run holds between two steps: weights, slots, averages, the optimizer's, gradients."""
    transformer, state = run.state.transformer, run.state
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        yield from tensors_of(tensor)
        if tensor.grad is not None:
            yield tensor.grad
    for block in transformer.transformer_blocks:
        if isinstance(block.forward, StagedBlock):
            yield from block.forward.slots()
    if state.ema:
        yield from state.ema.averages
    yield from _nested(state.optimizer.state)


def _nested(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an optimizer's state: bitsandbytes puts some one level down."""
    if isinstance(value, torch.Tensor):
        yield from tensors_of(value)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _nested(one)


@contextmanager
def emptied(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, the storages of these tensors hold nothing and take no memory; copies on the host do."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    copies: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
    try:
        for storage in storages.values():
            if storage.nbytes() and storage.resizable():  # a file's pages, mapped, are no allocator's to free
                copies.append((storage, torch.UntypedStorage(storage.nbytes()).copy_(storage)))
                storage.resize_(0)
        yield
    finally:
        for storage, copy in copies:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
