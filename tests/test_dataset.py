"""Data sets: immutable versions that are named by what training depends on, and read back as they were published."""

import hashlib
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache import Cache
from shared.dataset import (
    MEMBER_KINDS,
    check_name,
    location_columns,
    location_row,
    open_dataset,
    publish_dataset,
    sample_id,
    version_digest,
)
from shared.errors import CacheError, ConfigError
from shared.shards import Location

FINGERPRINTS = {"latents": "0a" * 16, "embeddings": "0b" * 16, "images": None}
INFO = {"fingerprints": FINGERPRINTS, "random_flip": 0.5, "id_token": "ÄÖ"}
REPORT = {"encoded": {"latents": 2}, "rejected": {"too_short": 1}}
REJECTED = [{"source": "short.mp4", "caption": "a ü", "reason": "too_short", "detail": "5 of 9 frames"}]


@pytest.fixture(params=["local", "memory"])
def anywhere(request, tmp_path) -> Cache:
    """An empty cache: here, and behind a URL."""
    if request.param == "local":
        return Cache(str(tmp_path / "cache"))
    fsspec.filesystem("memory").store.clear()
    return Cache("memory://bucket/cache")


@pytest.fixture
def here(tmp_path) -> Cache:
    """An empty local cache."""
    return Cache(str(tmp_path / "cache"))


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:16]


def place(name: str) -> Location:
    return Location(key(f"part of {name}").hex(), len(name), 100 + len(name), 2**32 - 1)


def sample(number: int, **changes) -> dict:
    """A row of samples.parquet: without a mirror and an image where the number is even."""
    source, odd = f"clips/{number} ü.mp4", number % 2 == 1
    latent, mirrored = place(f"latent {number}"), place(f"mirrored {number}") if odd else None
    return {
        "sample_id": sample_id(source, None, None, odd),
        "caption": f"caption, {number}\nwith a line",
        "effective_prompt": f"ÄÖ caption {number}",
        "weight": 1.0,
        "source": source,
        "start_s": 0.5 if odd else None,
        "end_s": 2.0 if odd else None,
        "frame_indices": list(range(0, 18, 2)),
        "source_fps": 29.97,
        "fps": 8.0,
        "source_height": 72,
        "source_width": 104,
        "crop": {"top": 1, "left": 2, "height": 65, "width": 96},
        "frames": 9,
        "height": 64,
        "width": 96,
        "bucket": "9x64x96",
        "latent_key": key(f"latent {number}"),
        "mirrored_key": key(f"mirrored {number}") if odd else None,
        "image_key": None,
        "embedding_key": key(f"prompt {number}"),
        "tokens": 7,
        "truncated": False,
        **location_row("latent", latent),
        **location_row("mirrored", mirrored),
        **location_row("image", None),
        **location_row("embedding", place(f"prompt {number}")),
        **changes,
    }


SAMPLES = [sample(number) for number in range(4)]


def publish(cache: Cache, samples: list[dict] = SAMPLES, name: str = "clips", **info) -> str:
    with cache.writer() as writer:
        return publish_dataset(cache, writer, name, {**INFO, **info}, samples, REJECTED, lambda: REPORT)


def names_of(cache: Cache) -> list[str]:
    """The files of a local cache, but for the locks that lie among the writers."""
    root = cache.storage.local()
    files = [path for path in root.rglob("*") if path.is_file() and not path.match("writers/.*")]
    return sorted(str(path.relative_to(root)) for path in files)


# The names of samples.


def test_sample_ids_never_change():
    """Golden values: a data set published tomorrow names its samples as one published today."""
    assert sample_id("clips/a.mp4", None, None, False) == "f93a0eb19464ddc8a88adeb683990a45"
    text = '["sample","clips/ü.mp4",0.5,2.0,true]'
    assert sample_id("clips/ü.mp4", 0.5, 2.0, True) == hashlib.sha256(text.encode()).hexdigest()[:32]
    text = '["sample","clips/ü.mp4",0.5,2.0,true,1]'
    assert sample_id("clips/ü.mp4", 0.5, 2.0, True, 1) == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_whole_seconds_name_the_same_segment_however_they_are_written():
    assert sample_id("a", 1, 2, False) == sample_id("a", 1.0, 2.0, False)


