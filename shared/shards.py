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
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import CacheError
from shared.storage import Storage, canonical_json

FORMAT_VERSION = 1
PART_DIGITS = 32  # hex digits of a part's name
MAX_NPY_HEADER = 4096  # bytes; ours take 128

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


@dataclass(frozen=True)
class Location:
    """Where the bytes of a member lie: in which part, from which byte on, how many, and their checksum."""

    part: str
    offset: int
    size_bytes: int
    crc32: int


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
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0.0, compress=False)  # same input, same bytes
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
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_index(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write a part's index and flush it to the disk; its metadata hold `facts` and the digest of its rows."""
    table = pa.Table.from_pylist(rows, INDEX_SCHEMA)
    facts = {"format_version": FORMAT_VERSION, **facts, "index_sha256": rows_digest(table)}
    table = table.replace_schema_metadata({b"latentreel": canonical_json(facts)})
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
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
        table = pq.read_table(pa.BufferReader(data))
        facts = json.loads((table.schema.metadata or {})[b"latentreel"])
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise CacheError(f"{name}: not a shard index ({type(error).__name__}){repair}") from error
    if facts.get("format_version") != FORMAT_VERSION:
        raise CacheError(f"{name}: format version {facts.get('format_version')}; this program reads {FORMAT_VERSION}")
    if not table.schema.equals(INDEX_SCHEMA):
        raise CacheError(f"{name}: other columns than a shard index has{repair}")
    if facts.get("index_sha256") != rows_digest(table):
        raise CacheError(f"{name}: differs from its own digest{repair}")
    offsets, sizes = (table[column].to_numpy() for column in ("offset", "size_bytes"))
    if len(table) and ((offsets < 0) | (sizes <= 0) | (sizes > facts["tar_size_bytes"] - offsets)).any():
        raise CacheError(f"{name}: a member lies outside its tar of {facts['tar_size_bytes']} bytes{repair}")
    return table, facts


def rows_digest(table: pa.Table) -> str:
    """sha256 over the rows in order, independent of how Parquet lays them out."""
    hasher = hashlib.sha256()
    for row in table.to_pylist():
        hasher.update(canonical_json([row["key"].hex(), *list(row.values())[1:]]))
    return hasher.hexdigest()


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
    buffer = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(buffer)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer, max_header_size=MAX_NPY_HEADER)
    except ValueError as error:
        raise CacheError(f"{name}: not an .npy array ({error}); run `python -m preprocess.verify`") from error
    start = buffer.tell()
    count = 1
    for side in shape:
        count *= int(side)
    if dtype.kind != "f" or fortran or count < 0 or start + count * dtype.itemsize != len(payload):
        raise CacheError(
            f"{name}: its header claims {dtype} {shape}, which is not its {len(payload)} bytes; "
            "run `python -m preprocess.verify`"
        )
    return np.frombuffer(payload, dtype, count, start).reshape(shape)


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
