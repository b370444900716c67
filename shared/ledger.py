"""Counting the bytes that a computation holds, by place and by what they are for; on tensors without storage too.

A dispatch mode sees every tensor that comes into being, and a finalizer its storage's end. Under FakeTensorMode nothing
is computed, and what a full-size model holds is counted in seconds on any machine. Not counted: what a kernel or a
library takes for itself while it runs, the allocator's rounding and fragments, the CUDA context.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

TRANSIENT = "transient"


@dataclass
class _Record:
    size: int
    place: str
    category: str


@dataclass
class Peak:
    """The most that a place held.

    Attributes:
        total: bytes.
        parts: bytes by category at that moment.
    """

    total: int = 0
    parts: Counter[str] = field(default_factory=Counter)


class Ledger(TorchDispatchMode):
    """Live bytes of `device` and `host`, and their peaks; within it a tensor counts from when it is first seen.

    Args:
        host_category: of what is made on the host at this moment; None: what is made is the device's.
    """

    def __init__(self, host_category: Callable[[], str | None] = lambda: None) -> None:
        super().__init__()
        self._host_category = host_category
        self.now = {"device": Counter[str](), "host": Counter[str]()}
        self.peaks = {place: Peak() for place in self.now}
        self._records = WeakIdKeyDictionary()
        self._category = TRANSIENT

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    @contextmanager
    def labelled(self, category: str) -> Iterator[None]:
        """Within: what comes into being on the device is of this category."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    def label(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count tensors that are there, or count them anew, as of this category."""
        for tensor in tensors:
            for part in tensors_of(tensor):
                self._see(part)
                record = self._records[part.untyped_storage()]
                self.now[record.place][record.category] -= record.size
                record.category = category
                self.now[record.place][category] += record.size

    def watch_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Count the gradients that these parameters gather as `gradients`."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gathered)

    def start_anew(self) -> None:
        """Forget the peaks so far."""
        for place in self.now:
            self.peaks[place] = Peak()
            self._measure(place)

    def held(self, place: str) -> int:
        """Bytes that a place holds now."""
        return sum(self.now[place].values())

    def _gathered(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.label([parameter.grad], "gradients")

    def _see(self, tensor: torch.Tensor) -> None:
        # a quantised tensor's own storage reports the bytes of the whole one
        for part in tensors_of(tensor) if is_traceable_wrapper_subclass(tensor) else [tensor]:
            self._see_plain(part)

    def _see_plain(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._records:
            return
        made_on_host = self._host_category()
        place, category = ("device", self._category) if made_on_host is None else ("host", made_on_host)
        record = _Record(storage.nbytes(), place, category)
        self._records[storage] = record
        self.now[place][category] += record.size
        self._measure(place)
        weakref.finalize(storage, self._forget, record)

    def _forget(self, record: _Record) -> None:
        self.now[record.place][record.category] -= record.size

    def _measure(self, place: str) -> None:
        total = self.held(place)
        if total > self.peaks[place].total:
            self.peaks[place] = Peak(total, Counter({name: size for name, size in self.now[place].items() if size}))


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The plain tensors that hold a parameter's bytes: its own, or those in a quantised one."""
    if is_traceable_wrapper_subclass(value):
        names = value.__tensor_flatten__()[0]
        return [tensor for name in names for tensor in tensors_of(getattr(value, name))]
    state = getattr(value, "quant_state", None)  # of bitsandbytes
    if state is None:
        return [value.data]
    parts = [
        state.absmax,
        state.code,
        state.offset,
        *([state.state2.absmax, state.state2.code] if state.state2 else []),
    ]
    return [value.data, *(part for part in parts if part is not None)]


def make_fake(module: Any) -> None:
    """Move a model from the meta device to a CPU whose memory is counted and never taken."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
