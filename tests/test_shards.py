"""Parts: read by other programs as by ours, the same bytes from the same input, and no trust in what they claim."""

import hashlib
import io
import json
import os
import random
import struct
import tarfile
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.cache import Cache, Store
from shared.errors import CacheError
from shared.shards import (
    INDEX_SCHEMA,
    Location,
    Shard,
    ShardWriter,
    decode_array,
    encode_array,
    index_digest,
    read_index,
    read_member,
    rows_digest,
)
from shared.storage import Storage

KEYS = [hashlib.sha256(bytes([number])).digest()[:16] for number in range(5)]
FLOATS = ["float16", "float32", "float64"]


def moments(number: int, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(number).normal(size=(4, 3, 2, 2 + number)).astype(dtype)


def facts(number: int) -> bytes:
    return json.dumps({"frames": number}).encode()


def write_part(folder: Path, *, turned: bool = False) -> Shard:
    """A part with an array, a picture and facts for each of KEYS; `turned`: members are given the other way round."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder)
    for number, key in enumerate(KEYS):
        members: dict[str, np.ndarray | bytes] = {"moments.npy": moments(number), "json": facts(number)}
        members["preview.jpg"] = bytes([number]) * 700
        writer.add(key, dict(list(members.items())[::-1]) if turned else members, tokens=number)
    assert writer.keys == len(KEYS)
    return writer.finish()


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Shard:
    """A part that no test changes."""
    return write_part(tmp_path_factory.mktemp("part"))


@pytest.fixture(scope="module")
def rows(shard) -> list[dict]:
    return pq.read_table(shard.index).to_pylist()


@pytest.fixture
def store(tmp_path) -> Store:
    """A store in a cache of its own, which holds the part and may be damaged."""
    store = Cache(str(tmp_path / "cache")).store("latents", {})
    store.publish(write_part(tmp_path / "writer"))
    return store


# What other programs read.


def extract(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()


def test_plain_tarfile_reads_the_arrays_that_we_read(shard, store):
    with tarfile.open(shard.tar) as tar:
        for number, key in enumerate(KEYS):
            read = np.load(io.BytesIO(extract(tar, f"{key.hex()}.moments.npy")))
            ours = decode_array(store.read(key), "moments")
            np.testing.assert_array_equal(read, moments(number))
            np.testing.assert_array_equal(ours, read)
            assert ours.dtype == read.dtype
            assert extract(tar, f"{key.hex()}.json") == facts(number)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
def test_webdataset_reads_the_arrays_that_we_read(shard, store):
    samples = list(wds.WebDataset(str(shard.tar), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [key.hex() for key in KEYS]
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["moments.npy"], decode_array(store.read(KEYS[number]), "moments"))
        assert sample["json"] == {"frames": number}
        assert sample["preview.jpg"] == bytes([number]) * 700


def test_webdataset_writes_what_we_read(shard, tmp_path):
    """The other way round: an array that its own encoder wrote is one of ours."""
    with wds.TarWriter(str(tmp_path / "theirs.tar"), encoder=True) as tar:
        tar.write({"__key__": KEYS[1].hex(), "moments.npy": moments(1)})
    with tarfile.open(tmp_path / "theirs.tar") as tar:
        (name,) = tar.getnames()
        np.testing.assert_array_equal(decode_array(extract(tar, name), "moments"), moments(1))


def test_nothing_of_the_machine_is_in_a_tar(shard):
    with tarfile.open(shard.tar) as tar:
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in tar} == {(0, 0, 0, 0o444)}
        assert all(member.isfile() and "/" not in member.name for member in tar)


# The same input, the same bytes.


@pytest.mark.parametrize("turned", [False, True])
def test_equal_input_gives_equal_bytes_and_names(shard, tmp_path, turned):
    again = write_part(tmp_path / "another writer", turned=turned)
    assert again.part == shard.part
    assert again.tar.read_bytes() == shard.tar.read_bytes()
    assert again.index.read_bytes() == shard.index.read_bytes()


def test_a_part_is_named_by_the_digest_of_its_tar(shard):
    digest = hashlib.sha256(shard.tar.read_bytes()).hexdigest()
    assert shard.part == digest[:32]
    assert (shard.tar.name, shard.index.name) == (f"{digest[:32]}.tar", f"{digest[:32]}.parquet")
    assert shard.size_bytes == len(shard.tar.read_bytes())
    _, told = read_index(shard.index.read_bytes(), "index")
    assert (told["part"], told["tar_sha256"], told["tar_size_bytes"]) == (shard.part, digest, shard.size_bytes)


def test_tar_and_index_are_whole_when_they_are_flushed_to_the_disk(tmp_path, monkeypatch):
    """What is flushed before the last bytes are written may be cut short by a power cut, under its final name."""
    flushed, fsync = {}, os.fsync

    def record(descriptor: int) -> None:
        stat = os.fstat(descriptor)
        flushed[stat.st_ino] = stat.st_size
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    shard = write_part(tmp_path / "writer")
    for path in (shard.tar, shard.index):
        stat = path.stat()
        assert flushed[stat.st_ino] == stat.st_size


# The index.


def test_index_has_the_columns_of_the_format(shard):
    """As docs/format.md and design.md list them: another program may rely on each."""
    columns = {"key": "fixed_size_binary[16]", "member": "string", "offset": "int64", "size_bytes": "int64",
               "crc32": "uint32", "shape": "list<element: int32>", "dtype": "string", "tokens": "int32"}  # fmt: skip
    schema = pq.read_schema(shard.index)
    assert {field.name: str(field.type) for field in schema} == columns


def test_rows_point_at_exactly_the_member_s_bytes(shard, rows):
    raw = shard.tar.read_bytes()
    with tarfile.open(shard.tar) as tar:
        members = {name: extract(tar, name) for name in tar.getnames()}
    for row in rows:
        payload = raw[row["offset"] : row["offset"] + row["size_bytes"]]
        assert payload == members.pop(f"{row['key'].hex()}.{row['member']}")
        assert row["crc32"] == zlib.crc32(payload)
    assert members == {}


def test_rows_tell_the_shapes_of_arrays_and_of_nothing_else(rows):
    for row in rows:
        number = KEYS.index(row["key"])
        told = (row["shape"], row["dtype"], row["tokens"])
        is_array = row["member"] == "moments.npy"
        assert told == (([4, 3, 2, 2 + number], "float16", number) if is_array else (None, None, number))


def rewrite(index: Path, table: pa.Table, *, digest: bool = False, **changes) -> bytes:
    """An index of other rows or facts, with its old digest or (`digest`) as a forger would make it."""
    told = {**json.loads(pq.read_schema(index).metadata[b"latentreel"]), **changes}
    if digest:
        told["index_sha256"] = index_digest(table, told)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"latentreel": json.dumps(told)}), buffer)
    return buffer.getvalue()


def with_value(table: pa.Table, column: str, value, row: int = 3) -> pa.Table:
    """The table with one other value."""
    values = table[column].to_pylist()
    values[row] = value
    place = table.schema.get_field_index(column)
    return table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def test_an_index_reads_back_as_it_was_written(shard, rows):
    table, told = read_index(shard.index.read_bytes(), "index")
    assert table.schema.equals(INDEX_SCHEMA)
    assert table.to_pylist() == rows
    assert told["format_version"] == 1


def test_the_digest_of_an_index_is_of_its_facts_and_rows(shard, rows):
    """By hand, as docs/format.md tells: of the columns' values; then of the facts and that digest."""

    def text(value) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    assert any(row["shape"] for row in rows)
    assert not all(row["shape"] for row in rows)
    told_rows = struct.pack("<Q", len(rows))
    for name, code in (("key", "16s"), ("member", ""), ("offset", "q"), ("size_bytes", "q"), ("crc32", "I"),
                       ("shape", ""), ("dtype", ""), ("tokens", "i")):  # fmt: skip
        told_rows += bytes(row[name] is not None for row in rows)
        values = [row[name] for row in rows if row[name] is not None]
        if name in ("member", "dtype"):
            values = [value.encode() for value in values]
        if not code:
            told_rows += b"".join(struct.pack("<i", len(value)) for value in values)
        if name == "shape":
            sides = [side for value in values for side in value]
            told_rows += b"\1" * len(sides) + struct.pack(f"<{len(sides)}i", *sides)
        elif code:
            told_rows += b"".join(struct.pack(f"<{code}", value) for value in values)
        else:
            told_rows += b"".join(values)
    table, told = read_index(shard.index.read_bytes(), "index")
    digest = told.pop("index_sha256")
    assert rows_digest(table) == hashlib.sha256(told_rows).hexdigest()
    assert digest == hashlib.sha256(text([told, rows_digest(table)])).hexdigest()


def test_the_digest_of_rows_does_not_depend_on_how_they_are_cut(shard):
    """Slices, chunks, a dictionary on the way: what counts is what the rows say."""
    table = pq.read_table(shard.index)
    expected = rows_digest(table)
    for cut in range(len(table) + 1):
        parts = [table.slice(0, cut), table.slice(cut)]
        assert rows_digest(pa.concat_tables(parts)) == expected
        assert {rows_digest(part) for part in parts} & {expected} == ({expected} if cut in (0, len(table)) else set())
    assert rows_digest(pa.Table.from_pylist(table.to_pylist(), INDEX_SCHEMA)) == expected
    assert rows_digest(table.slice(0, 0)) == rows_digest(INDEX_SCHEMA.empty_table()) != expected


@pytest.mark.parametrize(
    ("column", "one", "other"),
    [("member", ["ab", "c"], ["a", "bc"]), ("shape", [[1, 2], [3]], [[1], [2, 3]]), ("shape", [[1], []], [[1], None]),
     ("shape", [[0], [1]], [[None], [1]]), ("dtype", [None, "a"], ["", "a"]), ("dtype", [None, "a"], ["a", None]),
     ("tokens", [0, None], [None, 0]), ("tokens", [0, None], [0, 0])],
)  # fmt: skip
def test_rows_that_only_run_together_have_other_digests(column, one, other):
    row = {"key": bytes(16), "member": "json", "offset": 0, "size_bytes": 1, "crc32": 0}
    tables = [
        pa.Table.from_pylist([{**row, column: value} for value in values], INDEX_SCHEMA) for values in (one, other)
    ]
    assert rows_digest(tables[0]) != rows_digest(tables[1])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("key", b"k" * 16), ("member", "json2"), ("offset", 512), ("size_bytes", 1), ("crc32", 0),
        ("shape", [1]), ("dtype", "float32"), ("tokens", 99), ("tokens", None),
    ],
)  # fmt: skip
def test_an_edited_row_is_noticed(shard, column, value):
    table = with_value(pq.read_table(shard.index), column, value)
    with pytest.raises(CacheError, match="name: differs from its own digest"):
        read_index(rewrite(shard.index, table), "name")


