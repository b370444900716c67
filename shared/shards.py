"""Parts of a store: a plain WebDataset tar, its Parquet index, and reading one member by its place.

    <part>.tar       KEY.moments.npy  KEY.preview.jpg  KEY.json  ...   (KEY: 32 hex digits)
    <part>.parquet   a row per member: where it lies, how long, its crc32, its shape

A part is named by the digest of its finished tar. The tar is published first, then the index: an index means
"complete". Arrays are `.npy`, never pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.errors import CacheError
from shared.storage import Storage, canonical_json, digest_of

FORMAT_VERSION = 1
PART_DIGITS = 32  # hex digits of a part's name
MAX_MEMBERS = 1 << 20  # of a part; a few bytes of Parquet can claim billions
FILE_DIGEST = b"latentreel_sha256"  # in an index's metadata: of the file, taken while NO_DIGEST stood there
NO_DIGEST = b"0" * 64
# The .npy files that we and numpy write of an array of numbers: version 1.0, little-endian floats, C order. Others are
# refused here, unread: numpy's own reader of headers evaluates them.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)(\{'descr': '(<f[248])', 'fortran_order': False, "
    rb"'shape': \(((?:[1-9][0-9]{0,9}, ){0,7}[1-9][0-9]{0,9},?)\), \} *\n)",
    re.DOTALL,
)

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("member", pa.string()),  # what follows the key in the tar: moments.npy, preview.jpg, json, ...
        ("offset", pa.int64()),  # of the member's first byte in the tar
        ("size_bytes", pa.int64()),
        ("crc32", pa.uint32()),
        ("shape", pa.list_(pa.int32())),  # of an array, else null
        ("dtype", pa.string()),  # of an array, else null
        ("tokens", pa.int32()),  # of a prompt, before truncation, else null
    ]
)
NEVER_NULL = ("key", "member", "offset", "size_bytes", "crc32")


@dataclass(frozen=True)
class Location:
    """Where the bytes of a member lie: in which part, from which byte on, how many, and their checksum."""

    part: str
    offset: int
    size_bytes: int
    crc32: int

    def __post_init__(self) -> None:
        numbers = (self.offset, self.size_bytes, self.crc32)
        if not _is_part(self.part) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise CacheError(f"{self}: cannot be where a member lies; run stage 1 again")


@dataclass(frozen=True)
class Shard:
    """A finished part in a writer's folder, not yet published."""

    part: str
    tar: Path
    index: Path
    size_bytes: int


class ShardWriter:
    """Collects members into one part.

    Args:
        folder: the writer's own folder; nothing is visible to others until the part is published.
    """

    def __init__(self, folder: Path) -> None:
        import webdataset  # late: it imports torch

        self._path = folder / "unfinished.tar"
        self._file = self._path.open("wb")
        # same input, same bytes; not 0.0: a float takes a PAX header of 1 KiB for each member
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0, compress=False)
        self._rows: list[dict[str, Any]] = []

    @property
    def keys(self) -> int:
        """How many keys were added."""
        return len({row["key"] for row in self._rows})

    def add(self, key: bytes, members: dict[str, np.ndarray | bytes], tokens: int | None = None) -> None:
        """Add the members of one key: arrays as `.npy`, bytes as they are.

        Args:
            key: 16 bytes.
            members: `moments.npy` -> array, `json` -> bytes, ...
            tokens: of a prompt, before truncation.
        """
        payloads = {name: encode_array(value) if isinstance(value, np.ndarray) else value
                    for name, value in members.items()}  # fmt: skip
        self._tar.write({"__key__": key.hex(), **payloads})
        for name in sorted(payloads):
            value = members[name]
            array = value if isinstance(value, np.ndarray) else None
            self._rows.append(
                {
                    "key": key,
                    "member": name,
                    "crc32": zlib.crc32(payloads[name]),
                    "shape": None if array is None else list(array.shape),
                    "dtype": None if array is None else array.dtype.name,
                    "tokens": tokens,
                }
            )

    def finish(self) -> Shard:
        """Close the tar, write its index, flush both to the disk."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        part = digest[:PART_DIGITS]
        with tarfile.open(self._path, "r:") as tar:
            places = {member.name: (member.offset_data, member.size) for member in tar}
        for row in self._rows:
            row["offset"], row["size_bytes"] = places[f"{row['key'].hex()}.{row['member']}"]
        tar_path = self._path.rename(self._path.with_name(f"{part}.tar"))
        size_bytes = tar_path.stat().st_size
        index = tar_path.with_suffix(".parquet")
        write_index(index, self._rows, {"part": part, "tar_sha256": digest, "tar_size_bytes": size_bytes})
        return Shard(part, tar_path, index, size_bytes)

    def abandon(self) -> None:
        """Close and remove what was written."""
        for file in (self._tar, self._file):  # in this order: a tar that is closed later writes its end
            with suppress(OSError):  # of a disk that is full
                file.close()
        self._path.unlink(missing_ok=True)


def write_index(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write a part's index and flush it to the disk.

    Its metadata hold `facts`, the digest of them and its rows, and the digest of the file with that place zeroed.
    """
    table = pa.Table.from_pylist(rows, INDEX_SCHEMA)
    facts = {"format_version": FORMAT_VERSION, **facts}
    facts["index_sha256"] = index_digest(table, facts)
    buffer, options = io.BytesIO(), {"compression": "zstd", "write_page_checksum": True, "store_schema": False}
    with pq.ParquetWriter(buffer, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"latentreel": canonical_json(facts), FILE_DIGEST: NO_DIGEST})
    data = buffer.getvalue()
    assert data.count(NO_DIGEST) == 1
    with path.open("wb") as file:
        file.write(data.replace(NO_DIGEST, hashlib.sha256(data).hexdigest().encode()))
        file.flush()
        os.fsync(file.fileno())


