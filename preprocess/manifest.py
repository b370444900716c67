"""The manifest: one record per clip, its video and its caption together from the first moment.

Reads, whatever the user has:
    two text files         --instance_data_root FOLDER --caption_column prompts.txt --video_column videos.txt
    a table                --dataset_name FILE: .csv, .tsv, .parquet, .jsonl, .json (a list of objects, or as .jsonl)
    a folder with a table  --dataset_name FOLDER, with one such file at its top
    a folder of pairs      --dataset_name FOLDER, x.mp4 with x.txt beside it, at any depth, in the order of their paths
    a hub data set         --dataset_name OWNER/NAME, or a clone of one: the split `train`, as `datasets` reads it

`--caption_column` and `--video_column` name columns of a table; start (or start_s) and end (or end_s), in seconds, and
weight are taken where there are such columns. A video is a path below `--instance_data_root`, or else below the table's
folder; or a Video feature of `datasets`: a path as before, or in the hub's cache, or the video itself, which is written
once, under its digest, to `<cache_dir>/videos`. No line is ever dropped: one that cannot be used is an error.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from shared.errors import ManifestError

TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif"}
START_COLUMNS, END_COLUMNS, WEIGHT_COLUMNS = ("start", "start_s"), ("end", "end_s"), ("weight",)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_URL = re.compile(r"\s*(pipe:|[\w+.:-]+://)", re.IGNORECASE)
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON can spell half a surrogate pair; UTF-8 cannot
_QUOTED = re.compile(r'"([^"]*(?:"\w.*)?)"', re.DOTALL)  # but `"Stop" is on one sign, on the other "Go"` stays

_Columns = tuple[str, str]  # of the caption, of the video
_Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where a row is, and its cells by column


@dataclass(frozen=True)
class Record:
    """One clip of the manifest.

    Args:
        source: the video as the manifest names it, without an outer pair of quotes.
        path: the video's file, absolute.
        caption: as the manifest gives it, without an outer pair of quotes and without id token.
        start_s: where the clip starts in its video, in seconds; None is the video's start.
        end_s: where the clip ends in its video, in seconds; None is the video's end.
        weight: how often the clip is drawn, beside others of weight 1.
        origin: `FILE:LINE` or `FILE row N` of the manifest, for messages.
    """

    source: str
    path: str
    caption: str
    start_s: float | None
    end_s: float | None
    weight: float
    origin: str


def effective_prompt(caption: str, id_token: str | None) -> str:
    """The text that is encoded: the id token, one space, the caption."""
    token = (id_token or "").strip()
    return f"{token} {caption}" if token else caption


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
) -> Iterator[Record]:
    """The records of a manifest, in its order; each is checked when it is taken. The module's head lists the forms.

    Args:
        cache_dir: for data sets of the hub and for videos embedded in a table; None is their usual place.
        follow_links: take videos that are symbolic links to files outside the data root.

    Raises:
        ManifestError: the first line that cannot be used, by file, number and value.
    """
    columns = (caption_column, video_column)
    if not dataset_name and not instance_data_root:
        raise ManifestError("no manifest: give --dataset_name, or --instance_data_root with two text files")
    path = Path(dataset_name or instance_data_root or "")
    files: list[Path] = []
    if dataset_name and path.is_dir():
        tables = sorted(file for file in path.iterdir() if _suffix(file) in TABLE_SUFFIXES and file.name[0] != ".")
        if len(tables) > 1:
            listed = _listed([table.name for table in tables])
            raise ManifestError(f"{path}: holds {len(tables)} tables, {listed}; name one of them as --dataset_name")
        path = tables[0] if tables else path
        files = [] if tables else _files_below(path, follow_links)

    rows: _Rows
    folders = [Path(instance_data_root)] if instance_data_root else []
    if not dataset_name:
        rows = _text_rows(path, columns)
    elif path.is_file():
        folders = folders or [path.parent]
        rows = _table_rows(path, columns)
    elif path.is_dir() and not _is_clone(files):
        folders = [path]
        rows = _pair_rows(path, files, columns, follow_links)
    elif path.is_dir() or (_HUB_ID.fullmatch(dataset_name) and _suffix(path) not in TABLE_SUFFIXES):
        dataset, home = _load_hub(dataset_name, dataset_config_name, revision, cache_dir)
        folders.append(home)
        rows = _hub_rows(dataset_name, dataset, columns)
    else:
        raise ManifestError(f"--dataset_name {path}: no such file or folder, and not the name of a hub data set")

    root = _Root(*folders, follow_links=follow_links)
    embedded = Path(cache_dir or "~/.cache/latentreel").expanduser() / "videos"
    origin = None
    for origin, row in rows:
        yield _record(origin, row, columns, root, embedded)
    if origin is None:
        raise ManifestError(f"{path}: holds no clips")


def _text_rows(folder: Path, columns: _Columns) -> _Rows:
    """The rows of two text files, which the columns name: a line each, and equally many."""
    paths = [folder / column for column in columns]
    for flag, path in zip(("--caption_column", "--video_column"), paths, strict=True):
        if not path.is_file():
            raise ManifestError(f"{path}: no such file; without --dataset_name, {flag} is the name of a text file")
    counts = [sum(1 for _ in _lines(path)) for path in paths]
    if counts[0] != counts[1]:
        longer = paths[counts[1] > counts[0]]
        origin, text = next(islice(_lines(longer), min(counts), None))
        raise ManifestError(
            f"{paths[0]} has {counts[0]} lines and {paths[1]} has {counts[1]}; a caption belongs to each video. "
            f"The first line without a partner is {origin}: {text!r:.100}"
        )
    for (_, caption), (origin, video) in zip(*map(_lines, paths), strict=True):
        yield origin, dict(zip(columns, (caption, video), strict=True))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                raise ManifestError(f"{path}:{number}: the line is blank; write it, or remove it from both files")
            yield f"{path}:{number}", line.strip()


def _files_below(folder: Path, follow_links: bool) -> list[Path]:
    """The files at any depth, hidden ones aside, in the order of their paths."""

    def refuse(error: OSError) -> None:
        raise ManifestError(f"{error.filename}: {error.strerror}") from error

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=follow_links):
        folders[:] = [name for name in folders if name[0] != "."]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink() and not follow_links:
                raise ManifestError(f"{path}: is a link to a folder; give --follow_links to read it")
        files += [Path(parent, name) for name in names if name[0] != "."]
    return sorted(files)


def _is_clone(files: list[Path]) -> bool:
    """Whether a folder is a hub data set: tables somewhere below, and no video with a text beside it."""
    texts = {file.with_suffix("") for file in files if _suffix(file) == ".txt"}
    paired = any(file.with_suffix("") in texts for file in files if _suffix(file) in VIDEO_SUFFIXES)
    return not paired and any(_suffix(file) in TABLE_SUFFIXES for file in files)


def _pair_rows(folder: Path, files: list[Path], columns: _Columns, follow_links: bool) -> _Rows:
    """The rows of a folder of videos, each with a text of the same name beside it."""
    root = _Root(folder, follow_links=follow_links)
    videos = [file for file in files if _suffix(file) in VIDEO_SUFFIXES]
    texts = {file.with_suffix(""): file for file in files if _suffix(file) == ".txt"}
    if alone := sorted(texts.keys() - {video.with_suffix("") for video in videos}):
        raise ManifestError(f"{texts[alone[0]]}: has no video of this name beside it; add it, or remove the text")
    for video in videos:
        text = texts.get(video.with_suffix(""))
        if text is None:
            raise ManifestError(f"{video}: has no text of this name beside it; write its caption")
        root.file(str(folder), str(text.relative_to(folder)))  # for its checks
        with _opened(text) as file:
            row = (file.read().strip(), str(video.relative_to(folder)))
        yield f"{text}:1", dict(zip(columns, row, strict=True))


def _table_rows(path: Path, columns: _Columns) -> _Rows:
    """The rows of a file, by its suffix; `datasets`, which takes seconds to import, is not needed."""
    if _suffix(path) == ".parquet":
        return _parquet_rows(path, columns)
    if _suffix(path) in {".csv", ".tsv"}:
        return _csv_rows(path, columns, "\t" if _suffix(path) == ".tsv" else ",")
    if _suffix(path) in {".json", ".jsonl"}:
        return _json_rows(path, columns)
    raise ManifestError(f"{path}: is no table; --dataset_name takes {_listed(sorted(TABLE_SUFFIXES))}, or a folder")


def _csv_rows(path: Path, columns: _Columns, delimiter: str) -> _Rows:
    with _opened(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)  # strict: an open quote would swallow what follows
        line = 1
        try:
            header = next(reader, [])
            _require(str(path), header, columns)
            line = reader.line_num + 1  # where the next row starts: cells may hold newlines
            for cells in reader:
                if cells and len(cells) != len(header):
                    counts = f"{len(cells)} cells, the header {len(header)}"
                    raise ManifestError(f"{path}:{line}: has {counts}; put a cell that holds {delimiter!r} in quotes")
                if cells:
                    yield f"{path}:{line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ManifestError(f"{path}:{line}: {error}; close the quotes, and write those inside twice") from error


def _json_rows(path: Path, columns: _Columns) -> _Rows:
    with _opened(path) as file:
        is_list = _suffix(path) == ".json" and file.read().lstrip().startswith("[")
        file.seek(0)
        if is_list:
            rows = ((f"{path} row {number}", row) for number, row in enumerate(_json(str(path), file.read()), start=1))
        else:
            lines = ((f"{path}:{number}", line) for number, line in enumerate(file, start=1) if line.strip())
            rows = ((origin, _json(origin, line)) for origin, line in lines)
        for origin, row in rows:
            if not isinstance(row, dict):
                raise ManifestError(f"{origin}: {row!r:.60} is not an object with columns")
            _require(origin, list(row), columns)
            yield origin, row


def _json(origin: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{origin}: is not JSON ({error}); write one object a line, or one list of them") from error


def _parquet_rows(path: Path, columns: _Columns) -> _Rows:
    import pyarrow  # late: other manifests do without
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require(str(path), names, columns)
            is_feature = pyarrow.types.is_struct(file.schema_arrow.field(columns[1]).type)
            batches = file.iter_batches(16 if is_feature else 4096, columns=_taken(names, columns))
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"{path}: cannot be read as Parquet ({error})") from error


def _load_hub(name: str, config: str | None, revision: str | None, cache_dir: str | None) -> tuple[Any, Path]:
    """The split `train` of a hub data set, or of a clone of one, and the folder that its videos lie in."""
    import datasets  # late: seconds
    from huggingface_hub.constants import HF_HUB_CACHE

    settings = {"revision": revision, "cache_dir": cache_dir}
    try:
        builder = datasets.load_dataset_builder(name, config, **settings)
        if hasattr(builder.config, "keep_default_na"):  # CSV: the caption `NA` is a caption
            builder = datasets.load_dataset_builder(name, config, keep_default_na=False, **settings)
        builder.download_and_prepare()
        return builder.as_dataset(split="train"), Path(name if Path(name).is_dir() else HF_HUB_CACHE)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        way = "download it, and give the folder or its table as --dataset_name"
        raise ManifestError(f"--dataset_name {name}: `datasets` cannot load it ({error}); {way}") from error


def _hub_rows(name: str, dataset: Any, columns: _Columns) -> _Rows:
    from datasets import Video

    _require(name, dataset.column_names, columns)
    dataset = dataset.select_columns(_taken(dataset.column_names, columns))
    if isinstance(dataset.features[columns[1]], Video):
        dataset = dataset.cast_column(columns[1], Video(decode=False))
    for number, row in enumerate(dataset, start=1):
        yield f"{name} row {number}", row


def _require(origin: str, names: list[str], columns: _Columns) -> None:
    for flag, column in zip(("--caption_column", "--video_column"), columns, strict=True):
        if names.count(column) != 1:
            found = "more than one column" if column in names else "no column"
            raise ManifestError(f"{origin}: has {found} {column!r} for {flag}; its columns are {_listed(names)}")


def _taken(names: list[str], columns: _Columns) -> list[str]:
    return [name for name in names if name in {*columns, *START_COLUMNS, *END_COLUMNS, *WEIGHT_COLUMNS}]


def _record(origin: str, row: Mapping[str, Any], columns: _Columns, root: _Root, embedded: Path) -> Record:
    caption, video = (row[column] for column in columns)
    caption = _unquoted(caption)
    if caption is None or not str(caption).strip():
        raise ManifestError(f"{origin}: the caption is empty ({caption!r}); write one, or remove the clip")
    if not isinstance(caption, str) or _HALF_PAIR.search(caption):
        raise ManifestError(f"{origin}: the caption {caption!r:.60} is not text; correct it")

    if isinstance(video, Mapping) and isinstance(video.get("bytes"), bytes):
        file = _embedded_file(embedded, video["bytes"], _suffix(Path(str(video.get("path")))))
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
    return Record(source, path, caption, start_s, end_s, 1.0 if weight is None else weight, origin)


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
            if not 0 <= number < math.inf:
                raise ManifestError(f"{origin}: {column} = {row[column]!r}; must be a number of at least 0")
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


class _Root:
    """The folders that a manifest's paths must stay in; relative ones start from the first.

    A snapshot of the hub's cache is made of links to its `blobs` folder: those may be followed.
    """

    def __init__(self, *folders: Path, follow_links: bool) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise ManifestError(f"{folder}: is no folder; --instance_data_root must be that of the videos")
        real = [str(folder.resolve()) for folder in folders]
        given = [os.path.normpath(folder.absolute()) for folder in folders]
        blobs = [f"{repository}/blobs" for repository in map(_repository, real) if repository]
        self._folders = [folder.rstrip("/") + "/" for folder in given + real]
        self._allowed = tuple(folder.rstrip("/") + "/" for folder in real + blobs)
        self._follow_links = follow_links
        self._real: dict[str, str] = {}  # by folder: a video costs one system call, not one a folder above it

    def file(self, origin: str, name: object) -> tuple[str, str]:
        """The absolute path of a file, with links left in it, and its path below the root."""
        if not isinstance(name, str) or not name:
            raise ManifestError(f"{origin}: the video {name!r} is not a path; write one, or remove the clip")
        if _URL.match(name):
            raise ManifestError(f"{origin}: {name!r} is a URL or a command; fetch the video and name the file")
        path = os.path.normpath(name if name[0] == "/" else self._folders[0] + name)
        folder = next((folder for folder in self._folders if path.startswith(folder)), None)
        if folder is None:
            raise ManifestError(f"{origin}: {name!r} leaves the data root {self._folders[0]}; use a path below it")
        above, base = os.path.split(path)
        try:
            if above not in self._real:
                self._real[above] = os.path.realpath(above)
            real = f"{self._real[above]}/{base}"
            status = os.lstat(real)
            if stat.S_ISLNK(status.st_mode):
                real = os.path.realpath(real)
                status = Path(real).stat()
            found = stat.S_ISREG(status.st_mode)
        except (OSError, ValueError):  # ValueError: a NUL or half a surrogate pair
            found = False
        if not found:
            raise ManifestError(f"{origin}: there is no file {path!r}; correct the line, or give --instance_data_root")
        if not self._follow_links and not real.startswith(self._allowed):
            way = f"{name!r} leads out of the data root {folder} by a link, to {real!r}"
            raise ManifestError(f"{origin}: {way}; copy the file, or give --follow_links")
        return path, path.removeprefix(folder)


def _repository(folder: str) -> str | None:
    """The folder above `snapshots/<revision>`, where the folder is in a snapshot of the hub's cache."""
    match = re.fullmatch(r"(.*)/snapshots/[^/]+(/.*)?", folder)
    return match[1] if match else None


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, its line ends as they are."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
