"""A folder of files here or behind a URL: atomic writes, locks, ranges, and who may be opened at all."""

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISDIR

import fsspec
import pytest

from shared.errors import CacheError, ConfigError
from shared.storage import OPEN_FILES, FileLock, Storage, canonical_json, check_url, digest_of, write_atomically
from tests.conftest import ROOT

PAYLOAD = bytes(range(256)) * 8


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path) -> Storage:
    """An empty root: a local folder, and one that is reached through fsspec."""
    if request.param == "local":
        return Storage(str(tmp_path / "root"))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    return Storage("memory://bucket/prefix/")


@pytest.fixture
def writer(tmp_path) -> Path:
    folder = tmp_path / "writer"
    folder.mkdir()
    return folder


# What both kinds of storage do.


def test_what_was_written_is_read(storage, writer):
    storage.write("a/b/file.bin", PAYLOAD, writer)
    assert storage.read("a/b/file.bin") == PAYLOAD
    assert storage.size("a/b/file.bin") == len(PAYLOAD)
    assert storage.exists("a/b/file.bin")
    assert storage.exists("a/b")
    assert list(writer.iterdir()) == []


def test_a_finished_file_is_published_in_place_of_an_older_one(storage, writer):
    for payload in (b"old", b"new and longer"):
        (writer / "finished").write_bytes(payload)
        storage.publish(writer / "finished", "a/file.bin")
        assert storage.read("a/file.bin") == payload
    assert storage.names("a") == ["file.bin"]


def test_names_are_sorted_and_those_of_the_folder_only(storage, writer):
    for path in ("d/b", "d/c/deeper", "d/a", "other/x"):
        storage.write(path, b"", writer)
    assert storage.names("d") == ["a", "b", "c"]
    assert storage.names("nowhere") == []


def test_what_is_not_there(storage):
    assert not storage.exists("a/file.bin")
    with pytest.raises(FileNotFoundError):
        storage.read("a/file.bin")
    with pytest.raises(FileNotFoundError):
        storage.read_range("a/file.bin", 0, 1)


@pytest.mark.parametrize(("offset", "size_bytes"), [(0, 1), (0, 2048), (100, 500), (2047, 1), (300, 0)])
def test_a_range_is_a_slice_of_the_file(storage, writer, offset, size_bytes):
    storage.write("file.bin", PAYLOAD, writer)
    assert storage.read_range("file.bin", offset, size_bytes) == PAYLOAD[offset : offset + size_bytes]


@pytest.mark.parametrize(
    ("offset", "size_bytes"),
    [(0, 2049), (2000, 49), (2048, 1), (10**6, 9), (0, 2**62), (2**62, 9), (-4, 4), (8, -4)],
)
def test_a_range_that_the_file_does_not_hold_is_refused(storage, writer, offset, size_bytes):
    """In particular 4 EiB are not set aside before they are read, and -4 is not counted from the end."""
    storage.write("file.bin", PAYLOAD, writer)
    with pytest.raises(CacheError, match=r"file\.bin: holds \d+ of the"):
        storage.read_range("file.bin", offset, size_bytes)


def test_a_spawned_worker_opens_its_own_files(storage, writer):
    storage.write("file.bin", PAYLOAD, writer)
    storage.read_range("file.bin", 0, 4)
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301 (as a spawned process is given it)
    assert (copy.url, copy.is_local) == (storage.url, storage.is_local)
    assert copy.read_range("file.bin", 4, 4) == PAYLOAD[4:8]


def test_another_process_s_files_are_seen_in_a_folder_that_was_listed_before(storage, writer):
    storage.write("d/a", b"", writer)
    assert storage.names("d") == ["a"]
    Storage(storage.url).write("d/b", b"", writer)
    assert storage.names("d") == ["a", "b"]


# Which URLs are opened.


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd", "PIPE:ls", " pipe:ls", "pipe://ls", "exec:ls", "shell:ls",
        "simplecache::s3://bucket/x", "zip://a::/tmp/b.zip", "filecache::pipe:ls", "cache::x",
    ],
)  # fmt: skip
def test_commands_and_chains_are_refused(url):
    with pytest.raises(ConfigError, match="refused"):
        check_url(url)
    with pytest.raises(ConfigError, match="refused"):
        Storage(url)


@pytest.mark.parametrize("url", ["cache", "/data/cache", "./a:b", "s3://bucket/prefix", "hf://datasets/a/b", "C:/x"])
def test_plain_folders_and_urls_are_taken(url):
    check_url(url)


