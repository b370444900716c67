"""Stores and writers: which keys are held and where, under which fingerprint, and what a dead writer leaves."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from shared import cache as cache_module
from shared.cache import Cache, Store, embedding_key, latent_key
from shared.errors import CacheError
from shared.shards import Location, Shard, ShardWriter, decode_array, write_index
from shared.storage import FileLock, Storage
from tests.conftest import ROOT

FINGERPRINT: dict[str, Any] = {
    "vae": {"weights": ["ab"], "config": {"act_fn": "silu"}},
    "dtype": "float32",
    "tiling": None,
}
LETTERS = "0123456789abcdef"


@pytest.fixture
def here(tmp_path) -> Cache:
    """An empty local cache."""
    return Cache(str(tmp_path / "cache"))


def array(number: int) -> np.ndarray:
    return np.full((2, 1, 2, 2), number, np.float16)


def make_part(folder: Path, numbers: dict[bytes, int], member: str = "moments.npy") -> Shard:
    writer = ShardWriter(folder)
    for key, number in numbers.items():
        writer.add(key, {member: array(number)}, tokens=number)
    return writer.finish()


def publish(cache: Cache, numbers: dict[bytes, int], kind: str = "latents", member: str = "moments.npy") -> Store:
    """A store of the cache with one more part, in which each key's array is filled with its number."""
    store = cache.store(kind, FINGERPRINT)
    with cache.writer() as folder:
        store.publish(make_part(folder, numbers, member))
    return store


def number_of(store: Store, key: bytes) -> int:
    return int(decode_array(store.read(key), "name").flat[0])


def files_of(cache: Cache) -> list[str]:
    """The files of a local cache, but for the locks that lie among the writers."""
    root = cache.storage.local()
    files = [path for path in root.rglob("*") if path.is_file() and not path.match("writers/.*")]
    return sorted(str(path.relative_to(root)) for path in files)


# Keys and fingerprints.


def test_a_latent_s_key_is_the_digest_of_what_it_depends_on():
    geometry = {"mirrored": False, "resize": [70, 104], "crop": [3, 4, 64, 96]}
    text = f'["latent","{"ab" * 32}",[0,2,4],{{"crop":[3,4,64,96],"mirrored":false,"resize":[70,104]}},1]'
    key = latent_key("ab" * 32, list(np.array([0, 2, 4])), geometry, 1)
    assert key == hashlib.sha256(text.encode()).digest()[:16]
    others = [
        latent_key("cd" * 32, [0, 2, 4], geometry, 1),
        latent_key("ab" * 32, [0, 2, 5], geometry, 1),
        latent_key("ab" * 32, [0, 4, 2], geometry, 1),
        latent_key("ab" * 32, [0, 2, 4], {**geometry, "mirrored": True}, 1),
        latent_key("ab" * 32, [0, 2, 4], geometry, 2),
    ]
    assert len({key, *others}) == 6
    assert key == latent_key("ab" * 32, [0, 2, 4], dict(reversed(geometry.items())), 1)


def test_an_embedding_s_key_is_the_digest_of_the_prompt_to_the_letter():
    assert embedding_key("a dög") == hashlib.sha256('["prompt","a dög"]'.encode()).digest()[:16]
    assert len({embedding_key(text) for text in ("", " ", "a dog", "a dog ", "A dog", "a  dog")}) == 6


def test_a_store_lies_under_the_digest_of_its_facts(here):
    facts = {"kind": "latents", "format_version": 1, **FINGERPRINT}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    store = publish(here, {bytes(16): 1})
    assert store.folder == f"latents/{hashlib.sha256(text).hexdigest()[:32]}"
    assert json.loads(here.storage.read(f"{store.folder}/fingerprint.json")) == facts


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "bfloat16"},
        {"tiling": {"height": 240}},
        {"vae": {"weights": ["cd"], "config": {"act_fn": "silu"}}},
        {"vae": {"weights": ["ab"], "config": {"act_fn": "relu"}}},
        {"vae": {"weights": ["ab"], "config": {"act_fn": "silu", "new": None}}},
        {"more": 1},
    ],
)
def test_any_changed_field_is_another_store(here, changed):
    known = publish(here, {bytes(16): 1})
    other = here.store("latents", {**FINGERPRINT, **changed})
    assert other.folder != known.folder
    assert other.find([bytes(16)]) == [-1]


