"""gc: what any version refers to stays, what is young or in use stays, the rest goes, the index before its tar."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from preprocess.gc import main
from preprocess.inventory import all_references
from preprocess.verify import main as verify
from shared.cache import Cache, embedding_key
from shared.errors import CacheError, ConfigError
from shared.shards import ShardWriter
from shared.storage import Storage
from tests.conftest import ROOT, run_command

DAY = 86400


@pytest.fixture
def collect(cache_copy, capsys):
    """Run gc on the copy; its lines."""

    def run(*flags: str) -> list[str]:
        capsys.readouterr()
        assert main([str(cache_copy), *flags]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def publish(cache: Path, store: Path, keys: list[bytes], days: float, member: str = "moments.npy") -> str:
    """Put a part of so many days into a store. Returns its path in the cache, without a suffix."""
    folder = cache / "build"
    folder.mkdir()
    shard = ShardWriter(folder)
    for key in keys:
        shard.add(key, {member: np.ones((2, 1, 2, 2), "f2")}, tokens=1)
    finished = shard.finish()
    store.mkdir(exist_ok=True, parents=True)
    for file in (finished.tar, finished.index):
        shutil.move(file, store / file.name)
        age(store / file.name, days)
    folder.rmdir()
    return f"{store.relative_to(cache)}/{finished.part}"


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def age_all(cache: Path, days: float) -> None:
    for path in cache.glob("*/*/*"):
        age(path, days)


def store_of(cache: Path, kind: str = "latents") -> Path:
    (folder,) = (cache / kind).iterdir()
    return folder


def files(cache: Path) -> set[str]:
    return {
        str(path.relative_to(cache)) for path in cache.glob("*/*/*") if path.suffix in (".tar", ".parquet", ".json")
    }


def test_references_are_all_keys_of_all_versions_and_prompts(cache):
    found = all_references(Cache(str(cache)))
    sizes = {folder.partition("/")[0]: len(keys) for folder, keys in found.items()}
    assert sizes == {"latents": 14, "embeddings": 10}
    prompts = next(keys for folder, keys in found.items() if folder.startswith("embeddings"))
    assert {embedding_key(text) for text in ("", "SQR a blue square", "SQR a red square")} <= prompts


def test_what_is_referred_to_stays_however_old(collect, cache_copy):
    age_all(cache_copy, 1000)
    before = files(cache_copy)
    assert collect("--delete") == ["nothing to remove: every part is referred to, or younger than 7 days"]
    assert files(cache_copy) == before
    assert verify([str(cache_copy)]) == 0


def test_a_dry_run_tells_and_removes_nothing(collect, cache_copy):
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16, b"y" * 16], days=8)
    before = files(cache_copy)
    lines = collect()
    size_bytes = sum((cache_copy / f"{path}{suffix}").stat().st_size for suffix in (".tar", ".parquet"))
    assert lines[0] == f"would remove: {path}: 2 keys, {size_bytes:,} bytes"
    assert lines[1] == "would remove 1 in all, 0.0 MB; give --delete to remove them"
    assert files(cache_copy) == before


def test_delete_removes_what_is_old_and_unreferenced(collect, cache_copy):
    before = files(cache_copy)
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16], days=8)
    young = publish(cache_copy, store_of(cache_copy), [b"y" * 16], days=6)
    shared_key = next(iter(all_references(Cache(str(cache_copy)))[str(store_of(cache_copy).relative_to(cache_copy))]))
    both = publish(cache_copy, store_of(cache_copy), [b"z" * 16, shared_key], days=1000)
    lines = collect("--delete")
    assert [line.split(":")[:2] for line in lines[:-1]] == [["removed", f" {path}"]]
    kept = {f"{part}{suffix}" for part in (young, both) for suffix in (".tar", ".parquet")}
    assert files(cache_copy) == before | kept
    assert verify([str(cache_copy)]) == 0


def test_the_grace_period_is_a_flag(collect, cache_copy):
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16], days=2)
    assert len(collect("--older_than", "2.5")) == 1
    assert collect("--older_than", "1.5")[0].startswith(f"would remove: {path}:")


def test_the_younger_of_its_two_files_counts(collect, cache_copy):
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16], days=9)
    age(cache_copy / f"{path}.parquet", 1)
    assert collect("--delete")[0].startswith("nothing to remove")


@pytest.mark.parametrize("days", ["-1", "nan", "inf"])
def test_other_grace_periods_are_refused(cache, days):
    with pytest.raises(ConfigError, match="--older_than"):
        main([str(cache), f"--older_than={days}"])


def test_an_old_version_keeps_what_it_refers_to(collect, cache_copy):
    """Not only the current one: a checkpoint may name it."""
    (cache_copy / "datasets/squares/CURRENT").unlink()
    age_all(cache_copy, 1000)
    assert collect("--delete")[0].startswith("nothing to remove")


def test_a_data_set_that_is_gone_frees_its_parts_and_stores(collect, cache_copy):
    shutil.rmtree(cache_copy / "datasets/squares")
    age_all(cache_copy, 8)
    told = [line.partition(", ")[0].partition(": ")[2] for line in collect("--delete")[:-1]]
    latents, embeddings = (store_of(cache_copy, kind) if any((cache_copy / kind).iterdir()) else None
                           for kind in ("latents", "embeddings"))  # fmt: skip
    assert [line.partition(":")[2] for line in told] == [" 14 keys", " an empty store", " 10 keys", " an empty store"]
    assert (latents, embeddings) == (None, None)


def test_an_empty_store_stays_while_it_is_young_or_referred_to(collect, cache_copy):
    for name, days in (("ab" * 16, 8), ("cd" * 16, 6)):
        store = cache_copy / "latents" / name
        store.mkdir()
        (store / "fingerprint.json").write_text("{}")
        age(store / "fingerprint.json", days)
    for path in store_of_data_set(cache_copy).glob("*.[tp]a*"):  # its tar and its index
        path.unlink()
    age(store_of_data_set(cache_copy) / "fingerprint.json", 1000)
    collect("--delete")
    assert not (cache_copy / "latents" / ("ab" * 16)).exists()
    assert (cache_copy / "latents" / ("cd" * 16)).exists()
    assert store_of_data_set(cache_copy).exists()


def store_of_data_set(cache: Path) -> Path:
    (info,) = cache.glob("datasets/squares/versions/*/dataset.json")
    return cache / "latents" / json.loads(info.read_text(encoding="utf-8"))["fingerprints"]["latents"]


def test_a_part_whose_index_is_damaged_is_kept(collect, cache_copy):
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16], days=8)
    (cache_copy / f"{path}.parquet").write_bytes(b"damaged")
    age(cache_copy / f"{path}.parquet", 8)
    lines = collect("--delete")
    assert lines[0].startswith(f"kept: {path}: its keys are not known")
    assert (cache_copy / f"{path}.tar").exists()


@pytest.mark.parametrize("name", ["dataset.json", "samples.parquet"])
def test_nothing_goes_while_a_version_cannot_be_read(cache_copy, name):
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16], days=8)
    (damaged,) = cache_copy.glob(f"datasets/squares/versions/*/{name}")
    damaged.write_bytes(b"damaged")
    for flags in ([], ["--delete"]):
        with pytest.raises(CacheError):
            main([str(cache_copy), *flags])
    assert (cache_copy / f"{path}.tar").exists()


# Beside others.


def test_delete_is_refused_beside_a_live_writer(cache_copy, collect):
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16], days=8)
    code = (
        "import sys\nfrom shared.cache import Cache\n"
        f"with Cache({str(cache_copy)!r}).writer():\n    print('writing', flush=True)\n    sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        done = run_command("-m", "preprocess.gc", str(cache_copy), "--delete")
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"error: {cache_copy}: a writer is at work in it; try again when it has finished"
        ]
        assert collect()[0].startswith(f"would remove: {path}:")  # dry, it disturbs nobody
        writer.kill()
    assert collect("--delete")[0].startswith(f"removed: {path}:")  # its lock died with it


def test_two_writers_work_beside_each_other(cache_copy):
    cache = Cache(str(cache_copy))
    with cache.writer() as one, cache.writer() as two:
        assert one != two
        with pytest.raises(CacheError, match="a writer is at work"), cache.without_writers():
            pass
    with cache.without_writers():
        pass


def test_a_writer_that_comes_while_gc_deletes_waits_for_it(cache_copy):
    cache, order = Cache(str(cache_copy)), []

    def write() -> None:
        with Cache(str(cache_copy)).writer():
            order.append("writer")

    with cache.without_writers():
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.3)
        order.append("gc")
    thread.join()
    assert order == ["gc", "writer"]


def test_the_index_goes_before_the_tar(collect, cache_copy, monkeypatch):
    path = publish(cache_copy, store_of(cache_copy), [b"x" * 16], days=8)
    removed, remove = [], Storage.remove

    def watched(self, path):
        removed.append(path)
        remove(self, path)

    monkeypatch.setattr(Storage, "remove", watched)
    collect("--delete")
    assert removed == [f"{path}.parquet", f"{path}.tar"]


def test_a_remote_cache_is_told_of_but_not_deleted_from(cache, capsys):
    system = fsspec.filesystem("memory")
    system.put(str(cache), "/gc/cache", recursive=True)
    system.rm("/gc/cache/datasets/squares", recursive=True)
    assert main(["memory://gc/cache", "--older_than", "0"]) == 0
    assert "would remove 4 in all" in capsys.readouterr().out
    with pytest.raises(CacheError, match="--delete needs a local cache"):
        main(["memory://gc/cache", "--delete"])
