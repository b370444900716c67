"""Whatever ends a run, what was published stays, nothing unfinished is seen, and the next run makes just the rest."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from preprocess import pipeline
from preprocess.__main__ import main
from preprocess.config import PreprocessConfig
from preprocess.sources import known_sources
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, run_command
from shared.shards import decode_array, read_index
from shared.storage import Storage
from tests.conftest import ROOT
from tests.decoding import use_stand_ins
from tests.test_preprocess import Opened, preprocess

SIZE = ["--height", "32", "--width", "48", "--max_num_frames", "9"]
ARRAYS = ("moments.npy", "prompt_embeds.npy")


def entries(cache: Path) -> list[str]:
    """All files of a cache, but for locks that stay."""
    found = (path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())
    return sorted(path for path in found if path not in ("writers/.in_use", "writers/.sources.lock"))


def indexes(cache: Path) -> list[Path]:
    return sorted(path for kind in ("latents", "images", "embeddings") for path in cache.glob(f"{kind}/*/*.parquet"))


def read_all(cache: Path) -> dict[str, np.ndarray]:
    """Every array of every published part, by member name; checks that parts are whole and hold no key twice."""
    arrays: dict[str, np.ndarray] = {}
    for index in indexes(cache):
        table, facts = read_index(index.read_bytes(), index.name)
        tar = index.with_suffix(".tar").read_bytes()
        assert hashlib.sha256(tar).hexdigest() == facts["tar_sha256"]
        for row in table.to_pylist():
            name = f"{row['key'].hex()}.{row['member']}"
            if row["member"] in ARRAYS:
                assert name not in arrays, "what is published is not encoded again"
                arrays[name] = decode_array(tar[row["offset"] :][: row["size_bytes"]], name)
    return arrays


VERSION = {"dataset.json", "samples.parquet", "rejected.parquet", "report.json"}


def assert_nothing_is_unfinished(cache: Path) -> None:
    """Each file is in its place, under its final name and whole; `writers/` may hold what a dead writer left."""
    if not cache.exists():
        return
    read_all(cache)
    for path in entries(cache):
        first, *rest = path.split("/")
        name = rest[-1] if rest else first
        if first == "writers" or path == "sources.parquet":
            continue
        if first == "datasets":
            assert name in {"CURRENT", "preview.html", *VERSION}, path
        elif name.endswith(".tar"):  # also one whose index was not published any more
            assert hashlib.sha256((cache / path).read_bytes()).hexdigest().startswith(name.removesuffix(".tar")), path
        else:
            assert name == "fingerprint.json" or (cache / path).with_suffix(".tar").exists(), path
    for current in cache.glob("datasets/*/CURRENT"):
        open_dataset(Cache(str(cache)), current.parent.name)
    for version in cache.glob("datasets/*/versions/*"):
        assert {*os.listdir(version)} - {"preview.html"} == VERSION  # the page comes after


def assert_same_arrays(cache: Path, whole: dict[str, np.ndarray]) -> None:
    arrays = read_all(cache)
    assert arrays.keys() == whole.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, whole[name])


# -- a disk that is full ----------------------------------------------------------------------------------------------


class FullDisk:
    """Fails the `fatal`-th time that a file is flushed, renamed, made or published, and from then on each time."""

    def __init__(self, patch: pytest.MonkeyPatch, fatal: int, *, once: bool = False) -> None:
        self.calls, self.fatal, self.once = 0, fatal, once
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (Storage, "publish")):
            patch.setattr(owner, name, self._failing(getattr(owner, name)))

    def _failing(self, call):
        @functools.wraps(call)
        def failing(*arguments, **options):
            self.calls += 1
            if self.calls == self.fatal or (self.calls > self.fatal and not self.once):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            return call(*arguments, **options)

        return failing

    @property
    def has_failed(self) -> bool:
        return self.calls >= self.fatal


@pytest.fixture
def quick(monkeypatch):
    use_stand_ins(monkeypatch)


@pytest.fixture
def two_clips(clips, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for number in (0, 1):
        for suffix in ("mp4", "txt"):
            shutil.copy2(clips / f"{number}.{suffix}", folder)
    return folder


@contextmanager
def refused_when(is_refused):
    try:
        yield
    except CacheError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert ("its disk is full" in refusal) == is_refused()


@pytest.mark.parametrize("once", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["for_good", "for_a_moment"])
def test_a_disk_that_fills_up_at_any_point_loses_nothing(quick, tiny_2b, two_clips, tmp_path, once):
    def run(cache):
        size: dict[str, Any] = {"height": 32, "width": 48, "max_num_frames": 9, "shard_size": 2}
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(tiny_2b), "dataset_name": str(two_clips)}
        outcome = pipeline.preprocess(PreprocessConfig(cache=str(cache), **source, **size))
        assert not outcome.rejected
        return outcome.digest

    digest = run(tmp_path / "whole")
    arrays = read_all(tmp_path / "whole")
    fatal = 0
    while True:
        fatal += 1
        cache = tmp_path / f"cache{fatal}"
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, fatal, once=once)
            with suppress(CacheError) if once else refused_when(lambda: disk.has_failed):  # noqa: B023
                run(cache)
        assert_nothing_is_unfinished(cache)
        if not disk.has_failed:
            break
        assert run(cache) == digest
        assert_same_arrays(cache, arrays)
        assert entries(cache) == entries(tmp_path / "whole")
        shutil.rmtree(cache)
    assert fatal > 30


def test_a_full_disk_is_one_line_and_status_2(quick, tiny_2b, two_clips, tmp_path, capsys, monkeypatch):
    FullDisk(monkeypatch, 12)
    flags = ["--cache", tmp_path / "cache", "--pretrained_model_name_or_path", tiny_2b, "--dataset_name", two_clips]
    with pytest.raises(SystemExit) as end:
        run_command(main, [str(flag) for flag in (*flags, *SIZE)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        f"error: {tmp_path}/cache: its disk is full (No space left on device); make room and run the same command "
        "again: what was published stays"
    )


# In a mount namespace of its own, with 200 kB: run, make room, run again.
REAL_DISK = """
mount -t tmpfs -o size=200k none "$0" || exit 77
"$@"; echo "status $?"
find "$0/cache/writers" -type f ! -name '.*' | sed 's/^/left /'
mount -o remount,size=64m "$0"
"$@"; echo "status $?"
cp -r "$0/cache" "$0.copy"
"""


@pytest.mark.slow
def test_a_disk_that_is_full_indeed(tiny_2b, clips, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = stage_1(disk / "cache", tiny_2b, clips, "--random_flip", "0.5", "--shard_size", "2")
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", REAL_DISK, disk, *command],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("status", "left"))] == ["status 2", "status 0"], done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "its disk is full" in line
    assert "Traceback" not in done.stderr
    assert len(read_all(tmp_path / "disk.copy")) == 14 + 8
    assert_nothing_is_unfinished(tmp_path / "disk.copy")


# -- readers ----------------------------------------------------------------------------------------------------------


def test_a_reader_never_sees_what_is_not_complete(quick, tiny_2b, two_clips, tmp_path):
    cache = tmp_path / "cache"
    done, looks, faults = threading.Event(), [], []

    def look():
        while not done.is_set():
            for index in indexes(cache):
                _, facts = read_index(index.read_bytes(), index.name)
                assert index.with_suffix(".tar").stat().st_size == facts["tar_size_bytes"]
                assert index.with_name("fingerprint.json").exists()
                looks.append(index.name)
            for current in cache.glob("datasets/*/CURRENT"):
                dataset = open_dataset(Cache(str(cache)), current.parent.name)
                for row in dataset.columns("latent_part", "embedding_part").to_pylist():
                    for kind, part in (("latent", row["latent_part"]), ("embedding", row["embedding_part"])):
                        assert (cache / dataset.store_folder(kind) / f"{part}.parquet").exists()
                looks.append(dataset.digest)

    def watch():
        try:
            look()
        except BaseException as error:
            faults.append(error)

    reader = threading.Thread(target=watch)
    reader.start()
    try:
        for number in range(6):
            (two_clips / "1.txt").write_text(f"caption number {number // 2}")  # each version is published twice
            preprocess(cache, tiny_2b, two_clips, "--shard_size", "1", "--id_token", f"T{number // 2}", size=SIZE)
    finally:
        done.set()
        reader.join()
    assert not faults, faults
    assert len(set(looks)) > 8


# -- signals ----------------------------------------------------------------------------------------------------------


def stage_1(cache, model, manifest, *flags, dataset="squares"):
    words = [sys.executable, "-m", "preprocess", "--cache", cache, "--dataset", dataset, *SIZE, "--shard_size", "2"]
    words += ["--pretrained_model_name_or_path", model, "--dataset_name", manifest, *flags]
    return [str(word) for word in words]


class Run:
    """Stage 1 in a process of its own."""

    def __init__(self, *arguments, **options) -> None:
        self.process = subprocess.Popen(
            stage_1(*arguments, **options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, happened) -> bool:
        """Wait until `happened()`; False when the run has ended before."""
        while not happened():
            if self.process.poll() is not None:
                self.output, _ = self.process.communicate()
                return False
            time.sleep(0.002)
        return True

    def kill(self, number: signal.Signals) -> list[psutil.Process]:
        """Send it a signal, wait for its end, and return the children that it had."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self.process.send_signal(number)
        self.output, _ = self.process.communicate(timeout=60)
        return children

    def finish(self) -> None:
        self.output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, self.output


