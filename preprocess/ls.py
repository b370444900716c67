"""`python -m preprocess.ls`: see `--help` and docs/cache_commands.md."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from preprocess.inventory import (
    StoreFolder,
    dataset_names,
    find_version,
    open_cache,
    pictures,
    printable,
    store_folders,
    versions,
)
from shared.cache import MEMBERS, Cache
from shared.config import check_name, parse_config
from shared.console import Progress
from shared.dataset import MEMBER_KINDS, DataSet, open_dataset
from shared.errors import CacheError, ConfigError, UserError, run_command
from shared.pictures import FOLDER

NUMBERS = ("parts", "keys", "MB", "samples")  # columns of numbers, to the right
LINES = 20  # samples that a difference lists of each kind
DAMAGED = "cannot be read; run `python -m preprocess.verify`"


@dataclass(frozen=True)
class LsConfig:
    """List what a cache holds, or how two versions of a data set differ. Exit status: 0 done, 2 no such thing."""

    cache: Positional[str]
    """The cache: a folder or a URL."""
    dataset: str | None = None
    """List this data set only."""
    diff: tuple[str, str] | None = None
    """Two versions of --dataset, by their first digits: tell what differs."""

    def __post_init__(self) -> None:
        if self.dataset is not None:
            check_name(self.dataset)
        if self.diff and self.dataset is None:
            raise ConfigError("--diff compares two versions of a data set; give --dataset too")


def list_stores(cache: Cache) -> Iterator[list[str]]:
    """A row for each store: kind, fingerprint, parts, keys, megabytes, what tells it from others; one for pictures."""
    for store in Progress(store_folders(cache), name="stores", unit="store", leave=False):
        keys: set[bytes] = set()
        size_bytes, bad, parts = 0, 0, store.parts()
        for part in parts:
            try:
                index, facts = store.read_index(part)
                rows = index.select(["key", "member"]).to_pylist()
                keys.update(row["key"] for row in rows if row["member"] == MEMBERS[store.kind])
                size_bytes += facts["tar_size_bytes"] + store.storage.size(f"{store.folder}/{part}.parquet")
            except (CacheError, OSError, ValueError):
                bad += 1
        told = f"{_told_apart(store)}" + (f"; {bad} parts: {DAMAGED}" if bad else "")
        yield [store.kind, store.fingerprint, f"{len(parts)}", f"{len(keys)}", f"{size_bytes / 1e6:,.1f}", told]
    if paths := pictures(cache.storage):
        size_bytes = sum(map(cache.storage.size, paths))
        yield [FOLDER, "", "", f"{len(paths)}", f"{size_bytes / 1e6:,.1f}", "that validation videos start from"]


def _told_apart(store: StoreFolder) -> str:
    try:
        facts = store.facts()
        encoder = facts["vae" if "vae" in facts else "text_encoder"]["weights"]
        weights = f"{encoder[0][:12]}" + (f" and {len(encoder) - 1} more" if encoder[1:] else "")
        dtypes = f"{facts['dtype']} kept as {facts['cache_dtype']}"
        tiling = facts.get("tiling")
        tiles = f"tiles of {tiling['height']}x{tiling['width']}, " if tiling else ""
        return f"{dtypes}, {tiles}weights {weights}"
    except (CacheError, LookupError, TypeError):
        return f"fingerprint.json {DAMAGED}"


def list_versions(cache: Cache, name: str) -> Iterator[list[str]]:
    """A row for each version of a data set: whether it is current, digest, samples, when, buckets, model."""
    try:
        current: str | None = open_dataset(cache, name).digest
    except UserError:
        current = None
    found = []
    for digest in versions(cache, name):
        row = ["*" if digest == current else "", digest[:12]]
        try:
            dataset = open_dataset(cache, name, digest)
            modified = cache.storage.modified(f"{dataset.folder}/dataset.json")
            buckets = Counter(sample["bucket"] for sample in dataset.rows("bucket"))
            model = dataset.info.get("model")
            told = ", ".join(f"{bucket}: {count}" for bucket, count in sorted(buckets.items(), key=str))
            row += [f"{buckets.total()}", time.strftime("%Y-%m-%d %H:%M", time.localtime(modified)), told]
            found.append((modified, [*row, str(model.get("name") if isinstance(model, dict) else None)]))
        except (UserError, OSError):
            found.append((0.0, [*row, "?", "", DAMAGED, ""]))
    yield from (row for _, row in sorted(found))


def difference(old: DataSet, new: DataSet) -> Iterator[str]:
    """What differs between two versions, line by line: samples by their ids, then what stage 1 was told."""
    yield f"{old.name}: {old.digest[:12]} -> {new.digest[:12]}"
    before, after = _samples(old), _samples(new)
    yield f"samples   {len(before)} -> {len(after)}"
    added = [f"  + {_called(after[name])}" for name in after if name not in before]
    removed = [f"  - {_called(before[name])}" for name in before if name not in after]
    both = [(before[name], after[name]) for name in before if name in after]
    changed = [
        f"  ~ {a['sample_id']}  {a['source']}  {', '.join(_changes(a, b))}" for a, b in both if any(_changes(a, b))
    ]
    for title, lines in (("added", added), ("removed", removed), ("changed", changed)):
        yield f"{title:<9} {len(lines)}"
        yield from lines[:LINES]
        if len(lines) > LINES:
            yield f"    and {len(lines) - LINES} more"
    if not (added or removed) and list(before) != list(after):
        yield "order     the same samples in another order"
    for title in ("config", "fingerprints", "model"):
        told = [version.info.get(title) for version in (old, new)]
        a, b = (value if isinstance(value, dict) else {} for value in told)
        for name in sorted({*a, *b}, key=str):
            if a.get(name) != b.get(name) and (title, name) != ("config", "cache"):
                yield f"{title:<12} {name}: {a.get(name)!r} -> {b.get(name)!r}"


def _samples(dataset: DataSet) -> dict[str, dict[str, Any]]:
    keys = [f"{kind}_key" for kind in MEMBER_KINDS]
    rows = dataset.rows("sample_id", "source", "start_s", "end_s", "caption", "bucket", "weight", *keys)
    return {str(row["sample_id"]): row for row in rows}


def _called(row: dict[str, Any]) -> str:
    start, end = row["start_s"], row["end_s"]
    segment = (
        "" if start is None and end is None else f" {start or 0:g} to {'its end' if end is None else f'{end:g}'} s"
    )
    return f"{row['sample_id']}  {row['source']}{segment}  {row['bucket']}  {row['caption']!r:.60}"


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What differs between two rows of one sample: the values where they can be read, the names of members else."""
    for name in ("caption", "bucket", "weight"):
        if old[name] != new[name]:
            yield f"{name} {old[name]!r:.60} -> {new[name]!r:.60}"
    for kind in MEMBER_KINDS:
        if old[f"{kind}_key"] != new[f"{kind}_key"]:
            yield kind


