"""The manifest: one record per clip, its video and its caption together from the first moment.

Reads, whatever the user has:
    two text files         --instance_data_root FOLDER --caption_column prompts.txt --video_column videos.txt
    a table                --dataset_name FILE: .csv, .tsv, .parquet, .jsonl, .json (a list of objects, or as .jsonl)
    a folder with a table  --dataset_name FOLDER, with one such file at its top
    a folder of pairs      --dataset_name FOLDER, x.mp4 with x.txt beside it, at any depth, in the order of their paths
    a hub data set         --dataset_name OWNER/NAME, or a clone of one: the split `train`, as `datasets` reads it
    a table behind a URL   --dataset_name s3://bucket/clips.csv, https://, hf://, ...: fetched, and read as above

`--caption_column` and `--video_column` name columns of a table; start (or start_s) and end (or end_s), in seconds, and
weight are taken where there are such columns. A video is a URL; or a path below `--instance_data_root`, or else below
the table's folder, each of which may be a URL; or a Video feature of `datasets`: one of these, or in the hub's cache,
or the video itself, which is written once, under its digest, to `<cache_dir>/videos`.
No line is ever dropped: one that cannot be used is an error.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess import files
from preprocess.roots import DataRoot
from preprocess.tables import (
    END_COLUMNS,
    HALF_PAIR,
    START_COLUMNS,
    TABLE_SUFFIXES,
    VIDEO_SUFFIXES,
    WEIGHT_COLUMNS,
    Columns,
    Rows,
    carried,
    files_below,
    hub_rows,
    is_clone,
    listed,
    load_hub,
    pair_rows,
    suffix_of,
    table_rows,
    text_rows,
)
from shared.errors import ConfigError, ManifestError

LARGEST = 1e9  # of a time in seconds, or of a weight: sums of them stay exact enough
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_QUOTED = re.compile(r'"([^"]*(?:"\w.*)?)"', re.DOTALL)  # but `"Stop" is on one sign, on the other "Go"` stays


@dataclass(frozen=True)
class Record:
    """One clip of the manifest.

    Args:
        source: the video as the manifest names it, without an outer pair of quotes.
        path: the video's file, absolute; or its URL.
        caption: as the manifest gives it, without an outer pair of quotes and without id token.
        start_s: where the clip starts in its video, in seconds; None is the video's start.
        end_s: where the clip ends in its video, in seconds; None is the video's end.
        weight: how often the clip is drawn, beside others of weight 1.
        origin: `FILE:LINE` or `FILE row N` of the manifest, for messages.
        others: where the manifest is to be captioned, the cells of its other columns, as JSON holds them.
    """

    source: str
    path: str
    caption: str
    start_s: float | None
    end_s: float | None
    weight: float
    origin: str
    others: Mapping[str, Any] = field(default_factory=dict)


def iter_manifest(
    *,
    dataset_name: str | None,
    instance_data_root: str | None,
    caption_column: str,
    video_column: str,
    dataset_config_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    follow_links: bool = False,
    to_caption: bool = False,
    besides: Path | None = None,
) -> Iterator[Record]:
    """The records of a manifest, in its order; each is checked when it is taken. The module's head lists the forms.

    Args:
        cache_dir: for data sets of the hub and for videos embedded in a table; None is their usual place.
        follow_links: take videos that are symbolic links to files outside the data root.
        to_caption: a clip may have no caption, which is then empty, and other columns are kept.
        besides: a table that is not the manifest, though it may lie at the top of its folder.

    Raises:
        ManifestError: the first line that cannot be used, by file, number and value.
    """
    columns = Columns(caption_column, video_column, to_caption)
    rows: Rows
    if dataset_name and files.is_url(dataset_name):
        url = files.check(dataset_name)
        if suffix_of(Path(url)) not in TABLE_SUFFIXES or url.count("/") < 3:
            suffixes = ", ".join(sorted(TABLE_SUFFIXES))
            raise ManifestError(f"--dataset_name {url}: is no table; behind a URL give one of {suffixes}")
        root = DataRoot(instance_data_root or url.rpartition("/")[0], follow_links=follow_links)
        yield from _records(url, _remote_rows(url, columns), columns, root, cache_dir)
        return
    if not dataset_name and not instance_data_root:
        raise ManifestError("no manifest: give --dataset_name, or --instance_data_root with two text files")
    path = Path(dataset_name or instance_data_root or "")
    below: list[Path] = []
    if dataset_name and path.is_dir():
        left_out = besides and besides.absolute()
        tables = [file for file in path.iterdir() if suffix_of(file) in TABLE_SUFFIXES and file.name[0] != "."]
        tables = sorted(file for file in tables if file.absolute() != left_out)
        if len(tables) > 1:
            names = listed([table.name for table in tables])
            raise ManifestError(f"{path}: holds {len(tables)} tables, {names}; name one of them as --dataset_name")
        path = tables[0] if tables else path
        below = [] if tables else [file for file in files_below(path, follow_links) if file.absolute() != left_out]

    folders: list[str | Path] = [instance_data_root] if instance_data_root else []
    if not dataset_name and files.is_url(instance_data_root or ""):
        raise ConfigError("--instance_data_root is a URL; give the table of its videos as --dataset_name")
    if not dataset_name:
        rows = text_rows(path, columns)
    elif path.is_file():
        folders = folders or [path.parent]
        rows = table_rows(path, columns)
    elif path.is_dir() and not is_clone(below):
        folders = [path]
        rows = pair_rows(path, below, columns, follow_links)
    elif path.is_dir() or (_HUB_ID.fullmatch(dataset_name) and suffix_of(path) not in TABLE_SUFFIXES):
        dataset, home = load_hub(dataset_name, dataset_config_name, revision, cache_dir)
        folders.append(home)
        rows = hub_rows(dataset_name, dataset, columns)
    else:
        raise ManifestError(f"--dataset_name {path}: no such file or folder, and not the name of a hub data set")

    root = DataRoot(*folders, follow_links=follow_links)
    yield from _records(str(path), rows, columns, root, cache_dir)


def _remote_rows(url: str, columns: Columns) -> Rows:
    """The rows of a table behind a URL, fetched for as long as they are read."""
    with tempfile.TemporaryDirectory(prefix="latentreel-manifest-") as folder:
        copy = Path(folder, f"table{suffix_of(Path(url))}")
        try:
            files.fetch(url, copy)
        except OSError as error:
            raise ManifestError(f"--dataset_name {url}: cannot be fetched ({error.strerror})") from error
        yield from table_rows(copy, columns, url)


def _records(name: str, rows: Rows, columns: Columns, root: DataRoot, cache_dir: str | None) -> Iterator[Record]:
    embedded = Path(cache_dir or "~/.cache/latentreel").expanduser() / "videos"
    origin = None
    for origin, row in rows:
        yield _record(origin, row, columns, root, embedded)
    if origin is None:
        raise ManifestError(f"{name}: holds no clips")


def _record(origin: str, row: Mapping[str, Any], columns: Columns, root: DataRoot, embedded: Path) -> Record:
    caption, video = _unquoted(row.get(columns.caption)), row[columns.video]
    if columns.to_caption and (caption is None or (isinstance(caption, str) and not caption.strip())):
        caption = ""
    elif caption is None or not str(caption).strip():
        raise ManifestError(f"{origin}: the caption is empty ({caption!r}); write one, or remove the clip")
    if not isinstance(caption, str) or HALF_PAIR.search(caption):
        raise ManifestError(f"{origin}: the caption {caption!r:.60} is not text; correct it")

    if isinstance(video, Mapping) and isinstance(video.get("bytes"), bytes):
        file = _embedded_file(embedded, video["bytes"], suffix_of(Path(str(video.get("path")))))
        path, source = str(file), file.name  # a path given beside it is but a base name: two videos may share it
    elif isinstance(video, Mapping):
        path, source = root.file(origin, video.get("path"))  # the name below its root is the same on every machine
    else:
        source = _unquoted(video)
        path, _ = root.file(origin, source)

    start_s = _number(origin, row, START_COLUMNS)
    end_s = _number(origin, row, END_COLUMNS)
    weight = _number(origin, row, WEIGHT_COLUMNS)
    if end_s is not None and end_s <= (start_s or 0):
        raise ManifestError(f"{origin}: end = {end_s}; must be greater than start = {start_s or 0}")
    others = carried(origin, row, columns.read) if columns.to_caption else {}
    return Record(source, path, caption, start_s, end_s, 1.0 if weight is None else weight, origin, others)


def _unquoted(cell: Any) -> Any:
    """A text without one pair of double quotes around all of it: the guide's CSV cells carry one."""
    match = _QUOTED.fullmatch(cell) if isinstance(cell, str) else None
    return match[1] if match else cell


def _number(origin: str, row: Mapping[str, Any], columns: tuple[str, ...]) -> float | None:
    """The value of the first of the columns that has one."""
    for column in columns:
        if row.get(column) not in (None, ""):
            try:
                number = float(row[column])
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if not 0 <= number <= LARGEST:
                must = f"must be a number from 0 to {LARGEST:g}"
                raise ManifestError(f"{origin}: {column} = {row[column]!r}; {must}")
            return number
    return None


def _embedded_file(folder: Path, content: bytes, suffix: str) -> Path:
    name = hashlib.sha256(content).hexdigest() + (suffix if suffix in VIDEO_SUFFIXES else ".mp4")
    path = folder.absolute() / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{name}.{os.getpid()}.tmp"
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return path
