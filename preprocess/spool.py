"""What a run of stage 1 knows of its clips, on the disk: host memory does not grow with their number.

    records   the manifest's rows               sources   their videos, by path
    clips     what became of the records        refused   keys of clips that could not be read or encoded
    jobs      clips to read, each once          prompts   texts to have, each once

The file belongs to the process alone, has no name and goes with it (SQLite's temporary database).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from preprocess.frames import Placement
from preprocess.manifest import Record
from preprocess.plan import Rejected, Sample
from preprocess.probe import Probe
from preprocess.sources import Source
from preprocess.tally import open_database
from shared.errors import VideoError
from shared.geometry import Bucket

T = TypeVar("T")
KEYS = ("latent_key", "mirrored_key", "embedding_key", "image_key")
_SCHEMA = """
    CREATE TABLE records (row INTEGER PRIMARY KEY, path TEXT, facts TEXT);
    CREATE INDEX record_paths ON records (path);
    CREATE TABLE sources (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest TEXT, probe TEXT, pts BLOB,
                          verdicts TEXT, is_new INTEGER) WITHOUT ROWID;
    CREATE TABLE clips (row INTEGER PRIMARY KEY, record INTEGER, latent_key BLOB, image_key BLOB, facts TEXT,
                        reason TEXT, detail TEXT);
    CREATE TABLE refused (latent_key BLOB PRIMARY KEY, reason TEXT, detail TEXT) WITHOUT ROWID;
    CREATE TABLE jobs (row INTEGER PRIMARY KEY, latent_key BLOB UNIQUE, clip INTEGER, plain INTEGER, mirrored INTEGER,
                       image INTEGER);
    CREATE TABLE prompts (row INTEGER PRIMARY KEY, key BLOB UNIQUE, text TEXT, missing INTEGER);
    BEGIN;