def read_index(data: bytes, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """A part's index and the facts in its metadata.

    Args:
        data: the bytes of the Parquet file.
        name: what to call it in messages.

    Raises:
        CacheError: it is not an index of this format, or differs from its own digest, or promises what cannot be.
    """
    repair = "; run `python -m preprocess.verify CACHE --repair`"
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        facts = json.loads((file.schema_arrow.metadata or {})[b"latentreel"])
        version = facts["format_version"]
        members = file.metadata.num_rows
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise CacheError(f"{name}: not a shard index ({type(error).__name__}){repair}") from error
    if version != FORMAT_VERSION:
        raise CacheError(f"{name}: format version {version}; this program reads {FORMAT_VERSION}")
    if members > MAX_MEMBERS:
        raise CacheError(f"{name}: claims {members} members; a part has at most {MAX_MEMBERS}{repair}")
    if not file.schema_arrow.equals(INDEX_SCHEMA):
        raise CacheError(f"{name}: other columns than a shard index has{repair}")
    try:
        table = file.read()
        whole = not any(table[column].null_count for column in NEVER_NULL)
        whole = whole and facts.get("index_sha256") == index_digest(table, facts)
    except (pa.ArrowException, ValueError, OSError):
        whole = False
    if not whole:
        raise CacheError(f"{name}: differs from its own digest{repair}")
    part, tar_size = facts.get("part"), facts.get("tar_size_bytes")
    if not _is_part(part) or type(tar_size) is not int or not 0 <= tar_size < 2**63:
        raise CacheError(f"{name}: names no part, or not its size{repair}")
    offsets, sizes = (table[column].to_numpy() for column in ("offset", "size_bytes"))
    if ((offsets < 0) | (sizes <= 0) | (sizes > tar_size - offsets)).any():
        raise CacheError(f"{name}: a member lies outside its tar of {tar_size} bytes{repair}")
    return table, facts


def is_index_as_written(data: bytes) -> bool:
    """Whether every byte of an index is as it was written, those too that change nothing of what it says."""
    try:
        told = (pq.read_schema(pa.BufferReader(data)).metadata or {}).get(FILE_DIGEST, b"")
    except (pa.ArrowException, OSError, ValueError):  # ValueError: a name that is not UTF-8
        return False
    zeroed = data.replace(told, NO_DIGEST) if len(told) == len(NO_DIGEST) else b""
    return hashlib.sha256(zeroed).hexdigest().encode() == told


def index_digest(table: pa.Table, facts: dict[str, Any]) -> str:
    """sha256 over an index: the digest of its rows and all other facts in its metadata."""
    others = {name: value for name, value in facts.items() if name != "index_sha256"}
    return digest_of([others, rows_digest(table)]).hex()


def rows_digest(table: pa.Table) -> str:
    """sha256 over the rows, independent of how Parquet lays them out: see docs/format.md.

    Over columns, not rows: opening a store digests every index, and a row at a time would be twenty times slower.
    """
    hasher = hashlib.sha256(len(table).to_bytes(8, "little"))
    for column in table.columns:
        _digest_column(hasher, column.chunks)
    return hasher.hexdigest()


def _digest_column(hasher: Any, chunks: list[pa.Array]) -> None:
    """Which values are not null, how long each of them is where lengths differ, then the values, end to end."""
    for chunk in chunks:
        hasher.update(chunk.is_valid().cast(pa.uint8()).to_numpy())
    chunks = [chunk.drop_null() for chunk in chunks]
    for chunk in chunks:
        if pa.types.is_list(chunk.type):
            hasher.update(pc.list_value_length(chunk).to_numpy())
        elif pa.types.is_string(chunk.type):
            hasher.update(pc.binary_length(chunk).to_numpy())
    if chunks and pa.types.is_list(chunks[0].type):
        _digest_column(hasher, [chunk.flatten() for chunk in chunks])
        return
    for chunk in chunks:
        hasher.update(value_bytes(chunk))


def value_bytes(array: pa.Array) -> memoryview:
    """The bytes of an array's values, end to end, without a copy: numbers, binary of one size, or text.

    A null's are any bytes where all values have one size, and may not be among texts.
    """
    *_, data = array.buffers()
    if pa.types.is_string(array.type):
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1] if offsets else (0, 0)
        start, end = int(ends[0]), int(ends[-1])
    else:
        size_bytes = array.type.bit_width // 8
        start, end = array.offset * size_bytes, (array.offset + len(array)) * size_bytes
    return memoryview(data)[start:end] if data else memoryview(b"")


