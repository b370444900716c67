"""Reading ahead changes nothing but the time; what is wrong with a member names its sample, or is gone on without."""

import dataclasses
import gc
import random
import shutil
import subprocess
import sys
import threading
from contextlib import closing

import fsspec
import numpy as np
import pytest
import torch

from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, ConfigError, NetworkError
from shared.remote import Remote
from shared.shards import Location, read_index
from shared.storage import Storage
from tests.conftest import ROOT
from tests.damage import publish
from tests.test_data import damage, flip_last_bit, requests_of, same
from tests.training import column, rows_of, train_here
from train import members
from train.config import TrainConfig
from train.data import DrawSettings, micro_batches
from train.local_cache import LocalCache
from train.members import CheckedMembers
from train.objective import Batch
from train.reading import LatentDataset, Task, Tasks, collate, deliver
from train.sampler import Deal

DRAWS = DrawSettings(seed=3, global_batch=4, stratified=True, random_flip=0.5, caption_dropout=0.3)
PLAIN = dataclasses.replace(DRAWS, random_flip=0.0, caption_dropout=0.0)
ALONE = Deal(batch_size=1, ranks=1, accumulation=1)


@pytest.fixture
def remote_cache(cache):
    """The cache of the session, in fsspec's memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in sorted(file for file in cache.rglob("*") if file.is_file()):
        system.pipe_file(f"/lab/{path.relative_to(cache)}", path.read_bytes())
    yield "memory://lab"
    system.store.clear()


def read_all(reader, requests, workers=0):
    requests = list(requests)
    buckets = {request.bucket for micro in requests for request in micro}
    slot_bytes = reader.slot_bytes(buckets, len(requests[0])) if workers else 0
    found = micro_batches(reader, requests, num_workers=workers, pin_memory=False, slot_bytes=slot_bytes)
    with closing(found):  # copies: a worker's batch holds until the next is asked for
        return [batch._with_tensors(torch.clone) for batch in found]


def one_by_one(squares, facts, requests):
    reader = LatentDataset(squares, facts, DRAWS)
    return [collate([reader[request] for request in micro]) for micro in requests]


# --- reading ahead


@pytest.mark.parametrize(("prefetch", "workers"), [(1, 0), (3, 0), (64, 0), (5, 2)])
def test_whatever_is_read_ahead_the_batches_are_the_same(squares, facts, samples, prefetch, workers):
    requests = requests_of(samples, steps=range(5))
    found = read_all(LatentDataset(squares, facts, DRAWS, prefetch=prefetch), requests, workers)
    expected = one_by_one(squares, facts, requests)
    assert len(found) > 5
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert not any(batch.skipped for batch in found)


@pytest.mark.parametrize(("size", "readers", "prefetch"), [(1, 1, 1), (1, 1, 4), (1, 3, 5), (2, 2, 4), (4, 2, 1)])
def test_a_task_tells_what_its_reader_is_given_next(samples, size, readers, prefetch):
    micros = list(requests_of(samples, deal=Deal(size, 1, 1), steps=range(9)))
    tasks = list(Tasks(micros, readers, prefetch))
    depth = -(-prefetch // (2 * size))
    assert [task.requests for task in tasks] == micros
    for number, task in enumerate(tasks):
        later = micros[number + readers : number + readers * depth + 1 : readers]
        assert task.ahead == [request for micro in later for request in micro]


class Crowd:
    """Stands before `read_member` and lets readers through when as many wait as are expected, or none else comes."""

    def __init__(self, expected):
        self.expected, self.most, self.inside, self.order = expected, 0, 0, []
        self.changed = threading.Condition()
        self.through = members.read_member

    def __call__(self, storage, folder, location, **named):
        with self.changed:
            self.order.append(location)
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.expected, timeout=20)
        payload = self.through(storage, folder, location, **named)
        with self.changed:
            self.inside -= 1
        return payload


@pytest.mark.parametrize("prefetch", [1, 3, 6])
def test_as_many_reads_are_on_their_way_as_was_asked_for_and_no_more(squares, facts, samples, monkeypatch, prefetch):
    crowd = Crowd(prefetch)
    monkeypatch.setattr(members, "read_member", crowd)
    read_all(LatentDataset(squares, facts, DRAWS, prefetch=prefetch), requests_of(samples, deal=ALONE))
    assert crowd.most == prefetch


def test_members_are_read_in_order_of_need_and_each_once_a_visit(squares, facts, samples, monkeypatch):
    crowd = Crowd(1)
    monkeypatch.setattr(members, "read_member", crowd)
    requests = requests_of(samples, PLAIN, deal=ALONE, steps=range(6))
    read_all(LatentDataset(squares, facts, PLAIN, prefetch=1), requests)
    needed = [place for micro in requests for one in micro for place in (one.latent, one.embedding)]
    assert crowd.order == needed


def test_what_is_read_and_waits_is_bounded(squares, facts, samples):
    reader = LatentDataset(squares, facts, DRAWS, prefetch=4)
    for task in Tasks(requests_of(samples, deal=ALONE, steps=range(7)), 1, 4):
        reader.__getitems__(task)
        assert len(reader._reads) <= 6  # a micro-batch of two, and four ahead


def test_the_reading_threads_end_with_their_reader(squares, facts, samples):
    def alive():
        return [thread for thread in threading.enumerate() if thread.name == "range read"]

    gc.collect()
    before = alive()
    reader = LatentDataset(squares, facts, DRAWS, prefetch=3)
    reader[samples.request(0, 0, 0, 1.0, DRAWS)]
    ours = set(alive()) - set(before)
    assert len(ours) == 3
    del reader
    gc.collect()
    for thread in ours:
        thread.join(10)
        assert not thread.is_alive()


def test_a_read_that_hangs_keeps_no_process_from_ending():
    words = """
