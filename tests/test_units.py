"""Units of work: written and published beside the encoder, models opened only for what is missing."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from preprocess import encode, units
from preprocess.units import Publisher
from tests.conftest import moving_square, write_video
from tests.decoding import use_stand_ins
from tests.test_preprocess import preprocess

SIZE = ["--height", "32", "--width", "48", "--max_num_frames", "9"]


class Part:
    """Stands in for a part."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def publish(self) -> None:
        """Notes it."""
        self._log.append(f"publish {self._name}")

    def abandon(self) -> None:
        """Notes it."""
        self._log.append(f"abandon {self._name}")


def test_tasks_are_done_in_order_beside_the_caller_and_few_wait(monkeypatch):
    monkeypatch.setattr(units, "BATCHES_AHEAD", 2)
    log: list[str] = []
    gate, given = threading.Event(), threading.Semaphore(0)

    def write(name: str) -> None:
        assert gate.wait(60)
        log.append(name)

    def give() -> None:
        with Publisher() as publisher:
            part: Any = publisher.open(Part(log, "a"))  # type: ignore[arg-type]
            for name in "1234":
                publisher.do(write, name)
                given.release()
            publisher.publish([part])

    caller = threading.Thread(target=give)
    caller.start()
    assert given.acquire(timeout=60)
    assert given.acquire(timeout=60)
    assert not given.acquire(timeout=0.2), "the third waits until one is done"
    gate.set()
    caller.join(60)
    assert log == ["1", "2", "3", "4", "publish a"]


def test_what_fails_beside_the_caller_is_raised_there_and_nothing_more_is_published():
    class DiskError(Exception):
        pass

    def fail() -> None:
        raise DiskError

    log: list[str] = []
    first, second = Part(log, "first"), Part(log, "second")

    def give() -> None:
        with Publisher() as publisher:
            publisher.open(first)  # type: ignore[arg-type]
            publisher.open(second)  # type: ignore[arg-type]
            publisher.publish([first])  # type: ignore[list-item]
            publisher.do(fail)
            publisher.publish([second])  # type: ignore[list-item]

    with pytest.raises(DiskError):
        give()
    assert log == ["publish first", "abandon second"]


@pytest.fixture
def opened_models(monkeypatch):
    """Stage 1 with stand-ins; the names of the models that it opened."""
    use_stand_ins(monkeypatch)
    opened = []
    for name in ("TextEncoder", "VideoEncoder"):
        stand_in = getattr(encode, name)

        def note(*arguments, name=name, stand_in=stand_in, **settings):
            opened.append(name)
            return stand_in(*arguments, **settings)

        monkeypatch.setattr(encode, name, note)
    return opened


def test_a_model_is_opened_for_what_is_missing_alone(opened_models, tiny_2b, tmp_path):
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", moving_square(number, 9, 40, 56))

    def run(*rows: tuple[str, str]) -> list[str]:
        told = [{"video": video, "caption": caption} for video, caption in rows]
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, told)))
        opened_models.clear()
        preprocess(tmp_path / "cache", tiny_2b, tmp_path / "m.jsonl", size=SIZE)
        return list(opened_models)

    assert run(("0.mp4", "a square")) == ["TextEncoder", "VideoEncoder"]
    assert run(("0.mp4", "a square")) == []
    assert run(("0.mp4", "another")) == ["TextEncoder"]
    assert run(("1.mp4", "another")) == ["VideoEncoder"]