def test_rows_added_lost_or_moved_are_noticed(shard):
    table = pq.read_table(shard.index)
    for other in (table.slice(1), pa.concat_tables([table, table]), table.take([1, 0, *range(2, len(table))])):
        with pytest.raises(CacheError, match="digest"):
            read_index(rewrite(shard.index, other), "name")


@pytest.mark.parametrize("change", [{"part": "ab" * 16}, {"tar_size_bytes": 9**9}, {"tar_sha256": "ab" * 32}, {"x": 1}])
def test_an_edited_fact_is_noticed(shard, change):
    with pytest.raises(CacheError, match="digest"):
        read_index(rewrite(shard.index, pq.read_table(shard.index), **change), "name")


def test_a_flipped_bit_is_noticed_or_changes_nothing(shard):
    data = shard.index.read_bytes()
    expected = read_index(data, "index")
    rng = random.Random(0)
    noticed = 0
    places = range(0, len(data), 3)
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        try:
            table, told = read_index(bytes(flipped), "index")
        except CacheError:
            noticed += 1
            continue
        assert (table.to_pylist(), told) == (expected[0].to_pylist(), expected[1])
    assert noticed > len(places) / 4


def test_a_torn_index_is_refused(shard):
    data = shard.index.read_bytes()
    for size_bytes in (0, 1, 4, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(CacheError, match="name: not a shard index"):
            read_index(data[:size_bytes], "name")


def test_other_columns_are_refused(shard):
    table = pq.read_table(shard.index)
    wide = table.set_column(2, "offset", table["offset"].cast(pa.float64()))
    for other in (table.drop_columns(["tokens"]), table.append_column("more", table["offset"]), wide):
        with pytest.raises(CacheError, match="name: other columns than a shard index has"):
            read_index(rewrite(shard.index, other), "name")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused_by_name(shard, version):
    table = pq.read_table(shard.index)
    for other in (table, table.select(["key"])):
        with pytest.raises(CacheError, match=f"name: format version {version}; this program reads 1"):
            read_index(rewrite(shard.index, other, format_version=version), "name")


def test_a_parquet_file_that_is_no_index_is_refused():
    for metadata in (None, {b"latentreel": b"{"}, {b"latentreel": b"[]"}, {b"latentreel": b"[" * 100_000}):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), buffer)
        with pytest.raises(CacheError, match="not a shard index"):
            read_index(buffer.getvalue(), "name")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", -1), ("offset", -(2**63)), ("offset", 2**63 - 1), ("offset", 10**9),
        ("size_bytes", 0), ("size_bytes", -5), ("size_bytes", 2**63 - 1), ("size_bytes", 10**6),
        ("offset", None), ("size_bytes", None), ("crc32", None), ("member", None), ("key", None),
    ],
)  # fmt: skip
def test_a_forged_place_outside_the_tar_is_refused(shard, column, value):
    """The digest is no secret: whoever makes up a row can make up its digest."""
    table = with_value(pq.read_table(shard.index), column, value)
    with pytest.raises(CacheError, match="name: ") as error:
        read_index(forge(shard.index, table), "name")
    assert len(str(error.value).splitlines()) == 1


