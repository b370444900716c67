"""What was learnt of each source video: its digest, its times and size, and what was wrong with it.

Kept in `CACHE/sources.parquet` by (path, size, modification time), so that a second run opens no video that it knows
and does not wait for the same hang again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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
from shared.storage import FileLock, Storage

FILE = "sources.parquet"
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


class Sources:
    """The sources that a cache knows, and those of this run.

    Args:
        cache: local; its `sources.parquet` is read at once.
    """

    def __init__(self, cache: Cache) -> None:
        self._storage = cache.storage
        self._known = _read(self._storage)
        self._changed: dict[str, Source] = {}  # learnt by this run, by path

    def learn(self, records: Iterable[Record], pool: DecodePool, *, retry: bool) -> dict[str, Source]:
        """What is known of each record's video, by path; unknown and changed files are digested and probed.

        Args:
            retry: forget what could not be read in an earlier run.

        Raises:
            ManifestError: a file has gone since the manifest was read.
        """
        found: dict[str, Source] = {}
        unknown: dict[str, tuple[Future[str], Future[Probe]]] = {}
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="digest") as threads:
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
                source.digest = digest.result()
                try:
                    source.probe = probe.result()
                except VideoError as error:
                    source.verdicts["probe"] = (error.reason, error.detail)
                self._changed[path] = source
        return found

    def reject(self, source: Source, key: bytes, error: VideoError) -> None:
        """Remember that reading the clip `key` of a source failed."""
        source.verdicts[key.hex()] = (error.reason, error.detail)
        self._changed[source.path] = source

    def save(self, writer: Path) -> None:
        """Write what is new to the cache's file, beside what other processes have written meanwhile."""
        if not self._changed:
            return
        with FileLock(self._storage.local("writers/.sources.lock")):
            merged = {**_read(self._storage), **self._changed}
            rows = [_row(source) for source in merged.values()]
            finished = writer / FILE
            pq.write_table(
                pa.Table.from_pylist(rows, SCHEMA),
                finished,
                compression="zstd",
                use_dictionary=False,
                column_encoding={"pts.list.element": "DELTA_BINARY_PACKED"},
            )
            self._storage.publish(finished, FILE)
        self._known.update(self._changed)
        self._changed = {}


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
    if not storage.exists(FILE):
        return {}
    path = storage.local(FILE)
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); remove it, what it remembers is learnt again") from error
    if not table.schema.equals(SCHEMA):
        raise CacheError(f"{path}: other columns than this version writes; remove it, it is learnt again")
    sources = {}
    for row in table.to_pylist():
        if row["pixels_version"] != PIXELS_VERSION:
            continue
        probe = None if row["probe"] is None else Probe.from_dict({**json.loads(row["probe"]), "pts": row["pts"]})
        verdicts = {key: (reason, detail) for key, (reason, detail) in json.loads(row["verdicts"]).items()}
        sources[row["source"]] = Source(row["source"], row["size"], row["mtime_ns"], row["digest"], probe, verdicts)
    return sources