def encode_array(array: np.ndarray) -> bytes:
    """The `.npy` bytes of an array."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_array(payload: bytes, name: str) -> np.ndarray:
    """The array in `.npy` bytes, read-only, without a copy; its claimed size is checked before anything is allocated.

    Raises:
        CacheError: not an array of numbers, or of another size than its header claims.
    """
    dtype, shape, start = read_npy_header(payload, name)
    if start + math.prod(shape) * dtype.itemsize != len(payload):
        raise CacheError(
            f"{name}: its header claims {dtype} {shape}, which is not its {len(payload)} bytes; "
            "run `python -m preprocess.verify`"
        )
    return np.frombuffer(payload, dtype, offset=start).reshape(shape)


def read_npy_header(payload: bytes, name: str) -> tuple[np.dtype, list[int], int]:
    """What an array's first bytes claim: its dtype, its shape, and where its values start.

    Raises:
        CacheError: not the `.npy` of an array of floats.
    """
    match = NPY_HEADER.match(payload)
    if not match or int.from_bytes(match[1], "little") != len(match[2]):
        raise CacheError(f"{name}: not an .npy array of floats; run `python -m preprocess.verify`")
    shape = [int(side) for side in match[4].split(b",") if side]
    return np.dtype(match[3].decode()), shape, match.end()


def _is_part(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(rf"[0-9a-f]{{{PART_DIGITS}}}", name) is not None


def read_member(storage: Storage, folder: str, location: Location, *, check: bool = True) -> bytes:
    """The bytes of one member.

    Args:
        folder: of the store, such as `latents/<fingerprint>`.
        check: compare with the crc32 of the index.

    Raises:
        FileNotFoundError: the part is gone: resolve the key again.
        CacheError: the part is shorter than promised, or its bytes have changed.
    """
    path = f"{folder}/{location.part}.tar"
    payload = storage.read_range(path, location.offset, location.size_bytes)
    if check and zlib.crc32(payload) != location.crc32:
        raise CacheError(
            f"{storage.full(path)}: the member at {location.offset} has changed since it was written (crc32); "
            f"run `python -m preprocess.verify {storage.url} --repair`"
        )
    return payload