def forge(index: Path, table: pa.Table, **changes) -> bytes:
    try:
        return rewrite(index, table, digest=True, **changes)
    except AttributeError:  # a null key has no digest
        return rewrite(index, table, **changes)


@pytest.mark.parametrize(
    "change", [{"part": "../../etc/passwd"}, {"part": None}, {"part": 7}, {"tar_size_bytes": "many"},
               {"tar_size_bytes": 2**70}, {"tar_size_bytes": -1}, {"tar_size_bytes": 0}, {"tar_size_bytes": None}]
)  # fmt: skip
def test_forged_facts_are_refused(shard, change):
    with pytest.raises(CacheError, match=r"name: (names no part|a member lies outside)"):
        read_index(forge(shard.index, pq.read_table(shard.index), **change), "name")


@pytest.mark.parametrize(
    "change",
    [{"part": "../../../etc/x"}, {"part": "AB" * 16}, {"part": None}, {"offset": -1}, {"offset": "0"},
     {"offset": 2**64}, {"size_bytes": -1}, {"size_bytes": 1.5}, {"size_bytes": None}, {"crc32": None}, {"crc32": -1}],
)  # fmt: skip
def test_a_place_that_cannot_be_is_no_location(change):
    """Locations come from files as well: samples.parquet and dataset.json name a part and its bytes."""
    with pytest.raises(CacheError, match="cannot be where a member lies"):
        replace(Location("ab" * 16, 512, 100, 7), **change)