"""


# A clip is rejected by its own reason or by its key's.
_OUTCOMES = """
    FROM (SELECT clips.*, ifnull(clips.reason, refused.reason) AS why, ifnull(clips.detail, refused.detail) AS told
          FROM clips LEFT JOIN refused USING (latent_key)) AS clips"""
_ORDER = "ORDER BY row"


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@dataclass(frozen=True)
class Job:
    """A clip to read once, and what is to be made of it.

    Attributes:
        keys: of the moments to make, by mirrored or not; none, one or both.
        image_key: of its first frame, where that is to make.
    """

    sample: Sample
    source: Source
    keys: dict[bool, bytes]
    image_key: bytes | None

    @property
    def frame_indices(self) -> list[int]:
        """The frames to read: the first one alone is enough for an image."""
        return self.sample.frame_indices if self.keys else self.sample.frame_indices[:1]


class Spool:
    """The clips of a run; everything comes out in the order in which it went in."""

    def __init__(self) -> None:
        self._database = open_database(_SCHEMA)
        self._recent: dict[str, Source] = {}  # clips of a video follow each other, and share what is known of it

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    # Records, and the videos that they name

    def add_record(self, row: int, record: Record) -> None:
        """Take a record of the manifest; `row` is its place there."""
        facts = json.dumps(asdict(record))
        self._database.execute("INSERT INTO records VALUES (?, ?, ?)", (row, record.path, facts))

    def records(self) -> Iterator[tuple[int, Record]]:
        """The records, each with its place in the manifest."""
        for row, facts in self._database.execute("SELECT row, facts FROM records ORDER BY row"):
            yield row, Record(**json.loads(facts))

    def paths(self) -> Iterator[str]:
        """The path of each video, once."""
        for path, _ in self._database.execute(
            "SELECT path, min(row) AS first FROM records GROUP BY path ORDER BY first"
        ):
            yield path

    def names(self, path: str) -> bool:
        """Whether a record names this video."""
        return self._database.execute("SELECT 1 FROM records WHERE path = ? LIMIT 1", (path,)).fetchone() is not None

    def put_source(self, source: Source, *, is_new: bool) -> None:
        """Keep what is known of a video; `is_new`: the cache's memory does not have it yet."""
        probe = None if source.probe is None else source.probe.to_dict()
        pts = None if probe is None else np.asarray(probe.pop("pts"), np.int64).tobytes()
        told = (None if probe is None else json.dumps(probe), pts, json.dumps(source.verdicts), is_new)
        values = (source.path, source.size, source.mtime_ns, source.digest, *told)
        self._database.execute("INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        self._recent.pop(source.path, None)

    def source(self, path: str) -> Source | None:
        """What is known of a video."""
        if path not in self._recent:
            row = self._database.execute("SELECT * FROM sources WHERE path = ?", (path,)).fetchone()
            if row is None:
                return None
            if len(self._recent) >= 8:
                del self._recent[next(iter(self._recent))]
            self._recent[path] = _source(row)
        return self._recent[path]

    def new_sources(self) -> Iterator[Source]:
        """The videos that the cache's memory does not have yet."""
        for row in self._database.execute("SELECT * FROM sources WHERE is_new ORDER BY path"):
            yield _source(row)

    def is_new(self, path: str) -> bool:
        """Whether the cache's memory does not have this video yet, or as something else."""
        query = "SELECT 1 FROM sources WHERE path = ? AND is_new"
        return self._database.execute(query, (path,)).fetchone() is not None

    def all_remembered(self) -> None:
        """From now on the cache's memory has all of the videos."""
        self._database.execute("UPDATE sources SET is_new = 0 WHERE is_new")

    # Clips, and what is missing of them

    def add_clip(self, record_row: int, clip: Sample | Rejected) -> None:
        """Take what became of a record; a record may become several clips."""
        if isinstance(clip, Rejected):
            told = json.dumps({"record": asdict(clip.record)})
            values: tuple[Any, ...] = (record_row, None, None, told, clip.reason, clip.detail)
        else:
            values = (record_row, clip.latent_key, clip.image_key, _pack(clip), None, None)
        self._database.execute("INSERT INTO clips VALUES (NULL, ?, ?, ?, ?, ?, ?)", values)

    def samples(self) -> Iterator[tuple[int, int, Sample]]:
        """The clips that stand, each with its own number and its record's place in the manifest."""
        query = f"SELECT row, record, facts {_OUTCOMES} WHERE why IS NULL {_ORDER}"
        for row, record_row, facts in self._database.execute(query):
            yield row, record_row, self._sample(facts)

    def rejected(self) -> Iterator[tuple[int, Rejected]]:
        """The clips that do not, each with its record's place in the manifest."""
        query = f"SELECT record, facts, why, told {_OUTCOMES} WHERE why IS NOT NULL {_ORDER}"
        for record_row, facts, reason, detail in self._database.execute(query):
            yield record_row, Rejected(Record(**json.loads(facts)["record"]), reason, detail)

    def rejections(self) -> dict[str, int]:
        """How many clips are rejected, by reason."""
        query = f"SELECT why, count(*) {_OUTCOMES} WHERE why IS NOT NULL GROUP BY why"
        return dict(self._database.execute(query))

    def counts(self) -> tuple[int, int]:
        """How many clips stand, and how many are rejected."""
        (count,) = self._database.execute("SELECT count(*) FROM clips").fetchone()
        rejected = sum(self.rejections().values())
        return int(count) - rejected, rejected

    def distinct(self, key: str) -> int:
        """How many different keys, `latent_key` or `image_key`, the clips that stand have."""
        query = f"SELECT count(DISTINCT {key}) {_OUTCOMES} WHERE why IS NULL"
        ((count,),) = self._database.execute(query)
        return int(count)

    def refuse(self, latent_key: bytes, error: VideoError) -> None:
        """Reject every clip of this key."""
        self._database.execute(
            "INSERT OR REPLACE INTO refused VALUES (?, ?, ?)", (latent_key, error.reason, error.detail)
        )

    def add_job(self, clip: int, sample: Sample, *, plain: bool, mirrored: bool, image: bool) -> None:
        """Have a clip read, once however many clips have its key; equal keys lack the same."""
        values = (sample.latent_key, clip, plain, mirrored, image)
        self._database.execute("INSERT OR IGNORE INTO jobs VALUES (NULL, ?, ?, ?, ?, ?)", values)

    @property
    def job_count(self) -> int:
        """Clips to read."""
        (count,) = self._database.execute("SELECT count(*) FROM jobs").fetchone()
        return int(count)

    def jobs(self) -> Iterator[Job]:
        """The clips to read."""
        query = "SELECT facts, plain, mirrored, image FROM jobs JOIN clips ON clips.row = jobs.clip ORDER BY jobs.row"
        for facts, plain, mirrored, image in self._database.execute(query):
            sample = self._sample(facts)
            source = self.source(sample.record.path)
            assert source is not None
            wanted = zip(sample.versions(), (plain, mirrored), strict=False)
            keys = {placement.mirrored: key for (key, placement), is_wanted in wanted if is_wanted}
            yield Job(sample, source, keys, sample.image_key if image else None)

    def add_prompt(self, key: bytes, text: str, *, missing: bool) -> None:
        """Take a prompt to have, once, and whether it is to be encoded."""
        self._database.execute("INSERT OR IGNORE INTO prompts VALUES (NULL, ?, ?, ?)", (key, text, missing))

    def missing_prompts(self) -> Iterator[tuple[bytes, str]]:
        """The prompts to encode, each with its key."""
        rows = self._database.execute("SELECT key, text FROM prompts WHERE missing ORDER BY row")
        yield from iter(rows.fetchone, None)  # not from the cursor, which cannot be closed once the database is

    def prompt_counts(self) -> tuple[int, int]:
        """How many prompts there are to have, and how many of them to encode."""
        count, missing = self._database.execute("SELECT count(*), ifnull(sum(missing), 0) FROM prompts").fetchone()
        return int(count), int(missing)

    def _sample(self, facts: str) -> Sample:
        told = json.loads(facts)
        source = self.source(told["record"]["path"])
        assert source is not None
        return Sample(
            **{
                **told,
                **{name: None if told[name] is None else bytes.fromhex(told[name]) for name in KEYS},
                "record": Record(**told["record"]),
                "bucket": Bucket.parse(told["bucket"]),
                "placement": Placement(**told["placement"]),
                "probe": source.require_probe(),
            }
        )


def _pack(sample: Sample) -> str:
    facts = {name: value for name, value in vars(sample).items() if name != "probe"}
    keys = {name: None if facts[name] is None else facts[name].hex() for name in KEYS}
    record, placement = asdict(sample.record), asdict(sample.placement)
    return json.dumps({**facts, **keys, "record": record, "bucket": str(sample.bucket), "placement": placement})


def _source(row: tuple[Any, ...]) -> Source:
    path, size, mtime_ns, digest, probe, pts, verdicts, _ = row
    known = None
    if probe is not None:
        known = Probe.from_dict({**json.loads(probe), "pts": np.frombuffer(pts, np.int64).tolist()})
    told = {key: (reason, detail) for key, (reason, detail) in json.loads(verdicts).items()}
    return Source(path, size, mtime_ns, digest, known, told)
