"""From a place in a global batch to tensors: the right members, the right draws, whatever reads them."""

import dataclasses
import io
import tarfile
import threading
import time
import zlib
from contextlib import closing

import numpy as np
import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from shared.cache import Cache, embedding_key
from shared.dataset import open_dataset
from shared.errors import CacheError
from shared.shards import Location, ShardWriter
from train.data import DrawSettings, Requests, micro_batches
from train.draws import draw_bool, draw_normal, draw_timestep
from train.objective import Batch
from train.reading import LatentDataset, collate
from train.sampler import MISSING, Deal, Sampler

DRAWS = DrawSettings(seed=3, global_batch=4, stratified=True, random_flip=0.5, caption_dropout=0.3)
PLAIN = dataclasses.replace(DRAWS, random_flip=0.0, caption_dropout=0.0)
DEAL = Deal(batch_size=2, ranks=1, accumulation=2)


@pytest.fixture(scope="module")
def table(squares):
    columns = ("sample_id", "effective_prompt", "bucket", "latent_key", "mirrored_key", "embedding_key")
    return squares.columns(*columns).to_pylist()


@pytest.fixture(scope="module")
def arrays(cache):
    """Every array of the cache by key, as plain webdataset reads it."""
    found = {}
    for store, member in (("latents", "moments.npy"), ("embeddings", "prompt_embeds.npy")):
        for part in cache.glob(f"{store}/*/*.tar"):
            with part.open("rb") as file:
                for sample in group_by_keys(tar_file_expander([{"url": str(part), "stream": file}])):
                    array = np.load(io.BytesIO(sample[member]), allow_pickle=False)
                    found[bytes.fromhex(sample["__key__"])] = array
    return found


def reader_of(dataset, facts, draws=DRAWS):
    return LatentDataset(dataset, facts, draws)


def requests_of(samples, draws=DRAWS, deal=DEAL, rank=0, steps=range(4)):
    return Requests(samples, order_of(samples, deal), deal, rank, steps, draws)


def order_of(samples, deal=DEAL):
    return Sampler(samples.buckets, deal.global_batch, "d", 1)