# Reading members.


def damage(store: Store, change) -> Location:
    """Apply `change` to the bytes of the store's tar; where the third key's moments lie."""
    place = store.location(int(store.find([KEYS[2]])[0]))
    tar = store.storage.local(f"{store.folder}/{place.part}.tar")
    data = bytearray(tar.read_bytes())
    tar.write_bytes(change(data, place))
    return place


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_byte_is_refused_and_its_file_named(store, where):
    def flip(data, place):
        data[place.offset + {"first": 0, "middle": place.size_bytes // 2, "last": place.size_bytes - 1}[where]] ^= 16
        return data

    place = damage(store, flip)
    with pytest.raises(CacheError, match=rf"{store.folder}/{place.part}\.tar: the member at {place.offset} .*crc32"):
        store.read(KEYS[2])
    assert len(read_member(store.storage, store.folder, place, check=False)) == place.size_bytes
    np.testing.assert_array_equal(decode_array(store.read(KEYS[3]), "moments"), moments(3))


def test_a_truncated_tar_is_refused_and_named(store):
    place = damage(store, lambda data, place: data[: place.offset + 40])
    with pytest.raises(CacheError, match=rf"{place.part}\.tar: holds 40 of the {place.size_bytes} bytes"):
        store.read(KEYS[2])


def test_a_part_that_is_gone_is_told_apart(tmp_path):
    """Training then looks the key up again; a damaged part it must not."""
    with pytest.raises(FileNotFoundError):
        read_member(Storage(str(tmp_path)), "latents/x", Location("ab" * 16, 512, 100, 7))


# Arrays.


@given(arrays.arrays(st.sampled_from(FLOATS), arrays.array_shapes(max_dims=6), elements=st.just(1.5)))
def test_arrays_come_back_as_numpy_reads_them(array):
    payload = encode_array(array)
    ours, theirs = decode_array(payload, "name"), np.load(io.BytesIO(payload), allow_pickle=False)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (array.dtype, array.shape)
    assert ours.tobytes() == array.tobytes()


def test_arrays_keep_every_bit():
    array = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(16, 16, 256)  # NaNs and infinities too
    assert decode_array(encode_array(array), "name").tobytes() == array.tobytes()


@pytest.mark.parametrize("order", [lambda a: a.T, lambda a: np.asfortranarray(a), lambda a: a[::2, ::-1]])
def test_views_are_written_as_what_they_show(order):
    view = order(np.arange(24, dtype=np.float32).reshape(4, 6))
    np.testing.assert_array_equal(decode_array(encode_array(view), "name"), view)


def test_arrays_are_not_copied_and_cannot_be_written_to():
    payload = encode_array(moments(0))
    array = decode_array(payload, "name")
    assert np.shares_memory(array, np.frombuffer(payload, np.uint8))
    assert not array.flags.writeable


def test_objects_are_not_written():
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        encode_array(np.array([{}], dtype=object))


def npy(header: str, body: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode() + b" " * (53 - len(header) % 64 % 53) + b"\n"
    size_bytes = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size_bytes + text + body


def header(descr: str = "'<f2'", fortran: str = "False", shape: str = "(2, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def test_the_forger_of_these_tests_can_write_an_array():
    np.testing.assert_array_equal(np.load(io.BytesIO(npy(header(), bytes(12)))), np.zeros((2, 3)))
    np.testing.assert_array_equal(decode_array(npy(header(), bytes(12)), "name"), np.zeros((2, 3)))


@pytest.mark.parametrize(
    "payload",
    [
        npy(header(shape="(1000000000, 1000000000)"), bytes(12)),
        npy(header(shape=f"({2**62}, 4)"), bytes(12)),
        npy(header(shape="(" + "9" * 3000 + ",)"), bytes(12)),
        npy(header(shape="(0, 3)")),
        npy(header(shape="(-2, -3)"), bytes(12)),
        npy(header(shape="(True, 6)"), bytes(12)),
        npy(header(shape="(6L,)"), bytes(12)),
        npy(header(shape="(" + "1, " * 70 + "6)"), bytes(12)),
        npy(header(), bytes(11)),
        npy(header(), bytes(13)),
        npy(header(), bytes(12), version=(2, 0)),
        npy(header(), bytes(12), version=(3, 0)),
        npy(header(), bytes(12))[:9],
        npy(header(), bytes(12))[:60],
        npy(header(fortran="True"), bytes(12)),
        npy(header("'|O'"), b"\x80\x04N."),
        npy(header("'<i8'"), bytes(48)),
        npy(header("'<c8'"), bytes(48)),
        npy(header("'>f2'"), bytes(12)),
        npy(header("[('a', '<f2')]"), bytes(12)),
        npy(header("('<f2', (1000000000,))"), bytes(12)),
        npy("{[]: 1}"),
        npy("(" * 200),
        npy("-" * 3000 + "1"),
        npy("'''"),
        npy("{1: 2, 'a': 3}"),
        npy("__import__('os').system('true')"),
        b"",
        b"PK\x03\x04",
        b"\x80\x04N.",
        b"\x93NUMPY\x01\x00\xff\xff" + header().encode() + b"\n" + bytes(12),
    ],
    ids=range(31),
)
def test_hostile_arrays_are_refused_in_one_line(payload):
    with pytest.raises(CacheError, match=r"^the name: ") as error:
        decode_array(payload, "the name")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500


def test_a_claimed_size_is_not_set_aside(store):
    """2 GB, which a machine has and would give."""
    place = store.location(int(store.find([KEYS[0]])[0]))
    payload = npy(header(shape="(1000000, 1000)"), bytes(12))
    tracemalloc.start()
    with pytest.raises(CacheError):
        decode_array(payload, "name")
    with pytest.raises(CacheError):
        read_member(store.storage, store.folder, replace(place, size_bytes=2 * 10**9))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@given(st.data())
def test_any_flip_in_a_header_is_refused_or_harmless(data):
    array = moments(1)
    payload = bytearray(encode_array(array))
    payload[data.draw(st.integers(0, len(payload) - array.nbytes - 1))] = data.draw(st.integers(0, 255))
    try:
        read = decode_array(bytes(payload), "name")
    except CacheError:
        return
    assert read.tobytes() == array.tobytes()
    assert sorted(read.shape) == sorted(array.shape)


# Leaving.


def test_an_abandoned_part_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add(KEYS[0], {"moments.npy": moments(0)})
    assert len(list(tmp_path.iterdir())) == 1
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