def are_gone(processes) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("number", "status", "pattern"),
    [
        (signal.SIGTERM, 143, "writers/*-*"),
        (signal.SIGINT, 130, "writers/*-*"),
        pytest.param(signal.SIGTERM, 143, "latents/*/*.parquet", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "embeddings/*/*.parquet", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_in_order(tiny_2b, clips, tmp_path, number, status, pattern):
    cache = tmp_path / "cache"
    run = Run(cache, tiny_2b, clips, "--random_flip", "0.5")
    assert run.wait_for(lambda: list(cache.glob(pattern)) and psutil.Process(run.process.pid).children()), run.output
    children = run.kill(number)
    assert run.process.returncode == status
    assert "Traceback" not in run.output
    assert children
    assert are_gone(children)
    assert os.listdir(cache / "writers") == [name for name in os.listdir(cache / "writers") if name.startswith(".")]
    assert_nothing_is_unfinished(cache)
    assert len(indexes(cache)) >= len(list(cache.glob(pattern))) - 1, "what was published stays"
    assert (cache / "sources.parquet").exists() or not indexes(cache), "what was learnt is kept"


def sizes_of(cache: Path) -> dict[str, int]:
    sizes = {}
    for folder, _, names in os.walk(cache):
        for name in names:
            with suppress(FileNotFoundError):
                sizes[f"{folder}/{name}"] = os.stat(f"{folder}/{name}").st_size
    return sizes


def events_of(cache: Path):
    """A function that tells how often the files of a cache have changed since now."""
    seen = sizes_of(cache)
    count = 0

    def events() -> int:
        nonlocal seen, count
        now = sizes_of(cache)
        count += sum(now.get(path) != seen.get(path) for path in now.keys() | seen.keys())
        seen = now
        return count

    return events


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_lose_nothing(tiny_2b, clips, tmp_path):
    """Killed and started again until 20 kills are done; whenever the data set is complete, a new cache is begun."""
    flags = ("--random_flip", "0.5")
    Run(tmp_path / "whole", tiny_2b, clips, *flags).finish()
    whole = read_all(tmp_path / "whole")
    digest = Opened(tmp_path / "whole", "squares").dataset.digest
    rng = random.Random(0)
    kills, complete, dead = 0, 0, set[str]()
    while kills < 20 or dead:
        cache = tmp_path / f"cache{complete}"
        before = read_all(cache).keys() if cache.exists() else set()
        run = Run(cache, tiny_2b, clips, *flags)
        events, instant = events_of(cache), rng.randint(1, 60)
        if kills < 20 and run.wait_for(lambda: events() >= instant):  # noqa: B023
            time.sleep(rng.uniform(0, 0.05))
            children = run.kill(signal.SIGKILL)
            assert are_gone(children)
            kills += run.process.returncode == -signal.SIGKILL
        else:
            run.finish()
        assert_nothing_is_unfinished(cache)
        assert read_all(cache).keys() >= before, "what was published stays"
        left = {name for name in os.listdir(cache / "writers") if not name.startswith(".")}
        assert not left & dead, "a dead writer's folder goes with the next run"
        assert len(left) <= 1
        dead = left
        if run.process.returncode == 0:
            assert Opened(cache, "squares").dataset.digest == digest
            assert_same_arrays(cache, whole)
            assert entries(cache) == entries(tmp_path / "whole")
            complete, dead = complete + 1, set()
    assert kills == 20
    assert complete >= 2


# -- two writers ------------------------------------------------------------------------------------------------------

# Stage 1 again and again in one process: a line of flags in, a line with its status out.
SERVER = """
import json, sys
import diffusers, torch, transformers
from diffusers import AutoencoderKLCogVideoX
from preprocess.__main__ import main

torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    print("status", main(json.loads(line)), flush=True)
"""


@pytest.fixture
def writers():
    """Two processes that run stage 1 when they are told."""
    servers = [
        subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    for server in servers:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
    yield servers
    for server in servers:
        server.kill()
        server.communicate()


def status_of(server) -> str:
    for line in server.stdout:
        if line.startswith("status"):
            return line.split()[1]
    return server.stderr.read()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_writers_at_once_both_succeed(writers, tiny_2b, clips, tmp_path):
    rows = [{"video": f"{number}.mp4", "caption": f"a square of colour number {number}"} for number in range(7)]
    for name, chosen in {"a": rows[:5], "b": rows[:1:-1]}.items():
        (clips / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    try:
        Run(tmp_path / "whole", tiny_2b, clips / "a.jsonl", dataset="a").finish()
        Run(tmp_path / "whole", tiny_2b, clips / "b.jsonl", dataset="b").finish()
        digests = {name: Opened(tmp_path / "whole", name).dataset.digest for name in "ab"}
        whole = read_all(tmp_path / "whole")
        for number in range(10):
            cache = tmp_path / f"cache{number}"
            names = "aa" if number % 2 else "ab"
            for server, name in zip(writers, names, strict=True):
                argv = stage_1(cache, tiny_2b, clips / f"{name}.jsonl", "--dataloader_num_workers", "1", dataset=name)
                server.stdin.write(json.dumps(argv[3:]) + "\n")
                server.stdin.flush()
            assert [status_of(server) for server in writers] == ["0", "0"]
            assert_cache_agrees(cache, whole, {name: digests[name] for name in names})
    finally:
        for name in "ab":
            (clips / f"{name}.jsonl").unlink()


def assert_cache_agrees(cache, whole, digests):
    """Every index and array can be read, those of a key that two writers made agree, and the data sets are right."""
    for index in indexes(cache):
        table, _ = read_index(index.read_bytes(), index.name)
        tar = index.with_suffix(".tar").read_bytes()
        for row in table.to_pylist():
            name = f"{row['key'].hex()}.{row['member']}"
            if row["member"] in ARRAYS:
                array = decode_array(tar[row["offset"] :][: row["size_bytes"]], name)
                np.testing.assert_allclose(array, whole[name], rtol=2e-3, atol=1e-5)
    for name, digest in digests.items():
        opened = Opened(cache, name)
        assert opened.dataset.digest == digest
        for row in opened.rows:
            for kind in ("latent", "embedding"):
                assert opened.array(row, kind).size
    assert not [name for name in os.listdir(cache / "writers") if not name.startswith(".")]
    sources = {row["source"] for name in digests for row in Opened(cache, name).rows}
    assert {Path(source.path).name for source in known_sources(Storage(str(cache)))} == sources