def content_of(tar, member):
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def same(one, other):
    assert one.places == other.places
    tensors = {name: value for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
    return len(tensors) == 6 and all(torch.equal(value, getattr(other, name)) for name, value in tensors.items())


# --- what a request is


def test_samples_know_their_bucket_and_rate(samples, table):
    assert [samples.bucket_names[number] for number in samples.buckets] == [row["bucket"] for row in table]
    assert [samples.sample_id(number) for number in range(len(samples))] == [row["sample_id"] for row in table]
    assert samples.fps == 8


def test_a_request_names_the_clip_and_its_own_caption(samples, table):
    for number, row in enumerate(table):
        request = samples.request(number, 0, 0, 1.0, PLAIN)
        assert (request.sample_id, request.latent_key) == (row["sample_id"], row["latent_key"])
        assert request.embedding_key == row["embedding_key"] == embedding_key(row["effective_prompt"])


def test_a_mirrored_draw_takes_the_mirrored_latent(samples, table):
    seen = set()
    for step in range(40):
        request = samples.request(3, step, 2, 1.0, DRAWS)
        mirrored = draw_bool(DRAWS.seed, step, 2, "mirror", 0.5)
        assert request.latent_key == table[3]["mirrored_key" if mirrored else "latent_key"]
        seen.add(mirrored)
    assert seen == {True, False}


def test_a_dropped_caption_is_the_empty_prompt(samples, table):
    seen = set()
    for step in range(60):
        request = samples.request(3, step, 2, 1.0, DRAWS)
        dropped = draw_bool(DRAWS.seed, step, 2, "caption_dropout", 0.3)
        assert request.embedding_key == (embedding_key("") if dropped else table[3]["embedding_key"])
        assert request.latent_key in (table[3]["latent_key"], table[3]["mirrored_key"])
        seen.add(dropped)
    assert seen == {True, False}


def test_a_missing_place_is_a_stand_in_of_weight_zero(samples):
    deal = Deal(2, 2, 1)
    order, seen = order_of(samples, deal), 0
    for rank in range(2):
        for step, (requests,) in enumerate(
            [micro] for micro in requests_of(samples, deal=deal, rank=rank, steps=range(order.steps_per_epoch))
        ):
            for request in requests:
                number = order.batch(step)[request.place]
                assert request.weight == (number != MISSING)
                seen += number == MISSING
                assert request.sample_id == samples.sample_id(order.batch(step)[0] if number == MISSING else number)
    assert seen == 5  # 5 and 2 clips, 4 places a batch


# --- what a request reads


def test_tensors_are_those_that_webdataset_and_tarfile_read(cache, squares, facts, samples, arrays):
    in_tars = {}
    for part in cache.glob("*/*/*.tar"):
        with tarfile.open(part) as tar:
            for member in tar:
                if member.name.endswith(".npy"):
                    array = np.load(io.BytesIO(content_of(tar, member)), allow_pickle=False)
                    in_tars[member.name.partition(".")[0]] = array
    reader = reader_of(squares, facts)
    for number in range(len(samples)):
        for step in range(6):
            request = samples.request(number, step, number % 4, 1.0, DRAWS)
            row = reader[request]
            for name, key in (("moments", request.latent_key), ("prompt_embeds", request.embedding_key)):
                assert np.array_equal(row[name], arrays[key])
                assert np.array_equal(row[name], in_tars[key.hex()])


def test_draws_of_a_request_depend_on_its_step_and_place_alone(squares, facts, samples):
    reader = reader_of(squares, facts)
    row = reader[samples.request(1, 6, 2, 1.0, DRAWS)]
    shape = (16, 3, 8, 12) if samples.bucket_names[samples.buckets[1]] == "9x64x96" else (16, 3, 12, 8)
    assert torch.equal(row["posterior_noise"], draw_normal(3, 6, 2, "posterior", shape))
    assert torch.equal(row["noise"], draw_normal(3, 6, 2, "noise", shape))
    assert row["timesteps"] == draw_timestep(3, 6, 2, 4, stratified=True)
    assert (row["places"], row["weights"]) == (2, 1)


def test_noise_is_drawn_for_the_padded_clip(squares, facts, samples):
    reader = reader_of(squares, dataclasses.replace(facts, patch_size_t=2))
    row = reader[samples.request(1, 6, 2, 1.0, DRAWS)]
    assert row["moments"].shape[1] == row["posterior_noise"].shape[1] == 3
    assert row["noise"].shape[1] == 4


def test_a_micro_batch_keeps_the_order_of_its_places(squares, facts, samples):
    reader = reader_of(squares, facts)
    rows = [reader[samples.request(number, 0, number, float(number != 3), DRAWS)] for number in (0, 1, 3)]
    batch = collate(rows)
    assert isinstance(batch, Batch)
    assert batch.places == [0, 1, 3]
    assert batch.weights.tolist() == [1, 1, 0]
    assert np.array_equal(batch.moments[2], rows[2]["moments"])
    assert batch.timesteps.dtype == torch.int64


def test_what_is_read_may_be_written_to(squares, facts, samples):
    """Read-only memory below a tensor is undefined behaviour."""
    reader, request = reader_of(squares, facts), samples.request(0, 0, 0, 1.0, DRAWS)
    batch = collate([reader[request]])
    assert isinstance(batch, Batch)
    batch.moments.zero_()
    assert np.abs(reader[request]["moments"]).sum() > 0


# --- damage


def damage(cache, location, folder, change):
    path = cache / folder / f"{location.part}.tar"
    data = bytearray(path.read_bytes())
    member = slice(location.offset, location.offset + location.size_bytes)
    data[member] = change(bytes(data[member]))
    path.write_bytes(data)


def flip_last_bit(payload):
    return payload[:-1] + bytes([payload[-1] ^ 1])


@pytest.mark.parametrize("kind", ["latent", "embedding"])
def test_a_changed_byte_names_the_sample(cache_copy, facts, samples, kind):
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    request = samples.request(2, 0, 0, 1.0, PLAIN)
    damage(cache_copy, getattr(request, kind), dataset.store_folder(kind), flip_last_bit)
    with pytest.raises(CacheError, match=rf"^sample {request.sample_id}, {kind} [0-9a-f]{{32}}: .*changed .*crc32"):
        reader_of(dataset, facts)[request]
    other = samples.request(3, 0, 0, 1.0, PLAIN)
    assert reader_of(dataset, facts)[other]["moments"].shape[0] == 32


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_names_the_sample(cache_copy, facts, samples, value):
    """Written so by a broken VAE: the checksum is right."""
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    request = samples.request(2, 0, 0, 1.0, PLAIN)
    moments = reader_of(dataset, facts)[request]["moments"].copy()
    moments[4, 1, 2, 3] = value
    location = rewrite(cache_copy, dataset, request.latent_key, {"moments.npy": moments})
    request = dataclasses.replace(request, latent=location)
    with pytest.raises(CacheError, match=rf"^sample {request.sample_id}, latent .*: holds NaN or infinity; run "):
        reader_of(dataset, facts)[request]


def rewrite(cache, dataset, key, members):
    """Publish a part with one key. Returns where its moments lie."""
    handle = Cache(str(cache))
    store = handle.store("latents", fingerprint_of(dataset, "latents"))
    with handle.writer() as folder:
        writer = ShardWriter(folder)
        writer.add(key, members)
        shard = writer.finish()
        store.publish(shard)
    with tarfile.open(cache / store.folder / f"{shard.part}.tar") as tar:
        member = tar.getmember(f"{key.hex()}.moments.npy")
        payload = content_of(tar, member)
    return Location(shard.part, member.offset_data, member.size, zlib.crc32(payload))


def fingerprint_of(dataset, store):
    return {
        name: value for name, value in dataset.info["facts"][store].items() if name not in ("kind", "format_version")
    }


def remove_part(cache, dataset, part, *suffixes):
    for suffix in suffixes:
        (cache / dataset.store_folder("latent") / f"{part}{suffix}").unlink()


def test_a_key_whose_part_is_gone_is_found_in_another(cache_copy, facts, samples, arrays):
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    request = samples.request(2, 0, 0, 1.0, PLAIN)
    other = rewrite(cache_copy, dataset, request.latent_key, {"moments.npy": arrays[request.latent_key], "json": b"{}"})
    assert other.part != request.latent.part
    remove_part(cache_copy, dataset, request.latent.part, ".tar", ".parquet")
    row = reader_of(dataset, facts)[request]
    assert np.array_equal(row["moments"], arrays[request.latent_key])


@pytest.mark.parametrize("suffixes", [(".tar", ".parquet"), (".tar",)], ids=["part", "tar only"])
def test_a_key_that_is_nowhere_names_the_sample(cache_copy, facts, samples, suffixes):
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    request = samples.request(2, 0, 0, 1.0, PLAIN)
    remove_part(cache_copy, dataset, request.latent.part, *suffixes)
    with pytest.raises(CacheError, match=rf"^sample {request.sample_id}, latent {request.latent_key.hex()}: "):
        reader_of(dataset, facts)[request]


# --- reading ahead


def test_spawned_workers_give_what_the_thread_gives(squares, facts, samples):
    """Over enough batches that every slot of the workers' memory is written several times."""
    steps = range(30)

    def batches(workers):
        reader = reader_of(squares, facts)
        slot_bytes = reader.slot_bytes(samples.bucket_names, DEAL.batch_size)
        return micro_batches(
            reader, requests_of(samples, steps=steps), num_workers=workers, pin_memory=False, slot_bytes=slot_bytes
        )

    count = 0
    with closing(batches(0)) as by_thread, closing(batches(2)) as by_workers:
        for one, other in zip(by_thread, by_workers, strict=True):  # a worker's holds until the next is asked for
            if count == 5:
                time.sleep(0.5)  # the workers come as far as they may
            assert same(one, other)
            count += 1
    assert count == sum(DEAL.micros(order_of(samples).batch(step)) for step in steps) >= 40


def test_reading_from_a_later_step_gives_the_rest(squares, facts, samples):
    reader = reader_of(squares, facts)
    whole = list(micro_batches(reader, requests_of(samples, steps=range(5)), num_workers=0, pin_memory=False))
    rest = list(micro_batches(reader, requests_of(samples, steps=range(2, 5)), num_workers=0, pin_memory=False))
    assert len(rest) < len(whole)
    assert all(same(one, other) for one, other in zip(whole[-len(rest) :], rest, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_reaches_the_loop_as_one_line_whoever_reads(cache_copy, facts, samples, workers):
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    request = samples.request(0, 0, 0, 1.0, PLAIN)
    damage(cache_copy, request.latent, dataset.store_folder("latent"), flip_last_bit)
    requests = requests_of(samples, PLAIN, Deal(1, 1, 1), steps=range(7))
    reader = reader_of(dataset, facts, PLAIN)
    slot_bytes = reader.slot_bytes(samples.bucket_names, 1)
    found = micro_batches(reader, requests, num_workers=workers, pin_memory=False, slot_bytes=slot_bytes)
    with closing(found), pytest.raises(CacheError) as caught:
        list(found)
    assert str(caught.value).startswith(f"sample {request.sample_id}, latent ")
    assert "\n" not in str(caught.value)


class Broken(LatentDataset):
    """Reads as long as it is let."""

    def __getitem__(self, request):
        if request.step == 2:
            raise ZeroDivisionError("a defect of ours")
        return super().__getitem__(request)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


def test_a_defect_in_the_reading_thread_reaches_the_loop(squares, facts, samples):
    requests = requests_of(samples, deal=Deal(1, 1, 1))
    found = micro_batches(Broken(squares, facts, DRAWS), requests, num_workers=0, pin_memory=False)
    with pytest.raises(ZeroDivisionError, match="a defect of ours"):
        list(found)
    assert not readers()


def test_the_thread_ends_when_the_loop_stops_early(squares, facts, samples):
    requests = requests_of(samples, steps=range(10_000))
    with closing(micro_batches(reader_of(squares, facts), requests, num_workers=0, pin_memory=False)) as found:
        next(found)
        assert len(readers()) == 1
        time.sleep(0.3)  # it waits with full hands
    assert not readers()


def test_the_thread_reads_ahead_but_not_without_bound(squares, facts, samples):
    asked = []

    class Counting(LatentDataset):
        def __getitem__(self, request):
            asked.append(request.step)
            return super().__getitem__(request)

    requests = requests_of(samples, deal=Deal(1, 1, 1), steps=range(1000))
    with closing(micro_batches(Counting(squares, facts, DRAWS), requests, num_workers=0, pin_memory=False)) as found:
        next(found)
        time.sleep(0.5)
        assert 2 <= len(asked) <= 5
