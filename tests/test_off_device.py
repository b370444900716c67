"""The device lent to another process: nothing of a run is left on it, and training goes on to the last bit.

There is no GPU here. What moves is a CPU's memory: the same code, but for the allocator's cache that is given back.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.training import facts_of, lora_of, train_here
from train import loop, off_device
from train.off_device import emptied, held_tensors
from train.run import Run

FLAGS: dict[str, Any] = {"max_train_steps": 4, "validation_steps": 2, "train_batch_size": 2, "checkpointing_steps": 4}
LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"ema_decay": 0.9},
    "int8, streamed": {"base_precision": "int8", "stream_blocks": 1, "mixed_precision": "bf16"},
    "int8, streamed ahead, on the host": {
        "base_precision": "int8", "stream_blocks": 2, "offload_activations": True, "optimizer_offload": True,
        "mixed_precision": "bf16",
    },
    "nf4, 8-bit": {"base_precision": "nf4", "use_8bit_adam": True, "mixed_precision": "bf16", "rank": 64},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
}  # fmt: skip


class Borrower:
    """Stands for stage 3: notes what is on the device while it is lent."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.held: list[list[int]] = []
        self.slots: list[int] = []  # of these, blocks that are streamed

    def lend(self, run: Run) -> Any:
        """In place of `off_device`, which it calls."""
        for module in run.state.transformer.modules():  # a file's mapped pages cannot be freed, on a GPU there are none
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.data.untyped_storage().resizable():
                    module._parameters[name] = torch.nn.Parameter(parameter.data.clone(), parameter.requires_grad)
        self.run = run
        return off_device.off_device(run)

    def make_videos(self, *_: Any, **__: Any) -> list[Any]:
        """In place of the child."""
        assert self.run is not None
        blocks = self.run.state.transformer.transformer_blocks
        self.slots = [slot.untyped_storage().nbytes() for slot in getattr(blocks[0].forward, "slots", list)()]
        self.held.append([tensor.untyped_storage().nbytes() for tensor in held_tensors(self.run)])
        return []


def borrow(monkeypatch: pytest.MonkeyPatch, *, needed: bool) -> Borrower:
    borrower = Borrower()
    monkeypatch.setattr(off_device, "is_needed", lambda device: needed)
    monkeypatch.setattr(loop, "off_device", borrower.lend)
    monkeypatch.setattr(loop, "make_videos", borrower.make_videos)
    return borrower


@pytest.mark.parametrize("name", LEVERS)
def test_nothing_is_left_on_the_device_and_training_goes_on_to_the_last_bit(cache, tmp_path, monkeypatch, name):
    flags = {**FLAGS, **LEVERS[name]}
    with monkeypatch.context() as patched:
        stayed = borrow(patched, needed=False)
        assert train_here(cache, tmp_path / "stayed", **flags) == 0
    with monkeypatch.context() as patched:
        lent = borrow(patched, needed=True)
        assert train_here(cache, tmp_path / "lent", **flags) == 0
    assert [len(sizes) for sizes in lent.held] == [len(sizes) for sizes in stayed.held]
    assert all(sum(sizes) > 0 for sizes in stayed.held), "of a run that did not lend it is all there"
    assert [sum(sizes) for sizes in lent.held] == [0, 0]
    assert bool(stayed.slots) == ("streamed" in name)
    assert sum(lent.slots) == 0 <= min(stayed.slots, default=0)
    assert facts_of(tmp_path / "lent") == facts_of(tmp_path / "stayed")
    assert lora_of(tmp_path / "lent") == lora_of(tmp_path / "stayed")


def live_storages() -> dict[int, int]:
    """Bytes by address of the storages of all tensors that the garbage collector knows of."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = [one.untyped_storage() for one in found if not one.is_meta and not isinstance(one, FakeTensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_what_is_held_is_all_that_a_step_leaves(cache, tmp_path, monkeypatch):
    """Counted by another way: by the garbage collector, which knows nothing of runs."""
    before = live_storages()
    sizes: dict[str, int] = {}

    @contextmanager
    def count(run: Run) -> Iterator[None]:
        held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held_tensors(run)}
        left = {place: size for place, size in live_storages().items() if place not in held and place not in before}
        sizes.update(held=sum(held.values()), left=sum(left.values()))
        yield

    monkeypatch.setattr(loop, "off_device", count)
    monkeypatch.setattr(loop, "make_videos", lambda *_, **__: [])
    flags = {**FLAGS, "max_train_steps": 2, "ema_decay": 0.9, "rank": 64}
    assert train_here(cache, tmp_path / "run", **flags) == 0
    assert sizes["left"] < 0.05 * sizes["held"], sizes  # the schedule, and what the last rows were made of


def test_views_and_ties_find_their_numbers_again():
    whole = torch.arange(12.0).reshape(3, 4)
    view, tied = whole[1:, 2:], torch.nn.Parameter(whole)
    with emptied([whole, view, tied.data]):
        assert whole.untyped_storage().nbytes() == 0
        assert tied.data_ptr() == 0
    assert torch.equal(view, torch.tensor([[6.0, 7.0], [10.0, 11.0]]))
    tied.data.add_(1)
    assert whole[0, 0] == 1.0


def test_they_come_back_whatever_happens_meanwhile():
    tensor = torch.arange(5)
    with pytest.raises(KeyboardInterrupt), emptied([tensor]):
        raise KeyboardInterrupt
    assert tensor.tolist() == [0, 1, 2, 3, 4]


def test_on_a_cpu_nothing_moves(cache, tmp_path, monkeypatch):
    def never(tensors: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(off_device, "emptied", never)
    monkeypatch.setattr(loop, "make_videos", lambda *_, **__: [])
    assert train_here(cache, tmp_path / "run", max_train_steps=1, validation_steps=1) == 0
