"""A worker's share of a run: which records are its own, and what it hands over for the data set.

    datasets/<name>/parts/<I>-of-<N>.parquet    a row a clip, the rejected ones too, in manifest order

Workers need nothing of each other but the cache: each takes the records whose digest is its own, encodes them, and
hands over its share; whoever finds all shares there merges them. A share that is made again replaces what it was.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.config import PreprocessConfig
from preprocess.manifest import Record
from preprocess.plan import Rejected
from preprocess.publish import publish
from preprocess.report import Report
from shared.cache import Cache
from shared.dataset import MEMBER_KINDS, SAMPLES_SCHEMA, STORE_OF
from shared.errors import CacheError, UserError
from shared.pictures import FOLDER, digest_in
from shared.storage import canonical_json, digest_of

FORMAT = 1
SCHEMA = pa.schema(
    [pa.field("manifest_row", pa.int64()), pa.field("reason", pa.string()), pa.field("detail", pa.string())]
    + [field for field in SAMPLES_SCHEMA if field.name != "sample_id"]
)
REJECTED_COLUMNS = ("source", "caption", "reason", "detail")
ROWS = 4096  # in memory at a time

# Flags of a machine, not of the data set: workers may differ in them.
LOCAL = (
    "cache", "cache_dir", "pretrained_model_name_or_path", "dataset_name", "instance_data_root", "rehash",
    "retry_rejected", "validation_prompts", "validation_images",
    "vae_batch_size", "text_batch_size", "dataloader_num_workers", "decode_timeout", "worker_index",
)  # fmt: skip


def is_mine(config: PreprocessConfig, record: Record) -> bool:
    """Whether a record is of this worker's share: the same segment of a video is always of one and the same."""
    segment = digest_of(["worker", record.source, record.start_s, record.end_s], 8)
    return int.from_bytes(segment, "big") % config.num_workers == config.worker_index


@dataclass(frozen=True)
class Share:
    """A share that was handed over.

    Attributes:
        facts: of its metadata: what must be equal in all shares of a run, and what the worker did.
    """

    cache: Cache
    path: str
    index: int
    facts: dict[str, Any]

    def rows(self, *names: str) -> Iterator[dict[str, Any]]:
        """Its rows in manifest order, few in memory at a time; some columns or all."""
        with _reading(self.cache, self.path), closing(_open(self.cache, self.path)) as file:
            for batch in file.iter_batches(ROWS, columns=list(names) or None):
                yield from batch.to_pylist()


def write_share(
    cache: Cache,
    writer: Path,
    config: PreprocessConfig,
    info: dict[str, Any],
    prompts: dict[str, Any] | None,
    manifest_digest: str,
    rows: Iterable[dict[str, Any]],
    report: Report,
) -> str:
    """Hand over the share of this worker. Returns the digest of the run that all of its workers agree on.

    Args:
        info: of `dataset_info`.
        prompts: of `validation.prompt_entries`, from the first worker.
        manifest_digest: of all records of the manifest, whosever they are.
        rows: of `sample_rows` and `rejected_row`, in manifest order.
    """
    finished = writer / "share.parquet"
    counts = {"samples": 0, "rejected": 0}
    with finished.open("wb") as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd", write_page_checksum=True) as table:
            waiting: list[dict[str, Any]] = []
            for row in rows:
                counts["rejected" if row.get("reason") else "samples"] += 1
                waiting.append(row)
                if len(waiting) == ROWS:
                    table.write_table(pa.Table.from_pylist(waiting, SCHEMA))
                    waiting = []
            table.write_table(pa.Table.from_pylist(waiting, SCHEMA))
            told = {name: value for name, value in info["config"].items() if name not in LOCAL}
            agreed = {**info, "model": None, "config": told}  # the weights' digests are in the facts
            run = digest_of([agreed, manifest_digest]).hex()
            facts = {
                "format": FORMAT,
                "run": run,
                "info": info,
                "prompts": prompts,
                "counts": counts,
                "strict": config.strict,
                "report": report.to_dict(),
            }
            table.add_key_value_metadata({b"latentreel": canonical_json(facts)})
        file.flush()
        os.fsync(file.fileno())
    path = f"datasets/{config.dataset}/parts/{config.worker_index}-of-{config.num_workers}.parquet"
    cache.storage.publish(finished, path)
    return run


def rejected_row(manifest_row: int, clip: Rejected) -> dict[str, Any]:
    """A rejected clip's row of a share."""
    return {"manifest_row": manifest_row, **clip.row()}


def list_shares(cache: Cache, name: str) -> dict[tuple[int, int], str]:
    """The paths of a data set's shares, by their index and how many there are to be."""
    found = {}
    for file in cache.storage.names(f"datasets/{name}/parts"):
        if match := re.fullmatch(r"(\d+)-of-(\d+)\.parquet", file):
            found[int(match[1]), int(match[2])] = f"datasets/{name}/parts/{file}"
    return found


