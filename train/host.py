"""Host memory beside the device's: tensors that are kept there, and copies to and fro that run beside the computation.

On a CPU the two are one memory: every copy is made all the same, so that what is tested there is what runs on a GPU,
and what is made under `on_host` is told apart by whoever counts (train/ledger.py). On a GPU host tensors are pinned and
copies run on a stream of their own; events keep the two streams in order, and the host waits for neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from shared.errors import ConfigError

PAGE = 4096  # bytes
ALIGNMENT = 64  # bytes, of a tensor in a piece of memory

_making: list[str] = []  # categories of the host tensors that are being made, innermost last


@contextmanager
def on_host(category: str) -> Iterator[None]:
    """Within: storages that come into being are the host's.

    Args:
        category: weights, checkpoints, gradients or optimizer.
    """
    _making.append(category)
    try:
        yield
    finally:
        _making.pop()


def host_category() -> str | None:
    """What is being made on the host; None where the device's tensors are made."""
    return _making[-1] if _making else None


def host_copy(tensor: torch.Tensor, category: str) -> torch.Tensor:
    """A copy on the host, made at once, in memory of exactly its size."""
    with on_host(category):
        return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)


def has_no_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no numbers: on the meta device, or fake."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor) or isinstance(tensor.data, FakeTensor)


def host_block(tensors: Sequence[torch.Tensor], category: str, *, pinned: bool) -> list[torch.Tensor]:
    """Copies on the host, in one piece of memory of whole pages.

    PyTorch's own pinned memory comes in powers of two, up to twice what is asked for. Pages can be locked as they are,
    but each once: so that no two pieces may share one.

    Args:
        pinned: lock the pages for as long as the process lives, so that copies of them need not wait.

    Raises:
        ConfigError: the system does not lock that much.
    """
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT)
    size = -(-offsets[-1] // PAGE) * PAGE
    with on_host(category):
        memory = torch.empty(size + PAGE, dtype=torch.uint8)
    start = 0 if has_no_storage(memory) else -memory.data_ptr() % PAGE
    if pinned:
        _lock(memory.data_ptr() + start, size)
    copies = []
    for tensor, offset in zip(tensors, offsets, strict=False):
        begin = start + offset
        piece = memory[begin : begin + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        copies.append(piece.copy_(tensor))
    return copies


def _lock(address: int, size: int) -> None:
    status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if status != 0:
        raise ConfigError(
            f"--stream_blocks: the system did not lock {size / 2**20:.0f} MiB of host memory more "
            f"(CUDA error {status}); raise `ulimit -l`, free memory, or leave the flag out"
        )


class Mover:
    """Copies between host and device beside the computation, in an order that both keep to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: tuple[Sequence[torch.Tensor], Any] | None = None

    def beside(self) -> Any:
        """Within: copies run beside the computation, after all that it was given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def mark(self) -> Any:
        """An event after what the current stream was given; None on a CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self._stream else None

    def wait(self, event: Any) -> None:
        """Let the computation wait for a copy. The host does not."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        """Let the host wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()

    def leave(self, tensors: Sequence[torch.Tensor], category: str) -> tuple[list[torch.Tensor], Any]:
        """Copies on the host and the event after which they hold.

        A tensor's memory may serve anew once its copy is made. The one of the call before is held until now, and the
        computation waits for its copy here: not `record_stream`, whose memory comes back only when the host sees the
        copy done, which is long after it has asked for more.
        """
        self.let_go()
        with on_host(category):
            pinned = self._stream is not None
            copies = [
                torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned) for tensor in tensors
            ]
        with self.beside():
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            event = self.mark()
        if self._stream is not None:
            self._leaving = (tensors, event)
        return copies, event

    def let_go(self) -> None:
        """Let the computation wait for the copy that was made last, and hold what it was made of no longer."""
        if self._leaving is not None:
            self.wait(self._leaving[1])
            self._leaving = None

    def bring(self, copies: Sequence[torch.Tensor], event: Any) -> tuple[list[torch.Tensor], Any]:
        """Device tensors of host copies, and the event that the computation waits for before it reads them."""
        # made on the computation's stream, where they will be freed
        tensors = [torch.empty(copy.shape, dtype=copy.dtype, device=self.device) for copy in copies]
        with self.beside():
            self.wait(event)
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy, non_blocking=True)
            return tensors, self.mark()


class Shelf:
    """What the blocks were given, on the host from a block's forward pass to its backward pass.

    One forward pass is followed by its backward pass, block by block from the last to the first.
    """

    def __init__(self, mover: Mover, *, ahead: bool) -> None:
        """`ahead`: bring the next block's inputs while one block is computed."""
        self._mover, self._ahead = mover, ahead
        self._kept: dict[int, tuple[list[torch.Tensor], Any]] = {}
        self._coming: dict[int, tuple[list[torch.Tensor], Any]] = {}

    def put(self, number: int, tensors: Sequence[torch.Tensor]) -> None:
        """Keep the inputs of block `number`."""
        self._kept[number] = self._mover.leave(tensors, "checkpoints")

    def take(self, number: int) -> list[torch.Tensor]:
        """The inputs of block `number` on the device; the host's copies go."""
        self._mover.let_go()
        self._bring(number)
        tensors, event = self._coming.pop(number)
        self._mover.wait(event)
        return tensors

    def bring_ahead(self, number: int) -> None:
        """Let the inputs of block `number`, which is next, come while another is computed, if that is wanted."""
        if self._ahead:
            self._bring(number)

    def _bring(self, number: int) -> None:
        if number in self._kept:
            self._coming[number] = self._mover.bring(*self._kept.pop(number))
