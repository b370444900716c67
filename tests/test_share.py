"""Workers that share a run: together they make the data set that one alone makes, whatever happens to them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from preprocess.__main__ import main
from preprocess.inventory import all_references
from preprocess.merge import main as merge
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, UserError
from tests.conftest import ROOT
from tests.decoding import use_stand_ins
from tests.ten_clips import COUNT, SIZE, facts, words, write_manifest
from tests.test_preprocess import Opened, preprocess


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """The ten clips."""
    return write_manifest(tmp_path_factory.mktemp("shared clips"))


def work(cache, model, manifest, index, workers, *flags):
    """Run one of the workers in this process."""
    return main(words(cache, model, manifest, "--num_workers", workers, "--worker_index", index, *flags))


@pytest.fixture
def alone(tiny_2b, manifest, tmp_path, monkeypatch):
    """What one worker alone makes."""
    use_stand_ins(monkeypatch)
    assert main(words(tmp_path / "alone", tiny_2b, manifest)) == 0
    return facts(tmp_path / "alone")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_three_workers_make_the_data_set_of_one(alone, tiny_2b, manifest, tmp_path, order, capsys):
    cache = tmp_path / "cache"
    for place, index in enumerate(order):
        assert work(cache, tiny_2b, manifest, index, 3) == 0
        assert (cache / "datasets/squares/CURRENT").exists() == (place == 2), "the last one publishes"
    assert facts(cache) == alone
    assert "is handed over; not there yet: 1, 2" in capsys.readouterr().out or order[0] == 2
    opened = Opened(cache, "squares")
    assert all(opened.array(row, kind).size for row in opened.rows for kind in ("latent", "embedding"))


def test_more_workers_than_clips_leave_empty_shares(alone, tiny_2b, manifest, tmp_path):
    cache = tmp_path / "cache"
    for index in range(30):
        assert work(cache, tiny_2b, manifest, index, 30) == 0
    assert facts(cache) == alone


def test_a_worker_opens_only_its_own_videos(tiny_2b, manifest, tmp_path, monkeypatch):
    from tests.decoding import InProcessPool

    use_stand_ins(monkeypatch)
    probed = []
    for index in range(3):
        monkeypatch.setattr(InProcessPool, "probed", [])
        assert work(tmp_path / "cache", tiny_2b, manifest, index, 3) == 0
        probed.append({os.path.basename(path) for path in InProcessPool.probed})
    assert sorted(name for names in probed for name in names) == sorted(f"{number}.mp4" for number in range(COUNT))
    assert all(probed)


def test_merging_again_makes_the_same_version(alone, tiny_2b, manifest, tmp_path, capsys):
    cache = tmp_path / "cache"
    for index in range(2):
        assert work(cache, tiny_2b, manifest, index, 2) == 0
    shutil.rmtree(cache / "datasets/squares/versions")
    assert merge([str(cache), "--dataset", "squares"]) == 0
    assert facts(cache) == alone
    assert merge([str(cache), "--dataset", "squares"]) == 0
    assert facts(cache) == alone
    assert f"version {alone[0][:12]}" in capsys.readouterr().out


def test_a_missing_share_is_named(tiny_2b, manifest, tmp_path, monkeypatch):
    use_stand_ins(monkeypatch)
    cache = tmp_path / "cache"
    assert work(cache, tiny_2b, manifest, 1, 3) == 0
    with pytest.raises(CacheError, match=r"lacks the shares of --worker_index 0, 2 of --num_workers 3"):
        merge([str(cache), "--dataset", "squares"])
    with pytest.raises(CacheError, match="holds no shares of a data set 'others'"):
        merge([str(cache), "--dataset", "others"])
    assert work(cache, tiny_2b, manifest, 0, 4) == 0
    with pytest.raises(CacheError, match="shares of runs of 3 and 4 workers; say which"):
        merge([str(cache), "--dataset", "squares"])


def test_shares_of_other_flags_or_another_manifest_are_not_mixed(alone, tiny_2b, manifest, tmp_path):
    cache, other = tmp_path / "cache", tmp_path / "m.jsonl"
    other.write_text(manifest.read_text().replace("caption 3", "caption three"))
    assert work(cache, tiny_2b, manifest, 0, 2, "--id_token", "NEW") == 0
    assert work(cache, tiny_2b, manifest, 1, 2) == 0
    assert not (cache / "datasets/squares/CURRENT").exists()
    with pytest.raises(CacheError, match=r"the shares of --worker_index 1 are of another manifest, "):
        merge([str(cache), "--dataset", "squares"])
    root = ("--instance_data_root", manifest.parent)
    assert work(cache, tiny_2b, other, 0, 2, *root) == 0
    assert not (cache / "datasets/squares/CURRENT").exists()
    assert work(cache, tiny_2b, manifest, 0, 2, "--vae_batch_size", "2") == 0  # a machine's own affair
    assert facts(cache) == alone


def test_strict_and_all_rejected_are_told_at_the_merge(tiny_2b, manifest, tmp_path, monkeypatch):
    use_stand_ins(monkeypatch)
    assert work(tmp_path / "cache", tiny_2b, manifest, 0, 2, "--strict") == 0
    with pytest.raises(UserError, match=r"2 of 12 clips were rejected, the first 4\.mp4: too_short"):
        work(tmp_path / "cache", tiny_2b, manifest, 1, 2, "--strict")
    assert not (tmp_path / "cache/datasets/squares/CURRENT").exists()


def test_what_a_share_refers_to_is_not_garbage(tiny_2b, manifest, tmp_path, monkeypatch):
    use_stand_ins(monkeypatch)
    cache = tmp_path / "cache"
    assert work(cache, tiny_2b, manifest, 0, 2, "--validation_prompt", "a square") == 0
    held = all_references(Cache(str(cache)))
    parts = [path for path in cache.rglob("*.parquet") if path.parent.parent.name in ("latents", "embeddings")]
    keys = {key for path in parts for key in pq.read_table(path)["key"].to_pylist()}
    assert keys == set().union(*held.values())


def test_a_damaged_share_is_one_line(tiny_2b, manifest, tmp_path, monkeypatch):
    use_stand_ins(monkeypatch)
    cache = tmp_path / "cache"
    for index in range(2):
        assert work(cache, tiny_2b, manifest, index, 2) == 0
    path = cache / "datasets/squares/parts/1-of-2.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CacheError, match=r"1-of-2\.parquet: not a share \(.*\); run its worker again"):
        merge([str(cache), "--dataset", "squares"])
    assert work(cache, tiny_2b, manifest, 0, 2) == 0, "another worker is not hindered"


@pytest.mark.slow
def test_three_workers_of_which_one_is_killed_and_rerun_make_the_data_set_of_one(tiny_2b, manifest, tmp_path):
    preprocess(tmp_path / "alone", tiny_2b, manifest, size=[*SIZE, "--shard_size", "2"])
    cache = tmp_path / "cache"

    def start(index):
        flags = words(cache, tiny_2b, manifest, "--num_workers", 3, "--worker_index", index)
        return subprocess.Popen([sys.executable, "-m", "preprocess", *flags], cwd=ROOT, stdout=subprocess.DEVNULL)

    first = [start(index) for index in range(3)]
    deadline = time.monotonic() + 120
    while not list(cache.glob("latents/*/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first[1].send_signal(signal.SIGKILL)
    assert [worker.wait() for worker in first] in ([0, -signal.SIGKILL, 0], [0, 0, 0])
    assert start(1).wait() == 0
    assert facts(cache) == facts(tmp_path / "alone")
    assert open_dataset(Cache(str(cache)), "squares").digest == Opened(tmp_path / "alone", "squares").dataset.digest