def test_sample_ids_tell_source_segment_mirror_and_occurrence_apart():
    facts: list[Any] = [
        ("a", None, None, False), ("b", None, None, False), ("a", 0.0, None, False), ("a", None, 0.0, False),
        ("a", None, None, True), ("a", None, None, False, 1), ("a", None, None, False, 2),
    ]  # fmt: skip
    assert len({sample_id(*fact) for fact in facts}) == len(facts)


# The names of versions.


def digest_by_hand(samples: list[dict]) -> str:
    """sha256 over (sample_id, keys, bucket, weight) in manifest order, each as canonical JSON, after a head."""
    text = '["dataset",1,' + json.dumps(FINGERPRINTS, separators=(",", ":"), sort_keys=True) + ",0.5]"
    for row in samples:
        keys = [row[name] and row[name].hex() for name in ("latent_key", "mirrored_key", "image_key", "embedding_key")]
        text += json.dumps([row["sample_id"], *keys, row["bucket"], row["weight"]], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_version_is_named_by_the_digest_that_the_format_tells(here):
    assert publish(here) == version_digest(INFO, SAMPLES) == digest_by_hand(SAMPLES)


@pytest.mark.parametrize("changed", [{"fingerprints": {**FINGERPRINTS, "latents": "0c" * 16}}, {"random_flip": 0.0}])
def test_equal_keys_of_another_encoding_make_another_version(changed):
    assert version_digest({**INFO, **changed}, SAMPLES) != version_digest(INFO, SAMPLES)


@pytest.mark.parametrize(
    "changed",
    [
        {"sample_id": "ab" * 16}, {"latent_key": key("x")}, {"mirrored_key": key("x")}, {"image_key": key("x")},
        {"embedding_key": key("x")}, {"mirrored_key": None}, {"bucket": "9x96x64"}, {"weight": 0.5},
    ],
)  # fmt: skip
def test_what_training_depends_on_makes_another_version(changed):
    assert version_digest(INFO, [SAMPLES[0], {**SAMPLES[1], **changed}]) != version_digest(INFO, SAMPLES[:2])


@pytest.mark.parametrize(
    "changed",
    [{"latent_part": "ab" * 16}, {"embedding_offset": 7}, {"source": "moved.mp4"}, {"weight": 1}, {"tokens": 8}],
)
def test_what_training_does_not_depend_on_makes_no_version(changed):
    assert version_digest(INFO, [SAMPLES[0], {**SAMPLES[1], **changed}]) == version_digest(INFO, SAMPLES[:2])


def test_equal_rows_keep_the_version_and_current(here):
    digest = publish(here)
    before = names_of(here)
    assert publish(here) == digest
    assert names_of(here) == before
    assert here.storage.read("datasets/clips/CURRENT") == f"{digest}\n".encode()


def test_another_order_is_another_version_and_the_first_stays(here):
    first = publish(here)
    order = random.Random(0).sample(SAMPLES, len(SAMPLES))
    second = publish(here, order)
    assert second != first
    assert open_dataset(here, "clips").digest == second
    for digest, samples in ((first, SAMPLES), (second, order)):
        sources = open_dataset(here, "clips", digest).columns("source")["source"].to_pylist()
        assert sources == [row["source"] for row in samples]


def test_publishing_again_renews_the_places_of_members(here):
    """After a repair the same members lie in other parts."""
    publish(here)
    moved = [{**row, **location_row("latent", place("elsewhere"))} for row in SAMPLES]
    digest = publish(here, moved)
    assert digest == version_digest(INFO, SAMPLES)
    parts = open_dataset(here, "clips").columns("latent_part")["latent_part"].to_pylist()
    assert set(parts) == {place("elsewhere").part}


def test_two_processes_may_publish_one_version_at_once(here):
    with ThreadPoolExecutor(4) as threads:
        digests = set(threads.map(lambda _: publish(here), range(16)))
    assert digests == {version_digest(INFO, SAMPLES)}
    assert open_dataset(here, "clips").columns("source").num_rows == 4
    assert not any(name.startswith("writers/") for name in names_of(here))


# Writing and reading.


def test_a_version_reads_back_as_it_was_published(anywhere):
    digest = publish(anywhere)
    for opened in (open_dataset(anywhere, "clips"), open_dataset(Cache(anywhere.url), "clips", digest)):
        assert opened.digest == digest
        assert opened.info == {"format_version": 1, "name": "clips", "digest": digest, "samples": 4, **INFO}
        assert opened.columns(*SAMPLES[0]).to_pylist() == SAMPLES
    folder = f"datasets/clips/versions/{digest}"
    rejected = pq.read_table(pa.BufferReader(anywhere.storage.read(f"{folder}/rejected.parquet")))
    assert rejected.to_pylist() == REJECTED
    assert json.loads(anywhere.storage.read(f"{folder}/report.json")) == REPORT
    assert anywhere.storage.names(folder) == ["dataset.json", "rejected.parquet", "report.json", "samples.parquet"]


def test_a_data_set_of_no_samples_can_be_read(here):
    publish(here, [])
    assert open_dataset(here, "clips").columns("source", "crop").num_rows == 0


def test_samples_have_the_columns_of_the_format(here):
    """As design.md lists them, in order: another program may rely on each."""
    digest = publish(here)
    schema = pq.read_schema(here.storage.local(f"datasets/clips/versions/{digest}/samples.parquet"))
    key_type, crop = "fixed_size_binary[16]", "struct<top: int32, left: int32, height: int32, width: int32>"
    expected = {
        "sample_id": "string", "caption": "string", "effective_prompt": "string", "weight": "double",
        "source": "string", "start_s": "double", "end_s": "double", "frame_indices": "list<element: int32>",
        "source_fps": "double", "fps": "double", "source_height": "int32", "source_width": "int32", "crop": crop,
        "frames": "int32", "height": "int32", "width": "int32", "bucket": "string",
        "latent_key": key_type, "mirrored_key": key_type, "image_key": key_type, "embedding_key": key_type,
        "tokens": "int32", "truncated": "bool",
        "latent_part": "string", "latent_offset": "int64", "latent_size_bytes": "int64", "latent_crc32": "uint32",
        "mirrored_part": "string", "mirrored_offset": "int64", "mirrored_size_bytes": "int64",
        "mirrored_crc32": "uint32",
        "image_part": "string", "image_offset": "int64", "image_size_bytes": "int64", "image_crc32": "uint32",
        "embedding_part": "string", "embedding_offset": "int64", "embedding_size_bytes": "int64",
        "embedding_crc32": "uint32",
    }  # fmt: skip
    assert [(field.name, str(field.type)) for field in schema] == list(expected.items())


def test_rejected_clips_have_the_columns_of_the_format(here):
    digest = publish(here)
    schema = pq.read_schema(here.storage.local(f"datasets/clips/versions/{digest}/rejected.parquet"))
    assert [field.name for field in schema] == ["source", "caption", "reason", "detail"]


def test_equal_input_gives_equal_bytes(tmp_path):
    written = []
    for name in ("one", "two"):
        cache = Cache(str(tmp_path / name))
        publish(cache)
        written.append({path: cache.storage.read(path) for path in names_of(cache)})
    assert written[0] == written[1]


def test_places_are_the_members_and_nothing_where_there_is_none():
    columns = location_columns("latent")
    assert columns == ["latent_part", "latent_offset", "latent_size_bytes", "latent_crc32"]
    assert location_row("latent", Location("ab" * 16, 1, 2, 3)) == dict(zip(columns, ["ab" * 16, 1, 2, 3], strict=True))
    assert set(location_row("image", None).values()) == {None}


def test_each_kind_of_member_has_its_store(here):
    publish(here)
    opened = open_dataset(here, "clips")
    folders = {kind: opened.store_folder(kind) for kind in MEMBER_KINDS if kind != "image"}
    latents = f"latents/{FINGERPRINTS['latents']}"
    assert folders == {"latent": latents, "mirrored": latents, "embedding": f"embeddings/{FINGERPRINTS['embeddings']}"}


# What is missing or damaged.


def test_a_missing_data_set_names_those_that_exist(anywhere):
    with pytest.raises(CacheError, match="no data set 'clips'; it has none"):
        open_dataset(anywhere, "clips")
    publish(anywhere, name="dogs")
    publish(anywhere, name="cats")
    with pytest.raises(CacheError, match="no data set 'clips'; it has cats, dogs"):
        open_dataset(anywhere, "clips")


def test_a_missing_version_is_named(here):
    publish(here)
    with pytest.raises(CacheError, match=rf"{'ab' * 32}/dataset\.json: is missing"):
        open_dataset(here, "clips", "ab" * 32)


@pytest.mark.parametrize("name", ["a", "Clips-2.1_b", "0", "x" * 100])
def test_names_that_can_be_a_folder_are_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hid", "-flag", "a/b", "../a", "a b", "ä", "a\n", "x" * 101, "a\0"])
def test_names_that_leave_or_hide_in_a_folder_are_refused(here, name):
    with pytest.raises(ConfigError, match="--dataset"):
        check_name(name)
    for digest in (None, "ab" * 32):
        with pytest.raises(ConfigError, match="--dataset"):
            open_dataset(here, name, digest)


@pytest.mark.parametrize("current", [b"", b"../../../elsewhere", b"\xff\xfe", b"AB" * 32, b"ab" * 31])
def test_a_damaged_current_is_one_line(here, current):
    publish(here)
    here.storage.local("datasets/clips/CURRENT").write_bytes(current)
    with pytest.raises(CacheError, match=r"datasets/clips: .* is no version"):
        open_dataset(here, "clips")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format_version": 2}'])
def test_a_damaged_dataset_json_is_one_line(here, text):
    digest = publish(here)
    path = here.storage.local(f"datasets/clips/versions/{digest}/dataset.json")
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CacheError, match=r"dataset\.json: not") as error:
        open_dataset(here, "clips")
    assert len(str(error.value).splitlines()) == 1


