"""Clips that are decoded ahead of the encoder: in order, within a bound of bytes."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from preprocess import clips
from preprocess.clips import DecodeAhead
from shared.errors import VideoError
from shared.geometry import Bucket

BUCKET = Bucket(9, 16, 32)
CLIP_BYTES = 9 * 16 * 32 * 3


class Pool:
    """Stands in for DecodePool: notes what it is asked for, which is done when a test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Future[Any]]] = []

    def read(self, path: str, *_: Any, preview: bool) -> Future[Any]:
        """As DecodePool."""
        self.asked.append((path, Future()))
        return self.asked[-1][1]


def jobs(count: int, *, changed: tuple[int, ...] = ()) -> Any:
    """Clips `0`, `1`, ... of BUCKET, as far as they are looked at here; of some the file has changed."""
    for number in range(count):
        record = SimpleNamespace(path=str(number))
        sample = SimpleNamespace(record=record, probe=None, placement=None, bucket=BUCKET)
        source = SimpleNamespace(is_unchanged=lambda number=number: number not in changed)
        yield SimpleNamespace(sample=sample, source=source, keys={False: b"k"}, frame_indices=list(range(9)))


@pytest.mark.parametrize(
    ("room", "most"), [(0, 1), (1, 1), (CLIP_BYTES, 1), (3.5 * CLIP_BYTES, 3), (99 * CLIP_BYTES, 7)]
)
def test_what_waits_is_within_the_bound_and_at_least_one_clip(monkeypatch, room, most):
    monkeypatch.setattr(clips, "AHEAD_BYTES", room)
    pool, taken = Pool(), list[Any]()
    with DecodeAhead(jobs(7), pool) as ahead:  # type: ignore[arg-type]
        for number, (path, future) in enumerate(pool.asked):
            future.set_result(number)
            assert path == str(number)
        assert len(pool.asked) == most, "before the first is asked for: while T5 is at work"
        for job, read in ahead:
            taken.append((job.sample.record.path, read))
            waiting = len(pool.asked) - len(taken)
            assert waiting <= most
            assert waiting == min(most, 7 - len(taken))
            for number, (_, future) in enumerate(pool.asked):
                if not future.done():
                    future.set_result(number)
    assert taken == [(str(number), number) for number in range(7)]


def test_what_cannot_be_read_or_has_changed_since_comes_out_in_its_place():
    pool = Pool()
    with DecodeAhead(jobs(3, changed=(2,)), pool) as ahead:  # type: ignore[arg-type]
        for _, future in pool.asked:
            future.set_result("read")
        pool.asked[1][1].__init__()  # type: ignore[misc]
        pool.asked[1][1].set_exception(VideoError("unreadable", "torn"))
        found = [read if isinstance(read, str) else str(read) for _, read in ahead]
    assert found[:2] == ["read", "unreadable: torn"]
    assert found[2].startswith("unreadable: changed or gone since this run looked at it first")


def test_what_waits_is_given_up_when_the_encoder_fails():
    pool = Pool()

    class EncoderError(Exception):
        pass

    def fail() -> None:
        with DecodeAhead(jobs(3), pool) as ahead:  # type: ignore[arg-type]
            pool.asked[0][1].set_result("read")
            next(iter(ahead))
            raise EncoderError

    with pytest.raises(EncoderError):
        fail()
    assert [future.cancelled() for _, future in pool.asked] == [False, True, True]