import threading
from train.reading import ReadPool
pool, begun = ReadPool(1), threading.Event()
pool.submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
"""
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT, timeout=60, check=False).returncode == 0


# --- what is checked


def test_the_checksum_is_compared_at_the_first_read_of_each_member(squares, facts, samples, monkeypatch):
    seen: dict[Location, list[bool]] = {}
    through = members.read_member

    def record(storage, folder, location, *, check):
        seen.setdefault(location, []).append(check)
        return through(storage, folder, location, check=check)

    monkeypatch.setattr(members, "read_member", record)
    reader = LatentDataset(squares, facts, PLAIN)
    for number in (0, 1, 0, 1, 0, 2):
        reader[samples.request(number, 0, 0, 1.0, PLAIN)]
    request = samples.request(0, 0, 0, 1.0, PLAIN)
    assert seen[request.latent] == seen[request.embedding] == [True, False, False]
    assert len(seen) == 6


def test_checked_members_are_remembered_as_a_set_would():
    rng, checked, expected = random.Random(0), CheckedMembers(), set()
    parts = [f"{rng.getrandbits(128):032x}" for _ in range(20)] + ["f" * 32, "0" * 32]
    locations = [Location(part, 512 * place, 100, 7) for part in parts for place in range(30)]
    for location in rng.choices(locations, k=900):
        assert (location in checked) == (location in expected)
        checked.add(location)
        expected.add(location)
        assert len(checked) == len(expected)
    assert all((location in checked) == (location in expected) for location in locations)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda array: array[:, :2], r"is float16 \[32, 2, 8, 12\]; the data set says float16 \[32, 3, 8, 12\]"),
        (lambda array: array.astype(np.float32), r"is float32 \[32, 3, 8, 12\]; the data set says float16 "),
    ],
)
def test_an_array_that_is_not_what_the_data_set_says_names_its_sample(cache_copy, facts, samples, change, told):
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    request = samples.request(0, 0, 0, 1.0, PLAIN)
    values = change(LatentDataset(dataset, facts, PLAIN)[request]["moments"])
    tar = publish(cache_copy, cache_copy / dataset.store_folder("latent"), {request.latent_key: values})
    index, _ = read_index(tar.with_suffix(".parquet").read_bytes(), "index")
    (row,) = index.to_pylist()
    location = Location(tar.stem, row["offset"], row["size_bytes"], row["crc32"])
    request = dataclasses.replace(request, latent=location)
    with pytest.raises(CacheError, match=rf"^sample {request.sample_id}, latent [0-9a-f]{{32}}: {told}"):
        LatentDataset(dataset, facts, PLAIN)[request]


def test_a_disk_that_fails_names_the_sample(squares, facts, samples, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Storage, "read_range", fail)
    request = samples.request(0, 0, 0, 1.0, PLAIN)
    with pytest.raises(CacheError, match=rf"^sample {request.sample_id}, latent .*Input/output error"):
        LatentDataset(squares, facts, PLAIN)[request]


def test_the_indexes_are_read_once_for_all_members_of_a_part_that_is_gone(cache_copy, facts, samples, monkeypatch):
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    folder = cache_copy / dataset.store_folder("latent")
    before = [LatentDataset(dataset, facts, PLAIN)[samples.request(n, 0, 0, 1.0, PLAIN)]["moments"] for n in range(7)]
    requests = [samples.request(number, 0, 0, 1.0, PLAIN) for number in range(7)]
    moments = {request.latent_key: array for request, array in zip(requests, before, strict=True)}
    publish(cache_copy, folder, moments)
    for suffix in ("tar", "parquet"):
        (folder / f"{requests[0].latent.part}.{suffix}").unlink()
    looks, whole = [], Cache.store

    def look(*args):
        looks.append(args)
        return whole(*args)

    monkeypatch.setattr(Cache, "store", look)
    reader = LatentDataset(dataset, facts, PLAIN)
    for _ in range(2):
        for request, array in zip(requests, before, strict=True):
            assert np.array_equal(reader[request]["moments"], array)
    assert len(looks) == 1


# --- samples that cannot be read


def damaged(cache, samples, number, kind):
    """Damage one member of a data set in a copy of the cache. Returns the data set and the sample's id."""
    dataset = open_dataset(Cache(str(cache)), "squares")
    request = samples.request(number, 0, 0, 1.0, PLAIN)
    damage(cache, getattr(request, kind), dataset.store_folder(kind), flip_last_bit)
    return dataset, request.sample_id


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["latent", "embedding"])
def test_a_bad_sample_is_skipped_by_name_and_all_others_are_as_they_were(cache_copy, facts, samples, kind, workers):
    requests = requests_of(samples, PLAIN, deal=Deal(2, 1, 1), steps=range(4))
    whole = read_all(LatentDataset(open_dataset(Cache(str(cache_copy)), "squares"), facts, PLAIN), requests)
    dataset, sample_id = damaged(cache_copy, samples, 0, kind)
    found = read_all(LatentDataset(dataset, facts, PLAIN, skip_bad=True), requests, workers)
    bad = 0
    for micro, one, other in zip(requests, whole, found, strict=True):
        told = []
        for place, request in enumerate(micro):
            if request.sample_id == sample_id:
                told.append(rf"sample {sample_id}, {kind} ")
                assert other.weights[place] == 0
                assert not other.moments[place].any()
                assert not other.prompt_embeds[place].any()
            else:
                assert other.weights[place] == one.weights[place]
                assert torch.equal(one.moments[place], other.moments[place])
                assert torch.equal(one.prompt_embeds[place], other.prompt_embeds[place])
        assert one.moments.dtype == other.moments.dtype
        assert one.moments.shape == other.moments.shape
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.timesteps, other.timesteps)
        assert len(other.skipped) == len(told)
        assert all(line.startswith(start) and "crc32" in line for line, start in zip(other.skipped, told, strict=True))
        bad += len(told)
    assert bad >= 1
    assert not any(batch.skipped for batch in whole)


