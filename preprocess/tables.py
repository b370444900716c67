"""The rows of a manifest, whatever it is kept in: text files, pairs of files, CSV, JSON, Parquet, hub data sets.

A row is where it stands, for messages, and its cells by column. No row is dropped: one that cannot be used is an error.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from preprocess.roots import DataRoot
from shared.console import warn
from shared.errors import ManifestError

TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif"}
START_COLUMNS, END_COLUMNS, WEIGHT_COLUMNS = ("start", "start_s"), ("end", "end_s"), ("weight",)
HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON can spell half a surrogate pair; UTF-8 cannot

Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where a row is, and its cells by column


@dataclass(frozen=True)
class Columns:
    """The columns that a manifest's captions and videos are in.

    Attributes:
        to_caption: the manifest is to be captioned: its rows may lack the caption, or hold None, and have the columns
            that stage 1 does not read, too. Else a manifest without captions is a mistake.
    """

    caption: str
    video: str
    to_caption: bool = False

    @property
    def read(self) -> set[str]:
        """The columns that stage 1 reads."""
        return {self.caption, self.video, *START_COLUMNS, *END_COLUMNS, *WEIGHT_COLUMNS}

    def row(self, caption: str | None, video: str) -> dict[str, Any]:
        """The cells of a row that has no others."""
        return {self.caption: caption, self.video: video}


def text_rows(folder: Path, columns: Columns) -> Rows:
    """The rows of two text files, which the columns name: a line each, and equally many."""
    paths = [folder / columns.caption, folder / columns.video]
    if columns.to_caption and not paths[0].is_file() and paths[1].is_file():
        yield from ((origin, columns.row(None, video)) for origin, video in _lines(paths[1]))
        return
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
        yield origin, columns.row(caption, video)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                raise ManifestError(f"{path}:{number}: the line is blank; write it, or remove it from both files")
            yield f"{path}:{number}", line.strip()


def files_below(folder: Path, follow_links: bool) -> list[Path]:
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


def is_clone(files: list[Path]) -> bool:
    """Whether a folder is a hub data set: tables somewhere below, and no video with a text beside it."""
    texts = {file.with_suffix("") for file in files if suffix_of(file) == ".txt"}
    paired = any(file.with_suffix("") in texts for file in files if suffix_of(file) in VIDEO_SUFFIXES)
    return not paired and any(suffix_of(file) in TABLE_SUFFIXES for file in files)


def pair_rows(folder: Path, files: list[Path], columns: Columns, follow_links: bool) -> Rows:
    """The rows of a folder of videos, each with a text of the same name beside it."""
    root = DataRoot(folder, follow_links=follow_links)
    videos = [file for file in files if suffix_of(file) in VIDEO_SUFFIXES]
    texts = {file.with_suffix(""): file for file in files if suffix_of(file) == ".txt"}
    if alone := sorted(texts.keys() - {video.with_suffix("") for video in videos}):
        raise ManifestError(f"{texts[alone[0]]}: has no video of this name beside it; add it, or remove the text")
    for video in videos:
        text = texts.get(video.with_suffix(""))
        if text is None and columns.to_caption:
            yield str(video), columns.row(None, str(video.relative_to(folder)))
            continue
        if text is None:
            raise ManifestError(f"{video}: has no text of this name beside it; write its caption")
        root.file(str(folder), str(text.relative_to(folder)))  # for its checks
        with _opened(text) as file:
            caption = file.read().strip()
        yield f"{text}:1", columns.row(caption, str(video.relative_to(folder)))


def table_rows(path: Path, columns: Columns, name: str | None = None) -> Rows:
    """The rows of a file, by its suffix; `datasets`, which takes seconds to import, is not needed.

    Args:
        name: what messages call it, where that is not its path: the URL that it was fetched from.
    """
    name = name or str(path)
    if suffix_of(path) == ".parquet":
        return _parquet_rows(path, name, columns)
    if suffix_of(path) in {".csv", ".tsv"}:
        return _csv_rows(path, name, columns, "\t" if suffix_of(path) == ".tsv" else ",")
    if suffix_of(path) in {".json", ".jsonl"}:
        return _json_rows(path, name, columns)
    raise ManifestError(f"{name}: is no table; --dataset_name takes {listed(sorted(TABLE_SUFFIXES))}, or a folder")


def _csv_rows(path: Path, name: str, columns: Columns, delimiter: str) -> Rows:
    with _opened(path, name) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)  # strict: an open quote would swallow what follows
        line = 1
        try:
            header = next(reader, [])
            _require(name, header, columns)
            line = reader.line_num + 1  # where the next row starts: cells may hold newlines
            for cells in reader:
                if cells and len(cells) != len(header):
                    counts = f"{len(cells)} cells, the header {len(header)}"
                    raise ManifestError(f"{name}:{line}: has {counts}; put a cell that holds {delimiter!r} in quotes")
                if cells:
                    yield f"{name}:{line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ManifestError(f"{name}:{line}: {error}; close the quotes, and write those inside twice") from error


def _json_rows(path: Path, name: str, columns: Columns) -> Rows:
    with _opened(path, name) as file:
        is_list = suffix_of(path) == ".json" and file.read().lstrip().startswith("[")
        file.seek(0)
        if is_list:
            rows = ((f"{name} row {number}", row) for number, row in enumerate(_json(name, file.read()), start=1))
        else:
            lines = ((f"{name}:{number}", line) for number, line in enumerate(file, start=1) if line.strip())
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


def _parquet_rows(path: Path, name: str, columns: Columns) -> Rows:
    import pyarrow  # late: other manifests do without
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require(name, names, columns)
            is_feature = pyarrow.types.is_struct(file.schema_arrow.field(columns.video).type)
            taken = _taken(name, file.schema_arrow, columns)
            batches = file.iter_batches(16 if is_feature else 4096, columns=taken)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{name} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"{name}: cannot be read as Parquet ({error})") from error


def load_hub(name: str, config: str | None, revision: str | None, cache_dir: str | None) -> tuple[Any, Path]:
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
        here = "" if Path(name).exists() else "no such file or folder here, and "
        raise ManifestError(f"--dataset_name {name}: {here}`datasets` cannot load it ({error}); {way}") from error


def hub_rows(name: str, dataset: Any, columns: Columns) -> Rows:
    """The rows of a hub data set; its videos stay undecoded."""
    from datasets import Video

    _require(name, dataset.column_names, columns)
    dataset = dataset.select_columns(_taken(name, dataset.features.arrow_schema, columns))
    if isinstance(dataset.features[columns.video], Video):
        dataset = dataset.cast_column(columns.video, Video(decode=False))
    for number, row in enumerate(dataset, start=1):
        yield f"{name} row {number}", row


def _require(origin: str, names: list[str], columns: Columns) -> None:
    for flag, column in (("--caption_column", columns.caption), ("--video_column", columns.video)):
        if column == columns.caption and column not in names and columns.to_caption:
            continue
        if names.count(column) != 1:
            found = "more than one column" if column in names else "no column"
            raise ManifestError(f"{origin}: has {found} {column!r} for {flag}; its columns are {listed(names)}")
    twice = [name for name in names if name.strip() and names.count(name) > 1]
    if twice and columns.to_caption:
        raise ManifestError(f"{origin}: has more than one column {twice[0]!r}; rename one, to keep both")


def _taken(origin: str, schema: Any, columns: Columns) -> list[str]:
    """The columns of an Arrow schema to read: other ones only where they are carried, which bytes cannot be."""
    if not columns.to_caption:
        return [name for name in schema.names if name in columns.read]
    heavy = [field.name for field in schema if field.name not in columns.read and _holds_bytes(field.type)]
    if heavy:
        warn(f"{origin}: the columns {listed(heavy)} hold bytes, which no text can: they are not carried along")
    return [name for name in schema.names if name not in heavy]


def _holds_bytes(kind: Any) -> bool:
    """Whether values of an Arrow type hold bytes somewhere, as embedded pictures do."""
    if kind.num_fields:
        return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return "binary" in str(kind)


def carried(origin: str, row: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A row's cells of columns that are not known, as JSON holds them; columns without a name are left out.

    Raises:
        ManifestError: text that cannot be written as UTF-8.
    """
    cells = {name: _plain(cell) for name, cell in row.items() if name not in known and name.strip()}
    for name, cell in cells.items():
        if HALF_PAIR.search(json.dumps([name, cell], ensure_ascii=False)):
            raise ManifestError(
                f"{origin}: the column {name!r} is not text that UTF-8 can hold ({cell!r:.60}); mend it"
            )
    return cells


def _plain(cell: Any) -> Any:
    """Dates, decimals and the like as their text; NaN, which JSON does not know, as no value."""
    if isinstance(cell, Mapping):
        return {str(name): _plain(value) for name, value in cell.items()}
    if isinstance(cell, list | tuple):
        return [_plain(value) for value in cell]
    if isinstance(cell, float):
        return None if math.isnan(cell) else cell if math.isfinite(cell) else str(cell)
    return cell if cell is None or isinstance(cell, bool | int | str) else str(cell)


def suffix_of(path: Path) -> str:
    """A path's suffix in lower case, with its dot."""
    return path.suffix.lower()


def listed(names: list[str]) -> str:
    """Names for a message: the first eight of them."""
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")


@contextmanager
def _opened(path: Path, name: str | None = None) -> Iterator[TextIO]:
    """A text file, its line ends as they are; messages call it by its name."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ManifestError(f"{name or path}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise ManifestError(f"{name or path}: {error.strerror}") from error