def open_share(cache: Cache, path: str, index: int = 0) -> Share:
    """A share, opened for reading.

    Raises:
        CacheError: it is none.
    """
    with _reading(cache, path), closing(_open(cache, path)) as file:
        facts = json.loads((file.metadata.metadata or {})[b"latentreel"])
        if facts["format"] != FORMAT or not file.schema_arrow.equals(SCHEMA):
            raise CacheError(f"{cache.storage.full(path)}: a share of another format; run its worker again")
    return Share(cache, path, index, facts)


def share_keys(share: Share) -> Iterator[tuple[str, bytes]]:
    """The keys that a share refers to, each with the folder of its store; of pictures their digests."""
    fingerprints = share.facts["info"]["fingerprints"]
    prompts = share.facts["prompts"]
    for entry in [prompts["empty_prompt"], *prompts["validation_prompts"]] if prompts else ():
        yield f"embeddings/{fingerprints['embeddings']}", bytes.fromhex(entry["embedding_key"])
        if entry.get("image") is not None:
            yield FOLDER, digest_in(entry["image"])
    for row in share.rows(*(f"{kind}_key" for kind in MEMBER_KINDS)):
        for kind in MEMBER_KINDS:
            if row[f"{kind}_key"] is not None:
                yield f"{STORE_OF[kind]}/{fingerprints[STORE_OF[kind]]}", row[f"{kind}_key"]


def waiting_for(cache: Cache, name: str, workers: int, run: str) -> list[int]:
    """The workers of a run that have not handed over their share, or one that cannot be read."""
    there = list_shares(cache, name)

    def is_there(index: int) -> bool:
        try:
            return (index, workers) in there and open_share(cache, there[index, workers]).facts["run"] == run
        except CacheError:  # its own worker makes it again; a merge would say what is wrong with it
            return False

    return [index for index in range(workers) if not is_there(index)]


def merge(cache: Cache, writer: Path, name: str, workers: int) -> tuple[Report, str]:
    """Make the data set of the shares of all workers; doing it again makes the same one.

    Returns:
        What the workers did, and the digest of the version.

    Raises:
        CacheError: a share is missing, or is of another run than the others: names its worker.
        UserError: all clips were rejected, or any with --strict.
    """
    there = list_shares(cache, name)
    missing = [index for index in range(workers) if (index, workers) not in there]
    if missing:
        raise CacheError(
            f"{cache.url}: data set {name!r} lacks the shares of --worker_index {', '.join(map(str, missing))} of "
            f"--num_workers {workers}; run these workers"
        )
    shares = [open_share(cache, there[index, workers], index) for index in range(workers)]
    strange = [share.index for share in shares if share.facts["run"] != shares[0].facts["run"]]
    if strange:
        raise CacheError(
            f"{cache.url}: the shares of --worker_index {', '.join(map(str, strange))} are of another manifest, "
            "checkpoint or flags than that of worker 0; run all workers with the same"
        )
    samples = sum(share.facts["counts"]["samples"] for share in shares)
    rejected = sum(share.facts["counts"]["rejected"] for share in shares)
    if not samples or (rejected and shares[0].facts["strict"]):
        first = next(row for row in _merged(shares, *REJECTED_COLUMNS, "manifest_row") if row["reason"])
        raise UserError(
            f"{rejected} of {samples + rejected} clips were rejected, the first {first['source']}: {first['reason']} "
            f"({first['detail']}); no data set was published; mend or remove them, and run the workers again"
        )
    report = Report()
    for share in shares:
        report.add(share.facts["report"])
    digest = publish(
        cache,
        writer,
        name,
        {**shares[0].facts["info"], **shares[0].facts["prompts"]},
        (
            {name: row[name] for name in row if name not in ("reason", "detail")}
            for row in _merged(shares)
            if not row["reason"]
        ),
        _rejected(shares, report),
        report,
    )
    return report, digest


def _merged(shares: list[Share], *names: str) -> Iterator[dict[str, Any]]:
    """The rows of all shares in manifest order: a record is in one of them, with all of its clips."""
    return heapq.merge(*(share.rows(*names) for share in shares), key=itemgetter("manifest_row"))


def _rejected(shares: list[Share], report: Report) -> Iterator[dict[str, Any]]:
    for row in _merged(shares, "manifest_row", *REJECTED_COLUMNS):
        if row["reason"]:
            report.rejected[row["reason"]] += 1
            yield {name: row[name] for name in REJECTED_COLUMNS}


@contextmanager
def _reading(cache: Cache, path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{cache.storage.full(path)}: not a share ({error}); run its worker again") from error


def _open(cache: Cache, path: str) -> pq.ParquetFile:
    storage = cache.storage
    source = storage.local(path) if storage.is_local else pa.BufferReader(storage.read(path))
    return pq.ParquetFile(source, page_checksum_verification=True)
