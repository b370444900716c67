"""A data set: an immutable list of samples over the stores of a cache.

    datasets/<name>/CURRENT                     names one of the versions
    datasets/<name>/versions/<digest>/
      dataset.json      what all samples have in common: the fingerprints, the model, the empty prompt
      samples.parquet   a row per sample, with the place of each of its members
      rejected.parquet  a row per clip left out, with its reason
      report.json       what the last run that published this version did
      preview.html      shows it (preprocess/preview.py); no part of the version

A version is named by the sha256 over the fingerprints and (sample_id, keys, bucket, weight) in manifest order, so that
equal data sets are one version, and training can say which it saw.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache import KEY_BYTES, Cache, Store
from shared.config import check_name
from shared.errors import CacheError
from shared.shards import FORMAT_VERSION, Location
from shared.storage import Storage, canonical_json, digest_of, fsync_folder

MEMBER_KINDS = ("latent", "mirrored", "image", "embedding")
STORE_OF = {"latent": "latents", "mirrored": "latents", "image": "images", "embedding": "embeddings"}
ROW_GROUP = 65536
BATCH_ROWS = 4096  # a divisor of ROW_GROUP: as dicts a row takes ten times what it takes in a table
DEPENDED_ON = ("fingerprints", "random_flip")  # of dataset.json, by what training sees

_KEY = pa.binary(KEY_BYTES)
SAMPLES_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("caption", pa.string()),  # as the manifest gives it
        ("effective_prompt", pa.string()),  # as the model reads it: with the id token
        ("weight", pa.float64()),
        ("source", pa.string()),  # as the manifest gives it
        ("start_s", pa.float64()),  # of the segment in the source; null: the whole
        ("end_s", pa.float64()),
        ("frame_indices", pa.list_(pa.int32())),
        ("source_fps", pa.float64()),
        ("fps", pa.float64()),
        ("source_height", pa.int32()),  # as displayed
        ("source_width", pa.int32()),
        (
            "crop",  # in the picture resized to height x width
            pa.struct([(name, pa.int32()) for name in ("top", "left", "height", "width")]),
        ),
        ("frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bucket", pa.string()),
        ("latent_key", _KEY),
        ("mirrored_key", _KEY),  # null without --random_flip
        ("image_key", _KEY),  # null for text-to-video
        ("embedding_key", _KEY),
        ("tokens", pa.int32()),  # before truncation
        ("truncated", pa.bool_()),
    ]
    + [
        (f"{kind}_{fact}", kind_type)
        for kind in MEMBER_KINDS
        for fact, kind_type in (
            ("part", pa.string()), ("offset", pa.int64()), ("size_bytes", pa.int64()), ("crc32", pa.uint32()),
        )
    ]
)  # fmt: skip

REJECTED_SCHEMA = pa.schema(
    [("source", pa.string()), ("caption", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


def sample_id(source: str, start_s: float | None, end_s: float | None, mirrored: bool, occurrence: int = 0) -> str:
    """A stable name of a sample: 32 hex digits over its source, segment and mirror; not a row number.

    Args:
        occurrence: how many rows before it in the manifest have the same source and segment (other captions).
    """
    segment = [None if time_s is None else float(time_s) for time_s in (start_s, end_s)]
    facts: list[Any] = ["sample", source, *segment, mirrored]
    return digest_of([*facts, occurrence] if occurrence else facts, KEY_BYTES).hex()


class VersionDigest:
    """The name of a version: sha256, hex, over what training depends on, in manifest order.

    Args:
        info: dataset.json: its fingerprints tell one encoding of a key from another.
    """

    def __init__(self, info: dict[str, Any]) -> None:
        facts = (info.get(name) for name in DEPENDED_ON)
        self._hasher = hashlib.sha256(canonical_json(["dataset", FORMAT_VERSION, *facts]))
        self.samples = 0

    def add(self, row: dict[str, Any]) -> None:
        """Take the next sample's row."""
        keys = [None if row[f"{kind}_key"] is None else row[f"{kind}_key"].hex() for kind in MEMBER_KINDS]
        self._hasher.update(canonical_json([row["sample_id"], *keys, row["bucket"], float(row["weight"])]))
        self.samples += 1

    def hexdigest(self) -> str:
        """The name, of the rows so far."""
        return self._hasher.hexdigest()