def test_a_missing_field_and_another_kind_are_other_stores(here):
    fewer = {name: value for name, value in FINGERPRINT.items() if name != "tiling"}
    stores = [here.store("latents", FINGERPRINT), here.store("latents", fewer), here.store("images", FINGERPRINT)]
    assert len({store.fingerprint for store in stores}) == 3


def test_the_order_of_fields_is_no_fact(here):
    turned = {name: FINGERPRINT[name] for name in reversed(FINGERPRINT)}
    turned["vae"] = dict(reversed(FINGERPRINT["vae"].items()))
    publish(here, {bytes(16): 7})
    assert number_of(here.store("latents", turned), bytes(16)) == 7


# Finding keys.


def hard_keys(rng: random.Random, count: int) -> list[bytes]:
    """Keys with zero bytes at both ends, which numpy's byte strings drop, high bytes, and near neighbours."""
    ends = [b"", b"\0", b"\0\0\0", b"\xff", b"\x80", b"\0\x01", b"\x7f\0"]
    keys = {bytes(16), b"\xff" * 16, bytes(15) + b"\x01", b"\x01" + bytes(15), b"\x80" + bytes(15)}
    while len(keys) < count:
        first, last = rng.choice(ends), rng.choice(ends)
        keys.add(first + rng.randbytes(16 - len(first) - len(last)) + last)
        keys.add(bytes(15) + rng.randbytes(1))
        keys.add(rng.randbytes(1) + bytes(15))
    return sorted(keys)


def test_find_is_a_dictionary_of_the_first_part_by_name(here, tmp_path):
    """Twelve indexes that share many of their keys, published in any order, against a dict made of them by name."""
    rng = random.Random(0)
    keys = hard_keys(rng, 700)
    held, absent = keys[::2], keys[1::2]
    store, told = here.store("latents", FINGERPRINT), {}
    assert store.find(keys).tolist() == [-1] * len(keys)
    for _ in range(12):
        part = "".join(rng.choices(LETTERS, k=32))
        places = {key: Location(part, rng.randrange(10**9), rng.randrange(1, 10**6), rng.randrange(2**32))
                  for key in rng.sample(held, 60)}  # fmt: skip
        told[part] = places
        rows = [{"key": key, "member": member, "offset": place.offset, "size_bytes": place.size_bytes,
                 "crc32": place.crc32, "tokens": place.offset % 1000}
                for key, place in places.items() for member in ("json", "moments.npy")]  # fmt: skip
        for row in rows[::2]:
            row.update(offset=0, size_bytes=1, crc32=0)  # of the other member: never to be found
        write_index(tmp_path / "index", rows, {"part": part, "tar_size_bytes": 2 * 10**9})
        here.storage.publish(tmp_path / "index", f"{store.folder}/{part}.parquet")
        store.refresh()

        expected: dict[bytes, Location] = {}
        for _, places in sorted(told.items()):
            for key, place in places.items():
                expected.setdefault(key, place)
        for reader in (store, here.store("latents", FINGERPRINT)):
            rows_found = reader.find(keys)
            found = {key: reader.location(row) for key, row in zip(keys, rows_found, strict=True) if row >= 0}
            assert found == expected
            assert all(reader.tokens(row) == reader.location(row).offset % 1000 for row in rows_found if row >= 0)
    assert not set(absent) & set(expected)
    assert len(expected) < sum(map(len, told.values())), "no key was in two parts"


def test_find_takes_no_keys_and_the_same_key_twice(here):
    store = publish(here, {b"a" * 16: 1, b"b" * 16: 2})
    assert store.find([]).tolist() == []
    rows = store.find([b"b" * 16, b"a" * 16, b"b" * 16])
    assert rows[0] == rows[2] != rows[1]


def test_keys_that_differ_in_a_zero_at_the_end_are_two(here):
    store = publish(here, {b"k" * 15 + b"\0": 1, b"k" * 15 + b"\x01": 2, b"k" * 14 + b"\0\0": 3})
    assert number_of(store, b"k" * 15 + b"\0") == 1
    assert number_of(store, b"k" * 14 + b"\0\0") == 3
    assert store.find([b"k" * 14 + b"\0\x01"]) == [-1]