def table(titles: list[str], rows: Iterator[list[str]]) -> str:
    """Aligned lines of rows under their titles."""
    columns = []
    for title, *cells in zip(titles, *rows, strict=True):
        shown = [printable(cell) for cell in (title, *cells)]
        width = max(map(len, shown))
        columns.append([cell.rjust(width) if title in NUMBERS else cell.ljust(width) for cell in shown])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def main(argv: list[str]) -> int:
    """List a cache, or compare two versions."""
    config = parse_config(LsConfig, argv, "python -m preprocess.ls")
    cache = open_cache(config.cache)
    if config.diff:
        name, (old, new) = config.dataset or "", config.diff
        lines = difference(find_version(cache, name, old), find_version(cache, name, new))
        print("\n".join(map(printable, lines)))
        return 0
    names = dataset_names(cache)
    if config.dataset is None:
        print(f"cache  {printable(cache.url)}\n")
        print(table(["store", "fingerprint", "parts", "keys", "MB", ""], list_stores(cache)))
    else:
        if config.dataset not in names:
            open_dataset(cache, config.dataset)  # says which there are
        names = [config.dataset]
    for name in names:
        print(f"\ndata set  {printable(name)}")
        print(table(["", "version", "samples", "published", "buckets", "model"], list_versions(cache, name)))
    return 0


if __name__ == "__main__":
    run_command(main)