def test_a_sample_that_is_gone_is_skipped_with_its_shape(cache_copy, facts, samples):
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    shutil.rmtree(cache_copy / dataset.store_folder("latent"))
    reader = LatentDataset(dataset, facts, PLAIN, skip_bad=True)
    batch = deliver(reader.__getitems__(Task([samples.request(0, 0, 0, 1.0, PLAIN)], [])))
    assert isinstance(batch, Batch)
    assert batch.moments.shape == (1, 32, 3, 8, 12)
    assert batch.moments.dtype == batch.prompt_embeds.dtype == torch.float16
    assert batch.weights.tolist() == [0]
    assert len(batch.skipped) == 1


def test_what_was_skipped_stays_with_a_batch_that_is_moved(cache_copy, facts, samples):
    dataset, sample_id = damaged(cache_copy, samples, 0, "latent")
    reader = LatentDataset(dataset, facts, PLAIN, skip_bad=True)
    batch = collate([reader[samples.request(number, 0, number, 1.0, PLAIN)] for number in (0, 1)])
    assert isinstance(batch, Batch)
    moved = batch.to(torch.device("cpu"))
    assert moved.skipped == batch.skipped
    assert sample_id in moved.skipped[0]
    assert moved.places == [0, 1]
    assert moved.weights.tolist() == [0, 1]


