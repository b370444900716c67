"""The compact columns of a data set against a plain reading of it, row by row."""

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared import dataset as dataset_module
from shared.cache import Cache
from shared.dataset import DataSet, location_row, open_dataset, publish_dataset
from shared.errors import CacheError
from shared.shards import Location
from shared.storage import Storage
from tests.test_dataset import INFO, key, place, sample
from train.data import DrawSettings, Requests
from train.sampler import Deal, Sampler
from train.samples import KINDS, Samples

EMPTY = {"embedding_key": "ab" * 16, **location_row("embedding", place("nothing"))}
PLAIN = DrawSettings(seed=0, global_batch=1, stratified=True, random_flip=0.0, caption_dropout=0.0)
ROWS = 150


def rows_of(count: int = ROWS) -> list[dict[str, Any]]:
    """Rows in three buckets; some without a mirror, one part after the other and at random, small numbers and large."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        spot = Location(key(f"part {number // 7}").hex(), rng.randrange(2**40), rng.randrange(1, 2**33), number)
        told = Location(key(f"text {rng.randrange(5)}").hex(), number, 2**31 + number, 2**32 - 1)
        rows.append(
            sample(
                number,
                bucket=rng.choice(("9x64x96", "17x64x96", "9x96x64")),
                fps=rng.choice((8.0, 7.5, 8.5, 30 / 7)),
                **location_row("latent", spot),
                **location_row("embedding", told),
            )
        )
    return rows


def publish(cache: Cache, rows: list[dict[str, Any]]) -> DataSet:
    with cache.writer() as writer:
        publish_dataset(cache, writer, "many", {**INFO, "empty_prompt": EMPTY}, rows, [], dict)
    return open_dataset(cache, "many")


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(str(tmp_path / "cache"))


@pytest.fixture
def small_groups(monkeypatch):
    """Row groups of 32 samples, so that a few samples are several of them."""
    monkeypatch.setattr(dataset_module, "ROW_GROUP", 32)
    monkeypatch.setattr(dataset_module, "BATCH_ROWS", 8)


def groups_of(dataset: DataSet) -> int:
    return pq.ParquetFile(dataset.cache.storage.local(f"{dataset.folder}/samples.parquet")).num_row_groups


def rewrite(dataset: DataSet, change) -> DataSet:
    """The data set with another samples.parquet."""
    path = dataset.cache.storage.local(f"{dataset.folder}/samples.parquet")
    pq.write_table(change(pq.read_table(path)), path)
    return open_dataset(dataset.cache, "many")


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    position = table.schema.get_field_index(name)
    return table.set_column(position, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def assert_equal_to_rows(samples: Samples, rows: list[dict[str, Any]], kinds=KINDS) -> None:
    assert len(samples) == len(rows)
    assert samples.bucket_names == sorted({row["bucket"] for row in rows})
    for number, row in enumerate(rows):
        assert samples.sample_id(number) == row["sample_id"]
        assert samples.bucket_names[samples.buckets[number]] == row["bucket"]
        for kind in kinds:
            told = [row[f"{kind}_{fact}"] for fact in ("part", "offset", "size_bytes", "crc32")]
            assert samples.has(number, kind) == (row[f"{kind}_key"] is not None)
            if samples.has(number, kind):
                assert samples.member(number, kind) == (row[f"{kind}_key"], Location(*told))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("count", [1, 8, 31, 32, 33, ROWS])
def test_samples_are_what_a_plain_reading_finds(cache, count):
    dataset = publish(cache, rows_of(count))
    assert groups_of(dataset) == -(-count // 32)
    samples = Samples(dataset)
    rows = pq.read_table(cache.storage.local(f"{dataset.folder}/samples.parquet")).to_pylist()
    assert_equal_to_rows(samples, rows)
    assert samples.fps == np.median([row["fps"] for row in rows])
    for number, row in enumerate(rows):
        request = samples.request(number, 5, 0, 1.0, PLAIN)
        assert (request.sample_id, request.latent_key) == (row["sample_id"], row["latent_key"])
        assert request.embedding.size_bytes == row["embedding_size_bytes"]


def test_samples_are_the_same_however_the_file_is_cut(cache):
    """By another writer: one group, or groups of seven, and pieces that hold the ends of two."""
    rows = rows_of()
    dataset = publish(cache, rows)
    assert_equal_to_rows(Samples(dataset), rows)
    path = cache.storage.local(f"{dataset.folder}/samples.parquet")
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    assert groups_of(dataset) == -(-ROWS // 7)
    assert_equal_to_rows(Samples(open_dataset(cache, "many")), rows)


def test_other_kinds_are_read_when_asked_for(cache):
    spot = place("first frame")
    rows = [sample(n, image_key=key(f"image {n}"), **location_row("image", spot)) for n in range(5)]
    samples = Samples(publish(cache, rows), kinds=("latent", "image", "embedding"))
    assert_equal_to_rows(samples, rows, ("latent", "image", "embedding"))


def test_a_kind_that_no_sample_has_takes_nothing(cache):
    rows = [sample(2 * number) for number in range(50)]
    dataset = publish(cache, rows)
    assert not any(row["mirrored_key"] for row in rows)
    with_mirror, without = Samples(dataset), Samples(dataset, kinds=("latent", "embedding"))
    assert not any(with_mirror.has(number, "mirrored") for number in range(50))
    assert with_mirror.nbytes == without.nbytes == 50 * (16 + 4 + 1 + 2 * (16 + 4 * 4))


def test_numbers_take_eight_bytes_only_where_they_must(cache):
    rows = [sample(number, **location_row("latent", Location("ab" * 16, 2**32 - 1 + number, 2**32 - 1, 2**32 - 1)))
            for number in (0, 2)]  # fmt: skip
    assert_equal_to_rows(Samples(publish(cache, rows[:1])), rows[:1])
    samples = Samples(publish(cache, rows))
    assert_equal_to_rows(samples, rows)
    assert samples.nbytes == 2 * (16 + 4 + 1 + 2 * (16 + 4 * 4) + 4)


def test_many_buckets_are_numbered_by_their_names(cache):
    rows = [sample(number, bucket=f"{number % 300 + 1}x64x96") for number in range(900)]
    samples = Samples(publish(cache, rows))
    assert_equal_to_rows(samples, rows)
    assert samples.buckets.dtype == np.uint16


def test_a_sample_without_a_member_is_named(cache):
    rows = [sample(0), sample(1, embedding_key=None, **location_row("embedding", None)), sample(2)]
    samples = Samples(publish(cache, rows))
    assert samples.request(0, 0, 0, 1.0, PLAIN)
    with pytest.raises(CacheError, match=f"^sample {rows[1]['sample_id']}: has no embedding; run stage 1 again$"):
        samples.request(1, 0, 0, 1.0, PLAIN)


@pytest.mark.parametrize(
    ("column", "value"),
    [("latent_part", "../../etc/passwd"), ("latent_part", None), ("latent_offset", None), ("latent_offset", -1),
     ("latent_size_bytes", -5), ("latent_crc32", None)],
)  # fmt: skip
def test_a_place_that_cannot_be_is_refused_when_it_is_asked_for(cache, column, value):
    dataset = rewrite(
        publish(cache, rows_of(3)),
        lambda table: with_column(table, column, [table[column][0].as_py(), value, table[column][2].as_py()]),
    )
    samples = Samples(dataset)
    assert_equal_to_rows_at(samples, dataset, 0)
    assert_equal_to_rows_at(samples, dataset, 2)
    with pytest.raises(CacheError, match="cannot be where a member lies"):
        samples.member(1, "latent")


def assert_equal_to_rows_at(samples: Samples, dataset: DataSet, number: int) -> None:
    row = dataset.columns("latent_key", "latent_part", "latent_offset").to_pylist()[number]
    found, location = samples.member(number, "latent")
    assert (found, location.part, location.offset) == tuple(row.values())


@pytest.mark.parametrize("name", [None, "", "ab" * 15, "ab" * 15 + "a", "ab" * 17, "AB" * 16, "zz" * 16, "é" * 16])
def test_a_sample_id_that_is_none_is_refused(cache, name):
    names = [row["sample_id"] for row in rows_of(3)]
    dataset = rewrite(publish(cache, rows_of(3)), lambda table: with_column(table, "sample_id", [*names[:2], name]))
    with pytest.raises(CacheError, match=r"samples\.parquet: rows 0 to 2: a sample_id is not of 32 hex digits; run"):
        Samples(dataset)


def test_opening_and_planning_read_nothing_but_the_data_set_s_own_files(cache, monkeypatch):
    """No index of a part and no tar: those of ten million members would take minutes."""
    dataset = publish(cache, rows_of())
    read: list[str] = []

    def recorded(whole):
        def record(storage, path, *more):
            read.append(path)
            return whole(storage, path, *more)

        return record

    for name in ("read", "read_range", "names"):
        monkeypatch.setattr(Storage, name, recorded(getattr(Storage, name)))
    samples = Samples(open_dataset(cache, "many"))
    sampler = Sampler(samples.buckets, 4, dataset.digest, 0)
    assert next(iter(Requests(samples, sampler, Deal(2, 1, 2), 0, range(1), PLAIN)))
    assert read == ["datasets/many/CURRENT", f"{dataset.folder}/dataset.json"]