def test_local_roots_are_absolute_whatever_they_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    urls = ["cache", "./cache", "~/cache", f"file://{tmp_path}/cache", f"{tmp_path}/a/../cache"]
    assert {Storage(url).url for url in urls} == {str(tmp_path / "cache")}


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(ConfigError, match="nosuch"):
        Storage("nosuch://bucket/x").names("")


def test_a_missing_package_is_named(monkeypatch):
    def without_package(url, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_package)
    with pytest.raises(ConfigError, match=r"s3://bucket.*Install s3fs"):
        Storage("s3://bucket").read("x")


# Many files, many threads.


def test_files_are_let_go_but_never_under_a_reader(tmp_path):
    """A descriptor closed too early gives EBADF, or the bytes of whatever file was given its number next."""
    names = [f"{number}.bin" for number in range(OPEN_FILES + 40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode().ljust(64))
    storage = Storage(str(tmp_path))

    def read(seed: int) -> int:
        rng = random.Random(seed)
        chosen = rng.choices(names, k=2000)
        return sum(storage.read_range(name, 0, 64) != name.encode().ljust(64) for name in chosen)

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(read, range(8))) == 0
    assert count_open(tmp_path) == OPEN_FILES


def test_a_storage_that_is_dropped_closes_its_files(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    storage = Storage(str(tmp_path))
    storage.read_range("file", 0, 1)
    assert count_open(tmp_path) == 1
    del storage
    assert count_open(tmp_path) == 0


def count_open(folder: Path) -> int:
    descriptors = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            descriptors.append(os.readlink(link))
        except FileNotFoundError:  # that of the listing itself
            continue
    return sum(target.startswith(f"{folder}/") for target in descriptors)


# Writing.


def test_readers_see_the_old_or_the_new_file_and_nothing_between(tmp_path):
    path, done, seen = tmp_path / "file", threading.Event(), set()
    texts = [letter * size for letter, size in ((b"a", 300_000), (b"b", 200_000), (b"c", 400_000))]
    path.write_bytes(texts[0])

    def watch() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    readers = [threading.Thread(target=watch) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(60):
        write_atomically(path, texts[number % 3])
    done.set()
    for reader in readers:
        reader.join()
    assert seen <= set(texts)
    assert len(seen) > 1, "the readers slept through it"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        stat = os.fstat(descriptor)
        events.append("folder" if S_ISDIR(stat.st_mode) else f"{stat.st_size} bytes")
        fsync(descriptor)

    def record_replace(old: Path, new: Path) -> Path:
        events.append("name")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_atomically(tmp_path / "file", "12345")
    assert events == ["5 bytes", "name", "folder"]


# Locks.

HOLD = """
import sys
from pathlib import Path
from shared.storage import FileLock
lock = FileLock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


def start_holder(path: Path) -> tuple[subprocess.Popen[str], bool]:
    """Another process that tries to take a lock, and whether it could; it lives until its input ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    return holder, holder.stdout.readline() == "True\n"


def test_a_lock_is_one_process_s_until_it_dies(tmp_path):
    lock = FileLock(tmp_path / "lock")
    holder, taken = start_holder(lock.path)
    with holder:
        assert taken
        assert not lock.acquire()
        holder.kill()
    assert lock.acquire()
    other, taken = start_holder(lock.path)
    with other:
        assert not taken
        other.communicate()
    lock.release()
    assert lock.acquire()
    lock.release()


def test_waiting_for_a_lock_ends_when_it_is_free(tmp_path):
    path, order = tmp_path / "lock", []
    lock = FileLock(path)
    assert lock.acquire()

    def wait() -> None:
        with FileLock(path):
            order.append("taken")

    waiter = threading.Thread(target=wait)
    waiter.start()
    waiter.join(0.1)
    order.append("released")
    lock.release()
    waiter.join()
    assert order == ["released", "taken"]


# Canonical JSON.


def test_one_value_has_one_text_whatever_the_order_of_its_keys():
    value = {"b": [1, 2.5, None, True], "a": {"ä": "é 😀", "A": "\n"}}
    turned = {"a": {"A": "\n", "ä": "é 😀"}, "b": [1, 2.5, None, True]}
    assert canonical_json(value) == canonical_json(turned)
    assert canonical_json(value).decode() == '{"a":{"A":"\\n","ä":"é 😀"},"b":[1,2.5,null,true]}'
    assert json.loads(canonical_json(value)) == value


def test_a_digest_is_the_first_bytes_of_the_sha256():
    assert digest_of(["a", 1], 16) == hashlib.sha256(b'["a",1]').digest()[:16]


def test_nan_has_no_canonical_text():
    with pytest.raises(ValueError, match="JSON"):
        canonical_json([float("nan")])