def test_a_version_under_another_s_name_is_refused(here):
    digest = publish(here)
    versions = here.storage.local("datasets/clips/versions")
    shutil.copytree(versions / digest, versions / ("ab" * 32))
    with pytest.raises(CacheError, match="not a data set"):
        open_dataset(here, "clips", "ab" * 32)


@pytest.mark.parametrize("told", [None, [], {}, {"latents": None}, {"latents": "../../../../etc"}, {"latents": 7}])
def test_a_fingerprint_that_is_no_folder_s_name_is_refused(here, told):
    publish(here, fingerprints=told)
    with pytest.raises(CacheError, match=r"dataset\.json: fingerprint of latents is"):
        open_dataset(here, "clips").store_folder("latent")


def test_samples_with_other_columns_are_refused(anywhere, tmp_path):
    digest = publish(anywhere)
    path = f"datasets/clips/versions/{digest}/samples.parquet"
    table = pq.read_table(pa.BufferReader(anywhere.storage.read(path)))
    floats = table.set_column(3, "weight", table["weight"].cast(pa.float32()))
    for other in (table.drop_columns(["weight"]), table.append_column("more", table["weight"]), floats):
        pq.write_table(other, tmp_path / "other")
        anywhere.storage.publish(tmp_path / "other", path)
        with pytest.raises(CacheError, match=r"samples\.parquet: other columns"):
            open_dataset(anywhere, "clips").columns("weight")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table at all", None])
def test_samples_that_are_no_table_are_refused(here, data):
    digest = publish(here)
    path: Path = here.storage.local(f"datasets/clips/versions/{digest}/samples.parquet")
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CacheError, match=r"samples\.parquet: cannot be read"):
        open_dataset(here, "clips").columns("weight")


def test_a_flipped_byte_in_the_samples_is_noticed(here):
    """Each page has its checksum: a caption, a place or a weight that changed on the disk is never trained on."""
    digest = publish(here)
    path = here.storage.local(f"datasets/clips/versions/{digest}/samples.parquet")
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    noticed = 0
    for place_ in range(4, footer, 23):
        path.write_bytes(data[:place_] + bytes([data[place_] ^ 4]) + data[place_ + 1 :])
        try:
            assert open_dataset(here, "clips").columns(*SAMPLES[0]).to_pylist() == SAMPLES
        except CacheError:
            noticed += 1
    assert noticed > footer / 23 / 2
