"""Status, digest and copies of files, local and behind a URL: fsspec's memory; servers: test_remote_videos.py."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import fsspec
import pytest

from preprocess import copies, files
from shared import remote
from shared.errors import CacheError, VideoError


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty file system of fsspec's, in this process; copies go below `tmp_path`."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,) * 3)
    files.forget_copies()
    yield system
    files.forget_copies()


@pytest.fixture
def fetched(memory, monkeypatch):
    """The paths that were fetched, in order."""
    seen: list[str] = []
    get = type(memory).get_file

    def record(self, path, target, **settings):
        seen.append(path)
        return get(self, path, target, **settings)

    monkeypatch.setattr(type(memory), "get_file", record)
    return seen


def put(memory, name, content):
    memory.pipe_file(f"/lab/{name}", content)
    return f"memory://lab/{name}"


def held(tmp_path):
    """The bytes of the copies on the disk."""
    return sorted(path.read_bytes() for path in tmp_path.glob("latentreel-videos-*/*/*") if path.name != "lock")


def test_a_local_file_is_as_the_operating_system_tells(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"video")
    os.utime(file, ns=(5, 1234567890123456789))
    assert files.status(str(file)) == (5, 1234567890123456789)
    assert files.digest(str(file)) == hashlib.sha256(b"video").hexdigest()
    with files.local(str(file)) as path:
        assert path == str(file)
    with pytest.raises(FileNotFoundError):
        files.status(str(tmp_path / "b.mp4"))


def test_a_url_is_fetched_once_for_its_digest_and_its_readers(memory, fetched, tmp_path):
    url = put(memory, "a.mp4", b"video")
    size, stamp = files.status(url)
    assert (size, 0 <= stamp < 1 << 63) == (5, True)
    assert files.digest(url) == hashlib.sha256(b"video").hexdigest()
    with files.local(url) as path, files.local(url) as same:
        assert (Path(path).read_bytes(), Path(path).suffix, path == same) == (b"video", ".mp4", True)
    assert files.status(url) == (size, stamp)
    assert fetched == ["/lab/a.mp4"]
    assert held(tmp_path) == [b"video"]
    files.forget_copies()
    assert list(tmp_path.glob("latentreel-videos-*/*")) == []


def test_threads_that_ask_for_one_url_fetch_it_once(memory, fetched):
    url = put(memory, "a.mp4", bytes(1000))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(files.digest(url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hashlib.sha256(bytes(1000)).hexdigest()] * 8
    assert len(fetched) == 1


def test_a_changed_file_has_another_status_and_is_fetched_again(memory, fetched, tmp_path):
    url = put(memory, "a.mp4", b"before")
    before = files.status(url)
    with files.local(url) as old:
        put(memory, "a.mp4", b"behind")
        after = files.status(url)
        assert Path(old).read_bytes() == b"before", "who reads it goes on reading it"
        assert files.digest(url) == hashlib.sha256(b"behind").hexdigest()
    assert before != after
    assert before[0] == after[0]
    assert held(tmp_path) == [b"behind"]


def test_the_least_recently_used_copy_goes_when_there_is_no_room(memory, fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "COPY_BYTES", 25)
    urls = [put(memory, f"{name}.mp4", name.encode() * 10) for name in "abc"]
    with files.local(urls[0]):
        files.digest(urls[1])
        files.digest(urls[2])
        assert held(tmp_path) == [b"a" * 10, b"c" * 10], "one in use stays"
    files.digest(urls[0])
    files.digest(urls[1])
    assert held(tmp_path) == [b"a" * 10, b"b" * 10]
    large = put(memory, "large.mp4", b"l" * 30)
    with files.local(large) as path:
        assert Path(path).stat().st_size == 30
    assert held(tmp_path) == []
    assert [name[5] for name in fetched] == list("abcbl")


@pytest.mark.parametrize("untold", ["created", "size"])
def test_where_a_server_tells_too_little_the_content_is_the_stamp(memory, fetched, monkeypatch, untold):
    info = type(memory).info

    def tell(self, path, **settings):
        facts = info(self, path, **settings)
        return {**facts, "size": None} if untold == "size" else {name: facts[name] for name in ("name", "size", "type")}

    monkeypatch.setattr(type(memory), "info", tell)
    url = put(memory, "a.mp4", b"before")
    before = files.status(url)
    assert before[0] == 6
    files.digest(url)
    assert len(fetched) == 1
    files.forget_copies()
    put(memory, "a.mp4", b"before")
    assert files.status(url) == before
    files.forget_copies()
    put(memory, "a.mp4", b"behind")
    assert files.status(url) != before


def test_statuses_come_in_order_with_what_is_not_there(memory, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"local")
    urls = [put(memory, f"{number}.mp4", bytes(number)) for number in range(40)]
    paths = [str(tmp_path / "a.mp4"), *urls, "memory://lab/none.mp4", str(tmp_path / "none.mp4"), urls[3]]
    told = list(files.statuses(iter(paths)))
    assert [path for path, _ in told] == paths
    assert [found[0] for _, found in told if isinstance(found, tuple)] == [5, *range(40), 3]
    assert [type(found) for _, found in told[41:43]] == [FileNotFoundError] * 2
    assert all(isinstance(found, OSError) and found.strerror for _, found in told[41:43])


def test_a_file_that_cannot_be_fetched_is_not_held_against_the_video(memory, monkeypatch):
    url = put(memory, "a.mp4", b"video")
    monkeypatch.setattr(
        type(memory), "get_file", lambda *words, **settings: (_ for _ in ()).throw(ConnectionError("x"))
    )
    with pytest.raises(OSError, match="tried 4 times"):
        files.digest(url)
    with pytest.raises(files.FetchError, match=r"unreadable: .*tried 4 times") as caught, files.local(url):
        pass
    assert isinstance(caught.value, VideoError)


def test_a_fetch_that_comes_short_is_made_again(memory, fetched, monkeypatch):
    url = put(memory, "a.mp4", b"video")
    get, cuts = type(memory).get_file, iter([2, 4])

    def cut(self, path, target, **settings):
        get(self, path, target, **settings)
        if kept := next(cuts, None):
            os.truncate(target, kept)

    monkeypatch.setattr(type(memory), "get_file", cut)
    assert files.digest(url) == hashlib.sha256(b"video").hexdigest()
    assert len(fetched) == 3


def test_a_full_disk_is_told_and_is_no_verdict_on_the_video(memory, monkeypatch, tmp_path):
    url = put(memory, "a.mp4", b"video")

    def full(*words, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", full)
    with pytest.raises(CacheError, match=r"no room for a copy of memory://lab/a\.mp4 .*TMPDIR"):
        files.digest(url)
    assert held(tmp_path) == []


def test_forgetting_gives_up_what_is_being_fetched(memory, monkeypatch):
    url = put(memory, "a.mp4", b"video")

    def slow(self, path, target, callback):
        files.forget_copies()
        callback.relative_update(1)

    monkeypatch.setattr(type(memory), "get_file", slow)
    with pytest.raises(copies.GivenUpError):
        files.digest(url)


def test_copies_of_a_process_that_was_killed_are_removed(memory, tmp_path):
    files.digest(put(memory, "a.mp4", b"video"))
    (parent,) = tmp_path.glob("latentreel-videos-*")
    files.forget_copies()
    dead = parent / "1-dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "0.mp4").write_bytes(b"left")
    files.digest(put(memory, "b.mp4", b"other"))
    assert held(tmp_path) == [b"other"]