@pytest.mark.parametrize(
    ("kind", "member"),
    [("latents", "moments.npy"), ("images", "image.npy"), ("embeddings", "prompt_embeds.npy")],
)
def test_each_kind_of_store_finds_its_own_member(here, kind, member):
    assert number_of(publish(here, {bytes(16): 5}, kind, member), bytes(16)) == 5
    assert publish(here, {b"other member 16 ": 5}, kind, "other.npy").find([b"other member 16 "]) == [-1]


def test_a_key_that_is_not_held_is_named(here):
    store = publish(here, {bytes(16): 1})
    with pytest.raises(CacheError, match=f"does not hold {'ab' * 16}"):
        store.read(bytes.fromhex("ab" * 16))


# Looking again.


def test_refresh_reads_what_is_new_and_only_that(here, monkeypatch):
    publish(here, {b"a" * 16: 1})
    store = here.store("latents", FINGERPRINT)
    publish(here, {b"b" * 16: 2})
    assert store.find([b"b" * 16]) == [-1]
    read: list[str] = []
    read_file = Storage.read

    def record(storage: Storage, path: str) -> bytes:
        read.append(path)
        return read_file(storage, path)

    monkeypatch.setattr(Storage, "read", record)
    store.refresh()
    assert [number_of(store, key) for key in (b"a" * 16, b"b" * 16)] == [1, 2]
    assert len(read) == 1
    store.refresh()
    assert len(read) == 1


def test_an_index_counts_only_under_the_name_of_its_part(here):
    store = publish(here, {bytes(16): 1})
    (index,) = (name for name in here.storage.names(store.folder) if name.endswith(".parquet"))
    path = here.storage.local(f"{store.folder}/{index}")
    path.rename(path.with_name("ab" * 16 + ".parquet"))
    with pytest.raises(CacheError, match=f"{'ab' * 16}.parquet: is the index of part {index[:32]}"):
        here.store("latents", FINGERPRINT)


def test_a_refused_index_leaves_the_store_as_it_was(here):
    """The good index beside it is read at the next look, not lost to the failure of the first."""
    store = publish(here, {b"a" * 16: 1})
    publish(here, {b"b" * 16: 2})
    damaged = here.storage.local(f"{store.folder}/{'f' * 32}.parquet")
    damaged.write_bytes(b"no index")
    for _ in range(2):
        with pytest.raises(CacheError, match=r"f{32}\.parquet: not a shard index"):
            store.refresh()
    assert number_of(store, b"a" * 16) == 1
    damaged.unlink()
    store.refresh()
    assert number_of(store, b"b" * 16) == 2


def test_a_tar_without_its_index_is_not_there(here, tmp_path):
    """What a process leaves that dies between the two renames; publishing the part again completes it."""
    store = here.store("latents", FINGERPRINT)
    shard = make_part(tmp_path, {bytes(16): 1})
    here.storage.publish(shard.tar, f"{store.folder}/{shard.part}.tar")
    store.refresh()
    assert store.find([bytes(16)]) == [-1]
    assert number_of(publish(here, {bytes(16): 1}), bytes(16)) == 1
    assert len([name for name in files_of(here) if name.endswith(".tar")]) == 1


def test_the_tar_is_there_before_its_index(here, monkeypatch):
    order: list[str] = []
    publish_file = Storage.publish

    def record(storage: Storage, finished: Path, path: str) -> None:
        order.append(path)
        publish_file(storage, finished, path)

    monkeypatch.setattr(Storage, "publish", record)
    publish(here, {bytes(16): 1})
    assert [Path(path).suffix for path in order] == [".json", ".tar", ".parquet"]


def test_two_writers_of_equal_parts_both_succeed(here):
    first = publish(here, {bytes(16): 1})
    second = publish(here, {bytes(16): 1})
    assert number_of(first, bytes(16)) == number_of(second, bytes(16)) == 1
    assert len(files_of(here)) == 3  # fingerprint, tar, index


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="is a file"):
        Cache(str(tmp_path / "cache"))


# Writers.


