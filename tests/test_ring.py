"""train/ring.py: what is written into a slot is what is looked at, in place; too little shared memory is told."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.errors import ConfigError
from train import ring as ring_module
from train.ring import Ring, packed_bytes


def columns(value):
    """As a reader has them: read-only arrays, tensors, numbers; of sizes that fill no line of a cache."""
    array = np.full((3, 5), value, np.float16)
    array.flags.writeable = False
    return {
        "moments": [array, array + np.float16(1)],
        "noise": [torch.full((7,), value), torch.full((7,), value + 1)],
        "timesteps": [torch.tensor(3), torch.tensor(4)],
    }


SLOT_BYTES = packed_bytes([2 * 15 * 2, 2 * 7 * 4, 2 * 8])


def check(found, value):
    dtypes = {"moments": torch.float16, "noise": torch.float32, "timesteps": torch.int64}
    assert {name: values.dtype for name, values in found.items()} == dtypes
    for name, values in columns(value).items():
        assert found[name].tolist() == [one.tolist() for one in values]


def test_slots_hold_what_was_written_until_they_are_written_again():
    ring = Ring(3, SLOT_BYTES)
    placed = [ring.write(slot, columns(float(slot))) for slot in range(3)]
    for slot in range(3):
        check(ring.read(slot, placed[slot]), float(slot))
    looked_at = ring.read(1, placed[1])
    ring.write(1, columns(9.0))
    check(looked_at, 9.0)  # in place: nothing was copied
    check(ring.read(0, placed[0]), 0.0)
    check(ring.read(2, placed[2]), 2.0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_float16_beside_float32_is_stacked_as_numpy_does(order):
    """Two data sets of one run may be stored in different dtypes; what a worker gives must not depend on the order."""
    both = [np.array([1.5, -2], np.float16), np.array([1e6, 1 / 3], np.float32)]
    values = [both[place] for place in order]
    ring = Ring(2, 4096)
    found = ring.read(1, ring.write(1, {"moments": values}))["moments"].numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, np.stack(values))


def test_arrays_lie_on_lines_of_a_cache_and_fill_no_more_than_was_counted():
    placed = Ring(1, SLOT_BYTES).write(0, columns(1.0))
    assert all(one.offset % 64 == 0 for one in placed.values())
    ends = [one.offset + one.dtype.itemsize * int(np.prod(one.shape)) for one in placed.values()]
    assert max(ends) <= SLOT_BYTES


def test_what_is_larger_than_a_slot_is_never_cut():
    with pytest.raises((AssertionError, RuntimeError)):
        Ring(2, SLOT_BYTES - 64).write(0, columns(1.0))


def _write_elsewhere(ring, sent):
    sent.put(ring.write(1, columns(5.0)))


def test_a_spawned_process_writes_what_this_one_sees():
    ring, context = Ring(2, SLOT_BYTES), multiprocessing.get_context("spawn")
    sent = context.Queue()
    process = context.Process(target=_write_elsewhere, args=(ring, sent))
    process.start()
    placed = sent.get(timeout=60)
    process.join()
    check(ring.read(1, placed), 5.0)


def test_shared_memory_that_is_too_small_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr(ring_module.os, "statvfs", lambda path: SimpleNamespace(f_bavail=64, f_frsize=2**20))
    Ring(1, 2**20)
    with pytest.raises(ConfigError, match=r"/dev/shm has 64 MiB free; must have 65; .*--shm-size.*fewer workers"):
        Ring(65, 2**20)
