"""Frozen blocks that live on the host, and N slots on the device that they come to ahead of use.

Nothing is copied back: what is frozen does not change. A block's modules have their weights only while the block is
computed; at rest they have none, so that nobody moves, counts or saves them. The tensor that autograd saves is the
slot's: whoever computes a block must be done with its graph before it leaves (train/blocks.py is).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shared.ledger import tensors_of
from train.host import Mover, host_block

Place = tuple[torch.nn.Module, str]  # of a parameter


@dataclass
class _Slot:
    """Device memory for one block.

    Attributes:
        parameters: as the block's modules take them.
        tensors: their storages, in the order of the host's.
        number: of the block whose weights are in it or on the way.
        ready: event after which they are.
        released: event after which nothing reads them.
    """

    parameters: list[torch.nn.Parameter]
    tensors: list[torch.Tensor]
    number: int | None = None
    ready: Any = None
    released: Any = None


class Residency:
    """The frozen parameters of equal blocks: on the host, and of `count` blocks on the device."""

    def __init__(self, blocks: Sequence[torch.nn.Module], mover: Mover, count: int) -> None:
        self._mover = mover
        self._places = [list(_frozen(block)) for block in blocks]
        self._host: list[list[torch.Tensor]] = []
        example: list[torch.nn.Parameter] = []
        for places in self._places:
            own = [module._parameters[name] for module, name in places]
            example = example or [_placed(parameter, mover.device) for parameter in own if parameter is not None]
            tensors = [tensor for parameter in own for tensor in tensors_of(parameter)]
            self._host.append(host_block(tensors, "weights", pinned=mover.device.type == "cuda"))
            for module, name in places:
                module._parameters[name] = None
        self._slots = [self._slot(example)]
        self._slots += [self._slot([_placed(one, mover.device) for one in example]) for _ in blocks[1:count]]

    def _slot(self, parameters: list[torch.nn.Parameter]) -> _Slot:
        return _Slot(parameters, [tensor for parameter in parameters for tensor in tensors_of(parameter)])

    def slots(self) -> Iterator[torch.Tensor]:
        """The device memory that the blocks come to. What is on its way there has arrived."""
        self._mover.settle()
        for slot in self._slots:
            yield from slot.tensors

    @contextmanager
    def block(self, number: int, direction: int) -> Iterator[None]:
        """Within: block `number` has its weights. Those that follow in `direction` (1, -1) are on their way.

        Before it is left, every graph that was made of them must be gone.
        """
        wanted = [number + direction * ahead for ahead in range(len(self._slots))]
        slot = self._fetched(number, wanted)
        self._mover.wait(slot.ready)
        for later in wanted[1:]:
            if 0 <= later < len(self._places):
                self._fetched(later, wanted)
        for (module, name), parameter in zip(self._places[number], slot.parameters, strict=True):
            module._parameters[name] = parameter
        try:
            yield
        finally:
            for module, name in self._places[number]:
                module._parameters[name] = None
            slot.released = self._mover.mark()

    def _fetched(self, number: int, wanted: list[int]) -> _Slot:
        for slot in self._slots:
            if slot.number == number:
                return slot
        slot = next(slot for slot in self._slots if slot.number not in wanted)
        slot.number = number
        with self._mover.beside(), torch.no_grad():
            self._mover.wait(slot.released)
            for tensor, home in zip(slot.tensors, self._host[number], strict=True):
                tensor.copy_(home, non_blocking=True)
            slot.ready = self._mover.mark()
        return slot


def _frozen(block: torch.nn.Module) -> Iterator[Place]:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield module, name


def _placed(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """An uninitialised parameter of the same kind, shape and dtype on a device."""
    if getattr(parameter, "quant_state", None) is not None:
        twin: torch.nn.Parameter = copy.deepcopy(parameter).to(device)  # type: ignore[assignment]
        return twin
    return torch.nn.Parameter(_like(parameter.data, device), requires_grad=False)


def _like(tensor: Any, device: torch.device) -> torch.Tensor:
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        inner = {name: _like(getattr(tensor, name), device) for name in names}
        twin: torch.Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
        return twin
    return torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