def test_a_writer_s_folder_is_locked_while_it_lives_and_gone_after(here):
    with here.writer() as folder:
        assert folder.parent == here.storage.local("writers")
        assert not folder.name.startswith(".")
        assert not FileLock(folder / "lock").acquire()
        (folder / "unfinished.tar").write_bytes(b"x")
    assert not folder.exists()
    assert files_of(here) == []


def test_a_writer_that_fails_leaves_nothing(here):
    def fail() -> None:
        with here.writer() as folder:
            (folder / "unfinished.tar").write_bytes(b"x")
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        fail()
    assert files_of(here) == []


def test_a_living_writer_is_left_alone(here):
    with here.writer() as first:
        (first / "unfinished.tar").write_bytes(b"x")
        with here.writer() as second:
            assert first != second
            assert (first / "unfinished.tar").exists()
        assert (first / "unfinished.tar").exists()


DIE = """
import sys
import numpy as np
from shared.cache import Cache
from shared.shards import ShardWriter
cache = Cache(sys.argv[1])
store = cache.store("latents", {"dtype": "float32"})
with cache.writer() as folder:
    for number in range(2):
        writer = ShardWriter(folder)
        writer.add(bytes(16), {"moments.npy": np.full((2, 1, 2, 2), number, np.float16)})
        if number == 0:
            writer.finish()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_writer_that_is_killed_leaves_its_folder_to_the_next(here):
    """With one part that is finished and not yet published, and one that is not finished."""
    with subprocess.Popen(
        [sys.executable, "-c", DIE, here.url],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as writer:  # fmt: skip
        assert writer.stdout is not None
        folder = Path(writer.stdout.readline().strip())
        with here.writer():
            assert folder.is_dir(), "it lives"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    left = files_of(here)
    assert {Path(name).suffix for name in left} == {"", ".tar", ".parquet"}
    assert all(name.startswith(f"writers/{folder.name}/") for name in left), "unfinished files are nowhere else"
    assert here.store("latents", {"dtype": "float32"}).find([bytes(16)]) == [-1]
    with here.writer():
        assert not folder.exists()


def test_a_folder_without_a_name_is_removed_only_when_it_is_old(here, monkeypatch):
    """It has no name while its writer takes the lock, which is no time at all."""
    writers = here.storage.local("writers")
    for name in (".young", ".old"):
        (writers / name).mkdir(parents=True)
    young = time.time() - 60
    now = young + cache_module.STRANDED_SECONDS - 1
    monkeypatch.setattr(cache_module.time, "time", lambda: now)
    os.utime(writers / ".young", (young, young))
    os.utime(writers / ".old", (young - 10, young - 10))
    with here.writer():
        assert (writers / ".young").exists()
        assert not (writers / ".old").exists()


def test_files_among_the_writers_are_left_alone(here):
    """Such as the lock of sources.parquet."""
    writers = here.storage.local("writers")
    writers.mkdir(parents=True)
    for name in (".sources.lock", "stray"):
        (writers / name).touch()
    os.utime(writers / ".sources.lock", (0, 0))
    with here.writer():
        pass
    assert all((writers / name).exists() for name in (".sources.lock", "stray"))


def test_writers_that_come_and_go_at_once_do_not_disturb_each_other(here):
    """Each removes the dead while others are named, locked and removed beside it."""
    errors = []

    def come_and_go() -> None:
        try:
            for _ in range(40):
                with here.writer() as folder:
                    (folder / "file").write_bytes(b"x")
                    assert (folder / "file").read_bytes() == b"x"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files_of(here) == []


# Behind a URL.


def test_a_remote_cache_does_the_same_and_keeps_unfinished_files_here():
    fsspec.filesystem("memory").store.clear()
    remote = Cache("memory://bucket/cache")
    with remote.writer() as folder:
        store = remote.store("latents", FINGERPRINT)
        store.publish(make_part(folder, {b"a" * 16: 1, b"b" * 16: 2}))
    assert not folder.exists()
    again = Cache("memory://bucket/cache").store("latents", FINGERPRINT)
    assert [number_of(again, key) for key in (b"a" * 16, b"b" * 16)] == [1, 2]
    suffixes = sorted(Path(name).suffix for name in remote.storage.names(store.folder))
    assert suffixes == [".json", ".parquet", ".tar"]
    assert remote.storage.names("") == ["latents"]