def version_digest(info: dict[str, Any], samples: Iterable[dict[str, Any]]) -> str:
    """The name of a version of these samples."""
    digest = VersionDigest(info)
    for row in samples:
        digest.add(row)
    return digest.hexdigest()


def publish_dataset(
    cache: Cache,
    writer: Path,
    name: str,
    info: dict[str, Any],
    samples: Iterable[dict[str, Any]],
    rejected: Iterable[dict[str, Any]],
    report: Callable[[], dict[str, Any]],
) -> str:
    """Write a version and make it the current one of its name. Returns the version's digest.

    Few rows are in memory at a time. Publishing equal samples again keeps the version and renews the places of its
    members, its rejected and its report.

    Args:
        writer: the writer's folder, where the version is built.
        info: for dataset.json; `name`, `digest`, `format_version` and `samples` are added.
        samples: rows of SAMPLES_SCHEMA in manifest order.
        report: for report.json; asked once all rows are taken.
    """
    build = writer / "dataset"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir()
    version = VersionDigest(info)
    _write_table(build / "samples.parquet", samples, SAMPLES_SCHEMA, version.add)
    _write_table(build / "rejected.parquet", rejected, REJECTED_SCHEMA)
    digest = version.hexdigest()
    info = {"format_version": FORMAT_VERSION, "name": name, "digest": digest, "samples": version.samples, **info}
    (build / "report.json").write_text(json.dumps(report(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (build / "dataset.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in build.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    fsync_folder(build)
    _publish_folder(cache.storage, build, f"datasets/{name}/versions/{digest}")
    cache.storage.write(f"datasets/{name}/CURRENT", digest.encode() + b"\n", writer)
    return digest


def _publish_folder(storage: Storage, build: Path, folder: str) -> None:
    """Give a finished folder its name at once; file by file where it has one already, or renaming cannot be done."""
    if storage.is_local:
        target = storage.local(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.rename(target)
            fsync_folder(target.parent)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    for file in sorted(build.iterdir(), key=lambda file: (file.name == "dataset.json", file.name)):  # it comes last
        storage.publish(file, f"{folder}/{file.name}")


def _write_table(
    path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, note: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Write rows in groups of ROW_GROUP, of which few are Python's at a time; `note` is told of each."""
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        waiting: list[dict[str, Any]] = []
        batches: list[pa.RecordBatch] = []

        def write_group() -> None:
            writer.write_table(pa.Table.from_batches(batches, schema), row_group_size=ROW_GROUP)
            batches.clear()

        for row in rows:
            if note:
                note(row)
            waiting.append(row)
            if len(waiting) == BATCH_ROWS:
                batches.append(pa.RecordBatch.from_pylist(waiting, schema))
                waiting.clear()
                if len(batches) * BATCH_ROWS == ROW_GROUP:
                    write_group()
        if waiting:
            batches.append(pa.RecordBatch.from_pylist(waiting, schema))
        if batches:
            write_group()


@dataclass(frozen=True)
class DataSet:
    """One version of a data set, opened for reading.

    Attributes:
        info: dataset.json.
    """

    cache: Cache
    name: str
    digest: str
    info: dict[str, Any]

    @property
    def folder(self) -> str:
        """Relative to the cache."""
        return f"datasets/{self.name}/versions/{self.digest}"

    @cached_property
    def _file(self) -> pq.ParquetFile:
        path = f"{self.folder}/samples.parquet"
        storage = self.cache.storage
        try:
            source = storage.local(path) if storage.is_local else pa.BufferReader(storage.read(path))
            file = pq.ParquetFile(source, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: not UTF-8
            raise CacheError(f"{storage.full(path)}: cannot be read ({error}); run stage 1 again for it") from error
        if not file.schema_arrow.equals(SAMPLES_SCHEMA):
            raise CacheError(f"{storage.full(path)}: other columns than format version {FORMAT_VERSION} has")
        return file

    @contextmanager
    def _reading(self) -> Iterator[pq.ParquetFile]:
        """samples.parquet, opened; what is wrong with it is a CacheError."""
        try:
            yield self._file
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: not UTF-8
            path = self.cache.storage.full(f"{self.folder}/samples.parquet")
            raise CacheError(f"{path}: cannot be read ({error}); run stage 1 again for it") from error

    @property
    def num_rows(self) -> int:
        """How many samples there are."""
        return int(self._file.metadata.num_rows)

    def columns(self, *names: str) -> pa.Table:
        """Some columns of samples.parquet, in manifest order."""
        with self._reading() as file:
            return file.read(columns=list(names))

    def batches(self, *names: str, rows: int = ROW_GROUP) -> Iterator[pa.RecordBatch]:
        """Some columns of samples.parquet in pieces, in manifest order; one row group is in memory at a time."""
        with self._reading() as file:
            for group in range(file.num_row_groups):  # not iter_batches: it keeps a gigabyte of ten million rows
                yield from file.read_row_group(group, list(names), use_threads=True).to_batches(rows)

    def rows(self, *names: str) -> Iterator[dict[str, Any]]:
        """Some columns of samples.parquet as rows, in manifest order; few are in memory at a time."""
        with self._reading():
            for batch in self.batches(*names, rows=BATCH_ROWS):
                yield from batch.to_pylist()

    def store_folder(self, kind: str) -> str:
        """The folder, relative to the cache, of the parts of a kind of member (`latent`, `embedding`, ...).

        Raises:
            CacheError: dataset.json names none.
        """
        store = STORE_OF[kind]
        told = self.info.get("fingerprints")
        fingerprint = told.get(store) if isinstance(told, dict) else None
        if not re.fullmatch(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", str(fingerprint)):
            path = self.cache.storage.full(f"{self.folder}/dataset.json")
            raise CacheError(f"{path}: fingerprint of {store} is {fingerprint!r}; run stage 1 again")
        return f"{store}/{fingerprint}"

    def open_store(self, kind: str) -> Store:
        """The store that holds a kind of member (`latent`, `embedding`, ...), with its indexes read.

        Raises:
            CacheError: dataset.json names none, or its facts are not those of the fingerprint.
        """
        folder, told = self.store_folder(kind), self.info.get("facts")
        facts = told.get(STORE_OF[kind]) if isinstance(told, dict) else None
        if not isinstance(facts, dict) or f"{STORE_OF[kind]}/{digest_of(facts, KEY_BYTES).hex()}" != folder:
            path = self.cache.storage.full(f"{self.folder}/dataset.json")
            raise CacheError(f"{path}: its facts of {STORE_OF[kind]} do not have its fingerprint; run stage 1 again")
        known = {name: value for name, value in facts.items() if name not in ("kind", "format_version")}
        return self.cache.store(STORE_OF[kind], known)


def open_dataset(cache: Cache, name: str, digest: str | None = None) -> DataSet:
    """A version of a data set; the current one when no digest is given.

    Raises:
        CacheError: there is none; names those that there are.
    """
    storage = cache.storage
    check_name(name)
    if digest is None:
        try:
            digest = storage.read(f"datasets/{name}/CURRENT").decode(errors="replace").strip()
        except FileNotFoundError as error:
            known = [known for known in storage.names("datasets") if storage.exists(f"datasets/{known}/CURRENT")]
            hint = f"it has {', '.join(known)}" if known else "it has none; run `python -m preprocess` first"
            raise CacheError(f"{cache.url}: no data set {name!r}; {hint}") from error
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CacheError(f"{storage.full(f'datasets/{name}')}: {digest!r} is no version; run stage 1 again")
    path = f"datasets/{name}/versions/{digest}/dataset.json"
    try:
        info = json.loads(storage.read(path))
    except FileNotFoundError as error:
        raise CacheError(f"{storage.full(path)}: is missing; run stage 1 again") from error
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{storage.full(path)}: not JSON ({error}); run stage 1 again") from error
    if not isinstance(info, dict) or info.get("format_version") != FORMAT_VERSION or info.get("digest") != digest:
        raise CacheError(f"{storage.full(path)}: not a data set of format version {FORMAT_VERSION}; run stage 1 again")
    return DataSet(cache, name, digest, info)


def location_columns(kind: str) -> list[str]:
    """The columns of samples.parquet that tell where a kind of member lies."""
    return [f"{kind}_{fact}" for fact in ("part", "offset", "size_bytes", "crc32")]


def location_row(kind: str, location: Location | None) -> dict[str, Any]:
    """The values of `location_columns`; nulls for a member that the sample does not have."""
    values = (None,) * 4 if location is None else (
        location.part, location.offset, location.size_bytes, location.crc32,
    )  # fmt: skip
    return dict(zip(location_columns(kind), values, strict=True))