def test_a_network_that_is_down_is_no_bad_sample(remote_cache, facts, samples, monkeypatch):
    dataset = open_dataset(Cache(remote_cache), "squares")

    def down(self, path, operation, **named):
        raise NetworkError("no route")

    monkeypatch.setattr(Remote, "ask", down)
    request = samples.request(0, 0, 0, 1.0, PLAIN)
    with pytest.raises(NetworkError, match=rf"^sample {request.sample_id}, latent .*: no route"):
        LatentDataset(dataset, facts, PLAIN, skip_bad=True)[request]


def test_a_run_names_its_bad_sample_and_stops_or_goes_on(cache_copy, tiny_2b, samples, tmp_path, capsys):
    _, sample_id = damaged(cache_copy, samples, 0, "embedding")
    flags = {"pretrained_model_name_or_path": tiny_2b, "max_train_steps": 7}
    with pytest.raises(CacheError, match=f"^sample {sample_id}, embedding "):
        train_here(cache_copy, tmp_path / "stop", **flags)
    assert train_here(cache_copy, tmp_path / "skip", bad_samples="skip", **flags) == 0
    told = capsys.readouterr()
    assert told.err.count(f"left out of the mean: sample {sample_id}, embedding ") == 1
    assert told.err.count("no sample of it could be read; the step was skipped") == 1
    assert len(column(tmp_path / "skip", "loss")) == 7


def test_a_skipped_place_leaves_the_mean_of_the_others(cache_copy, tiny_2b, samples, tmp_path):
    """At learning rate 0, a batch of all seven: the gradient is that of the six that can be read, as is the loss."""
    flags = {"pretrained_model_name_or_path": tiny_2b, "max_train_steps": 2, "learning_rate": 0, "log_steps": 1}
    whole = {**flags, "train_batch_size": 1, "gradient_accumulation_steps": 5}
    train_here(cache_copy, tmp_path / "whole", **whole)
    before = rows_of(tmp_path / "whole")
    _, sample_id = damaged(cache_copy, samples, 0, "embedding")
    train_here(cache_copy, tmp_path / "skip", bad_samples="skip", **whole)
    after = rows_of(tmp_path / "skip")
    step = next(number for number, row in enumerate(before) if sample_id in row["samples"])
    left = [(name, loss) for name, loss in zip(before[step]["samples"], before[step]["losses"], strict=True)
            if name != sample_id]  # fmt: skip
    assert after[step]["samples"] == [name for name, _ in left]
    assert after[step]["loss"] == pytest.approx(sum(loss for _, loss in left) / len(left), rel=1e-6)
    assert after[1 - step]["grad_norm"] == before[1 - step]["grad_norm"]
    assert after[step]["grad_norm"] != pytest.approx(before[step]["grad_norm"], rel=1e-3)


# --- local copies


def test_with_a_local_copy_of_each_member_nothing_is_fetched(remote_cache, facts, samples, tmp_path, monkeypatch):
    dataset = open_dataset(Cache(remote_cache), "squares")
    requests = requests_of(samples, steps=range(5))
    asked, whole = [], Storage.read_range

    def ask(*args):
        asked.append(args[1:])
        return whole(*args)

    monkeypatch.setattr(Storage, "read_range", ask)
    runs = [
        read_all(
            LatentDataset(dataset, facts, DRAWS, prefetch=1, local_cache=LocalCache(tmp_path / "c", 10**9)), requests
        )
        for _ in range(2)
    ]
    fetched = len(asked)
    assert fetched == len(set(asked)) > 10
    assert all(same(one, other) for one, other in zip(*runs, strict=True))
    local = read_all(LatentDataset(dataset, facts, DRAWS), requests)
    assert len(asked) > fetched
    assert all(same(one, other) for one, other in zip(runs[0], local, strict=True))


