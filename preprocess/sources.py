"""What was learnt of each source video: its digest, its times and size, and what was wrong with it.

Kept in `CACHE/sources.parquet` by (path, size, modification time), so that a second run opens no video that it knows
and does not wait for the same hang again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess import files
from preprocess.decode import DecodePool
from preprocess.probe import Probe
from preprocess.video import PIXELS_VERSION
from shared.cache import Cache
from shared.console import Progress
from shared.errors import CacheError, ManifestError, VideoError
from shared.storage import FileLock, Storage, canonical_json

if TYPE_CHECKING:
    from preprocess.spool import Spool

FILE = "sources.parquet"
SAVE_SECONDS = 300  # a run that is killed has this much to learn again, or as much as saving takes ten times
ROW_GROUP = 1024  # sources in memory at a time
LOOK_AHEAD = 64  # videos that are digested and probed at a time
SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # absolute path
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),  # of a URL a stamp of what its store tells of the version
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
        size, mtime_ns: as `files.status` tells them.
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
            return files.status(self.path) == (self.size, self.mtime_ns)
        except OSError:
            return False


class Sources:
    """The sources of a run: what the cache remembers of them, and what the run learns, which it will remember.

    Args:
        spool: has the records, and is given what is known of their videos.
        writer: the writer's folder, to save by way of now and then; None: the cache will not remember.
    """

    def __init__(self, cache: Cache, spool: Spool, writer: Path | None) -> None:
        self._storage, self._spool, self._writer = cache.storage, spool, writer
        self._save_at = time.monotonic() + SAVE_SECONDS

    def learn(self, pool: DecodePool, *, retry: bool) -> None:
        """Give the spool what is known of its records' videos; unknown and changed files are digested and probed.

        Args:
            retry: forget what could not be read in an earlier run.

        Raises:
            ManifestError: a file has gone since the manifest was read.
            CacheError: what the cache remembers cannot be read.
        """
        for source in known_sources(self._storage):
            if self._spool.names(source.path):
                self._spool.put_source(source, is_new=False)
        threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="digest")
        waiting: deque[tuple[Source, Future[str], Future[Probe]]] = deque()
        try:
            found = files.statuses(self._spool.paths())
            for path, status in Progress(found, name="sources", unit="video"):
                if isinstance(status, OSError):
                    raise ManifestError(
                        f"{path}: cannot be read ({status.strerror}); run again when it can"
                    ) from status
                known = self._spool.source(path)
                unchanged = known and (known.size, known.mtime_ns) == status
                if known and unchanged and not (retry and known.verdicts):
                    continue
                source = Source(path, status[0], status[1], "")
                waiting.append((source, threads.submit(files.digest, path), pool.probe(path)))
                if len(waiting) >= LOOK_AHEAD:
                    self._learnt(*waiting.popleft())
            while waiting:
                self._learnt(*waiting.popleft())
        finally:
            threads.shutdown(cancel_futures=True)

    def _learnt(self, source: Source, digest: Future[str], probe: Future[Probe]) -> None:
        try:
            source.digest = digest.result()
            source.probe = probe.result()
        except (OSError, files.FetchError) as error:  # no permission, gone, a network: the file itself may be right
            detail = error.detail if isinstance(error, files.FetchError) else f"{error.strerror}"
            source.verdicts["probe"] = ("unreadable", detail)
            self._spool.put_source(source, is_new=False)
            return
        except VideoError as error:
            source.verdicts["probe"] = (error.reason, error.detail)
        self._remember(source)

    def reject(self, source: Source, key: bytes, error: VideoError) -> None:
        """Remember that reading the clip `key` of a source failed, if that was the fault of the file as it is."""
        if isinstance(error, files.FetchError):  # the network's fault
            return
        if error.reason != "non_finite" and source.is_unchanged():  # what is not finite depends on the VAE and dtype
            source.verdicts[key.hex()] = (error.reason, error.detail)
            self._remember(source)

    def _remember(self, source: Source) -> None:
        self._spool.put_source(source, is_new=source.is_unchanged())
        if time.monotonic() > self._save_at:
            self.save()

    def save(self) -> None:
        """Write what is new to the cache's file, beside what other processes have written meanwhile.

        Remote: of two that write in the same instant one is forgotten, which costs time and nothing else.
        """
        started = time.monotonic()
        if self._writer and next(self._spool.new_sources(), None) is not None:
            with self._alone():
                finished = self._writer / FILE
                write_sources(finished, self._merged())
                self._storage.publish(finished, FILE)
            self._spool.all_remembered()
        self._save_at = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - started))

    def _merged(self) -> Iterator[Source]:
        yield from (source for source in known_sources(self._storage) if not self._spool.is_new(source.path))
        yield from self._spool.new_sources()

    def _alone(self) -> AbstractContextManager[object]:
        """Keeps others from writing the file; an object store has no locks."""
        return FileLock(self._storage.local("writers/.sources.lock")) if self._storage.is_local else nullcontext()


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


def known_sources(storage: Storage) -> Iterator[Source]:
    """The sources in the cache's file, few in memory at a time; of other decoding code's only the digest is looked at.

    Raises:
        CacheError: the file cannot be read, or is not as it was written (told at its end).
    """
    path = storage.full(FILE)
    hasher = hashlib.sha256()
    try:
        if not storage.exists(FILE):
            return
        file = pq.ParquetFile(
            storage.local(FILE) if storage.is_local else pa.BufferReader(storage.read(FILE)),
            page_checksum_verification=True,
        )
        schema = file.schema_arrow
        if not schema.equals(SCHEMA):
            raise CacheError(f"{path}: other columns than this version writes; remove it, it is learnt again")
        with file:
            for batch in file.iter_batches(ROW_GROUP):
                for row in batch.to_pylist():
                    hasher.update(canonical_json(row))
                    if row["pixels_version"] == PIXELS_VERSION:
                        yield _source(row)
        told = (file.metadata.metadata or {}).get(b"rows_sha256")
    except FileNotFoundError:
        return
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); remove it, what it remembers is learnt again") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise CacheError(f"{path}: a row cannot be read ({error!r}); remove it, it is learnt again") from error
    if told != hasher.hexdigest().encode():  # page checksums leave out the pages' headers
        raise CacheError(f"{path}: differs from its own digest; remove it, it is learnt again")


def write_sources(path: Path, sources: Iterable[Source]) -> None:
    """Write the file of a cache's sources, and flush it to the disk."""
    hasher = hashlib.sha256()
    options: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": False,
        "column_encoding": {"pts.list.element": "DELTA_BINARY_PACKED"},
        "write_page_checksum": True,
    }
    with path.open("wb") as file:
        with pq.ParquetWriter(file, SCHEMA, **options) as writer:
            rows: list[dict[str, Any]] = []
            for source in sources:
                rows.append(_row(source))
                hasher.update(canonical_json(rows[-1]))
                if len(rows) == ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
            writer.add_key_value_metadata({b"rows_sha256": hasher.hexdigest().encode()})
        file.flush()
        os.fsync(file.fileno())


def _source(row: dict[str, Any]) -> Source:
    probe = None if row["probe"] is None else Probe.from_dict({**json.loads(row["probe"]), "pts": row["pts"]})
    verdicts = {key: (reason, detail) for key, (reason, detail) in json.loads(row["verdicts"]).items()}
    return Source(row["source"], row["size"], row["mtime_ns"], row["digest"], probe, verdicts)
