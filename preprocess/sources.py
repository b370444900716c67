"""What was learnt of each source video: its digest, its times and size, and what was wrong with it.

Kept in `CACHE/sources.parquet` by (path, size, modification time), so that a second run opens no video that it knows
and does not wait for the same hang again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from preprocess.decode import DecodePool
from preprocess.manifest import Record
from preprocess.probe import Probe
from preprocess.video import PIXELS_VERSION
from shared.cache import Cache
from shared.errors import CacheError, ManifestError, VideoError
from shared.storage import FileLock, Storage, canonical_json

FILE = "sources.parquet"
SAVE_SECONDS = 300  # a run that is killed has this much to learn again, at most
SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # absolute path
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("pixels_version", pa.int32()),  # of the code that learnt this
        ("digest", pa.string()),  # sha256 of the file's bytes
        ("probe", pa.string()),  # JSON; null when the probe failed
        ("pts", pa.list_(pa.int64())),  # presentation times of the probe, apart because they pack well
        ("verdicts", pa.string()),  # JSON: latent key or "probe" -> [reason, detail]
    ]
)


@dataclass
class Source:
    """A video file and what is known of it.

    Attributes:
        verdicts: reason and detail of what failed: under `probe`, or under the key of the clip that was read.
    """

    path: str
    size: int
    mtime_ns: int
    digest: str
    probe: Probe | None = None
    verdicts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def require_probe(self) -> Probe:
        """The probe.

        Raises:
            VideoError: it failed.
        """
        if self.probe is None:
            raise VideoError(*self.verdicts["probe"])
        return self.probe

    def is_unchanged(self) -> bool:
        """Whether the file still is the one that this was learnt of, as far as its size and time tell."""
        try:
            stat = Path(self.path).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class Sources:
    """The sources that a cache knows, and those of this run.

    Args:
        cache: its `sources.parquet` is read at once.
    """

    def __init__(self, cache: Cache) -> None:
        self._storage = cache.storage
        self._known = _read(self._storage)
        self._changed: dict[str, Source] = {}  # learnt by this run since it was saved, by path
        self._saved_s = time.monotonic()

    def learn(self, records: Iterable[Record], pool: DecodePool, writer: Path, *, retry: bool) -> dict[str, Source]:
        """What is known of each record's video, by path; unknown and changed files are digested and probed.

        Args:
            writer: the writer's folder, to save by way of now and then.
            retry: forget what could not be read in an earlier run.

        Raises:
            ManifestError: a file has gone since the manifest was read.
        """
        found: dict[str, Source] = {}
        unknown: dict[str, tuple[Future[str], Future[Probe]]] = {}
        threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="digest")
        try:
            for path in dict.fromkeys(record.path for record in records):
                try:
                    stat = Path(path).stat()
                except OSError as error:
                    raise ManifestError(f"{path}: cannot be read ({error.strerror}); run again when it can") from error
                known = self._known.get(path)
                unchanged = known and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
                if known and unchanged and not (retry and known.verdicts):
                    found[path] = known
                    continue
                found[path] = Source(path, stat.st_size, stat.st_mtime_ns, "")
                unknown[path] = threads.submit(_digest, path), pool.probe(path)
            for path, (digest, probe) in tqdm(unknown.items(), desc="sources", unit="video", disable=None):
                source = found[path]
                try:
                    source.digest = digest.result()
                except OSError as error:  # no permission, or gone: not remembered, as the file itself may be right
                    source.verdicts["probe"] = ("unreadable", f"{error.strerror}")
                    continue
                try:
                    source.probe = probe.result()
                except VideoError as error:
                    source.verdicts["probe"] = (error.reason, error.detail)
                if source.is_unchanged():
                    self._remember(source, writer)
        finally:
            threads.shutdown(cancel_futures=True)
        return found

    def reject(self, source: Source, key: bytes, error: VideoError, writer: Path) -> None:
        """Remember that reading the clip `key` of a source failed, if that was the fault of the file as it is."""
        if error.reason != "non_finite" and source.is_unchanged():  # what is not finite depends on the VAE and dtype
            source.verdicts[key.hex()] = (error.reason, error.detail)
            self._remember(source, writer)

    def _remember(self, source: Source, writer: Path) -> None:
        self._changed[source.path] = source
        if time.monotonic() - self._saved_s > SAVE_SECONDS:
            self.save(writer)

    def save(self, writer: Path) -> None:
        """Write what is new to the cache's file, beside what other processes have written meanwhile.

        Remote: of two that write in the same instant one is forgotten, which costs time and nothing else.
        """
        if not self._changed:
            return
        with self._alone():
            merged = {**_read(self._storage), **self._changed}
            rows = [_row(source) for source in merged.values()]
            table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({b"rows_sha256": _rows_digest(rows)}))
            finished = writer / FILE
            with finished.open("wb") as file:
                pq.write_table(
                    table,
                    file,
                    compression="zstd",
                    use_dictionary=False,
                    column_encoding={"pts.list.element": "DELTA_BINARY_PACKED"},
                    write_page_checksum=True,
                )
                file.flush()
                os.fsync(file.fileno())
            self._storage.publish(finished, FILE)
        self._known.update(self._changed)
        self._changed, self._saved_s = {}, time.monotonic()

    def _alone(self) -> AbstractContextManager[object]:
        """Keeps others from writing the file; an object store has no locks."""
        return FileLock(self._storage.local("writers/.sources.lock")) if self._storage.is_local else nullcontext()


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _row(source: Source) -> dict[str, Any]:
    facts = None if source.probe is None else source.probe.to_dict()
    pts = None if facts is None else facts.pop("pts")
    return {
        "source": source.path,
        "size": source.size,
        "mtime_ns": source.mtime_ns,
        "pixels_version": PIXELS_VERSION,
        "digest": source.digest,
        "probe": None if facts is None else json.dumps(facts),
        "pts": pts,
        "verdicts": json.dumps(source.verdicts),
    }


def _read(storage: Storage) -> dict[str, Source]:
    """The sources in the cache's file by path; those that another version of the decoding code saw are left out."""
    path = storage.full(FILE)
    try:
        table = pq.read_table(pa.BufferReader(storage.read(FILE)), page_checksum_verification=True)
    except FileNotFoundError:
        return {}
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); remove it, what it remembers is learnt again") from error
    if not table.schema.equals(SCHEMA):
        raise CacheError(f"{path}: other columns than this version writes; remove it, it is learnt again")
    rows = table.to_pylist()
    told = (table.schema.metadata or {}).get(b"rows_sha256")
    if told != _rows_digest(rows):  # page checksums leave out the pages' headers
        raise CacheError(f"{path}: differs from its own digest; remove it, it is learnt again")
    try:
        return {row["source"]: _source(row) for row in rows if row["pixels_version"] == PIXELS_VERSION}
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise CacheError(f"{path}: a row cannot be read ({error!r}); remove it, it is learnt again") from error


def _rows_digest(rows: list[dict[str, Any]]) -> bytes:
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(canonical_json(row))
    return hasher.hexdigest().encode()


def _source(row: dict[str, Any]) -> Source:
    probe = None if row["probe"] is None else Probe.from_dict({**json.loads(row["probe"]), "pts": row["pts"]})
    verdicts = {key: (reason, detail) for key, (reason, detail) in json.loads(row["verdicts"]).items()}
    return Source(row["source"], row["size"], row["mtime_ns"], row["digest"], probe, verdicts)