def test_a_copy_that_has_changed_is_fetched_again(remote_cache, facts, samples, tmp_path):
    dataset, request = open_dataset(Cache(remote_cache), "squares"), samples.request(0, 0, 0, 1.0, PLAIN)
    copies = LocalCache(tmp_path, 10**9)
    reader = LatentDataset(dataset, facts, PLAIN, local_cache=copies)
    expected = reader[request]["moments"]
    (path,) = tmp_path.glob(f"??/{request.latent.part}.{request.latent.offset}.*")
    path.write_bytes(flip_last_bit(path.read_bytes()))
    assert np.array_equal(reader[request]["moments"], expected)
    assert copies.get(request.latent) is not None


def test_what_came_changed_over_the_network_is_not_copied(remote_cache, facts, samples, tmp_path):
    dataset, request = open_dataset(Cache(remote_cache), "squares"), samples.request(0, 0, 0, 1.0, PLAIN)
    reader = LatentDataset(dataset, facts, PLAIN, local_cache=LocalCache(tmp_path, 10**9))
    reader[request]  # so that it is not the first read
    (path,) = tmp_path.glob(f"??/{request.latent.part}.{request.latent.offset}.*")
    path.unlink()
    system, tar = fsspec.filesystem("memory"), f"/lab/{dataset.store_folder('latent')}/{request.latent.part}.tar"
    content = bytearray(system.cat_file(tar))
    content[request.latent.offset + 200] ^= 1
    system.pipe_file(tar, bytes(content))
    with pytest.raises(CacheError, match="crc32"):
        reader[request]
    assert not path.exists()


def test_copies_of_a_folder_are_refused(cache, tiny_2b, tmp_path):
    flags = {"pretrained_model_name_or_path": tiny_2b, "max_train_steps": 1, "local_cache": tmp_path / "copies"}
    with pytest.raises(ConfigError, match=r"^--local_cache .*copies: --cache .* is a folder already; leave --local"):
        train_here(cache, tmp_path / "run", **flags)
    assert not (tmp_path / "copies").exists()


def test_a_folder_for_copies_that_cannot_be_written_is_told_before_the_first_step(remote_cache, tiny_2b, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    flags = {"pretrained_model_name_or_path": tiny_2b, "max_train_steps": 1, "local_cache": tmp_path / "file"}
    with pytest.raises(ConfigError, match=r"^--local_cache .*/file: "):
        train_here(remote_cache, tmp_path / "run", **flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"prefetch": 0}, "--prefetch 0; must be at least 1"),
        ({"local_cache_size": "much"}, "--local_cache_size much; must be a size"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, told):
    with pytest.raises(ConfigError, match=told):
        TrainConfig(**flags)


def test_the_flags_reach_the_reader(remote_cache, tiny_2b, tmp_path, monkeypatch):
    crowd = Crowd(3)
    monkeypatch.setattr(members, "read_member", crowd)
    flags = {"pretrained_model_name_or_path": tiny_2b, "max_train_steps": 4, "prefetch": 3}
    copies = {"local_cache": tmp_path / "copies", "local_cache_size": "30KB"}
    assert train_here(remote_cache, tmp_path / "run", **flags, **copies) == 0
    assert crowd.most == 3
    sizes = [path.stat().st_size for path in (tmp_path / "copies").glob("??/*")]
    assert 0 < sum(sizes) <= 30_000


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_finite_is_what_numpy_says(dtype):
    """Every float16 there is; of float32 some."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(np.float16) if dtype == np.float16 else bits.view(np.float16).astype(np.float32)
    for value in values[:: 1 if dtype == np.float16 else 97]:
        row = np.array([1, value, -2], dtype)
        assert members.all_finite(row) == bool(np.isfinite(row).all())
