"""A manifest with captions that tells where each comes from, as `python -m preprocess.caption` writes it.

Columns, of which `python -m preprocess` reads the first five:
    video                   relative to the manifest's own folder where all lie below it, else absolute; or a URL
    caption                 what stage 1 takes
    start_s, end_s, weight  as the manifest that was read has them
    caption_source          `manifest`: as it was read; `model`: by caption_model; `rewrite`: by rewrite_model
    caption_model, caption_revision, caption_recipe    what looked at the frames: its name, the hub's commit, how
    raw_caption             what rewrite_model was given
    rewrite_model, rewrite_revision, rewrite_recipe    what wrote the caption anew
    and whatever other columns the manifest that was read has, as they are

A recipe is the digest of everything that the text depends on; `OUTPUT.recipes` holds what it stands for.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from preprocess import files
from preprocess.manifest import Record
from preprocess.tables import Columns, carried, suffix_of, table_rows
from shared.errors import ConfigError, ManifestError
from shared.storage import write_atomically

MIN_WORDS, MAX_WORDS = 50, 100  # what CogVideoX was trained on, and reads best
LATIN_SHARE = 0.9  # of a caption's letters, at least: T5 v1.1 knows English
SUFFIXES = (".jsonl", ".csv", ".tsv")
LISTED = 5  # clips that a note names

Key = tuple[str, float | None, float | None]  # of a clip: its video's absolute path or URL, its start and its end


@dataclass(frozen=True)
class Author:
    """Who wrote a text.

    Attributes:
        model: a hub id, or the absolute path of a folder.
        revision: the hub's commit; None for a folder.
        recipe: digest of all settings that the text depends on.
    """

    model: str
    revision: str | None
    recipe: str


@dataclass(frozen=True)
class Row:
    """A row of the manifest that is written; the module's head tells its columns. In a run, videos are absolute."""

    video: str
    caption: str
    start_s: float | None = None
    end_s: float | None = None
    weight: float = 1.0
    caption_source: str = "manifest"
    caption_model: str | None = None
    caption_revision: str | None = None
    caption_recipe: str | None = None
    raw_caption: str | None = None
    rewrite_model: str | None = None
    rewrite_revision: str | None = None
    rewrite_recipe: str | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> dict[str, Any]:
        """What stands in each column."""
        return {**{name: getattr(self, name) for name in COLUMNS}, **self.others}

    @property
    def key(self) -> Key:
        """What tells the clip from others."""
        return self.video, self.start_s, self.end_s

    def captioned(self, text: str, by: Author) -> Row:
        """The row with a model's caption; what was known of an older one goes."""
        made = Row(self.video, text, self.start_s, self.end_s, self.weight, "model", others=self.others)
        return replace(made, caption_model=by.model, caption_revision=by.revision, caption_recipe=by.recipe)

    def rewritten(self, text: str, raw: str, by: Author) -> Row:
        """The row with its caption written anew from `raw`."""
        made = replace(self, caption=text, caption_source="rewrite", raw_caption=raw)
        return replace(made, rewrite_model=by.model, rewrite_revision=by.revision, rewrite_recipe=by.recipe)

    def joined(self, now: Row) -> Row:
        """The row as an earlier run left it, with the manifest's weight of `now`, and what else is new there."""
        held = {name: cell for name, cell in self.others.items() if cell not in (None, "")}
        return replace(self, weight=now.weight, others={**self.others, **now.others, **held})


COLUMNS = [column.name for column in fields(Row) if column.name != "others"]
OURS = COLUMNS[COLUMNS.index("caption_source") :]  # which no manifest has but those of this command


def row_of(record: Record) -> Row:
    """The row of a clip as its manifest tells it; where that is one of this command's, without who wrote its captions.

    Raises:
        ManifestError: a column of the manifest's would be lost to one of the same name.
    """
    is_ours = "caption_source" in record.others
    others = {name: cell for name, cell in record.others.items() if not (is_ours and name in OURS)}
    if taken := [name for name in others if name in COLUMNS]:
        raise ManifestError(
            f"{record.origin}: has a column {taken[0]!r}, which OUTPUT has for what it tells itself; rename it"
        )
    return Row(record.path, record.caption, record.start_s, record.end_s, record.weight, others=others)


def name_of(video: str, output: Path) -> str:
    """A video's path below the manifest's folder; its URL, or absolute path, where it does not lie there."""
    folder = os.path.abspath(output.parent).rstrip("/") + "/"
    return video.removeprefix(folder)


def video_of(name: str, output: Path) -> str:
    """The URL or absolute path of what a manifest names."""
    return name if files.is_url(name) else os.path.normpath(os.path.join(os.path.abspath(output.parent), name))


def named(rows: list[Row], output: Path) -> list[Row]:
    """Rows with their videos as the manifest is to name them, so that one data root finds them all."""
    names = [name_of(row.video, output) for row in rows]
    if any(name.startswith("/") for name in names):
        return rows
    return [replace(row, video=name) for row, name in zip(rows, names, strict=True)]


class Known:
    """The rows of a manifest that this command wrote, to go on from; none where there is no such file yet.

    Raises:
        ConfigError: the file was written by something else.
        ManifestError: it cannot be read.
    """

    def __init__(self, output: Path) -> None:
        self._rows: defaultdict[Key, deque[Row]] = defaultdict(deque)
        if output.exists():
            try:
                self._read(output)
            except ManifestError as error:
                way = "mend it, or give another path"
                raise ManifestError(
                    f"--output {output}: is there, and cannot be gone on from ({error}); {way}"
                ) from error

    def _read(self, output: Path) -> None:
        for origin, cells in table_rows(output, Columns("caption", "video")):
            if "caption_source" not in cells:
                raise ConfigError(f"--output {output}: is there, and not of this command; give another path")
            row = _row(origin, {name: None if cell == "" else cell for name, cell in cells.items()})
            row = replace(row, video=video_of(row.video, output), others=carried(origin, cells, COLUMNS))
            self._rows[row.key].append(row)

    def take(self, key: Key) -> Row | None:
        """The row of a clip; of a clip that stands in the manifest more than once, one after the other."""
        return self._rows[key].popleft() if self._rows.get(key) else None

    def rest(self) -> list[Row]:
        """The rows that nobody has taken."""
        return [row for rows in self._rows.values() for row in rows]


def _row(origin: str, cells: dict[str, Any]) -> Row:
    told: dict[str, Any] = {name: cells.get(name) for name in COLUMNS}
    try:
        numbers = {name: told[name] and float(told[name]) for name in ("start_s", "end_s", "weight")}
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{origin}: start_s, end_s and weight must be numbers ({error}); correct them") from error
    weight = 1.0 if numbers["weight"] is None else numbers["weight"]
    if not isinstance(told["caption"], str) or not isinstance(told["video"], str):
        raise ManifestError(f"{origin}: has no video or no caption; correct the line, or remove it")
    source = told["caption_source"] or "manifest"
    return Row(**{**told, **numbers, "weight": weight, "caption_source": source})


def write_manifest(output: Path, rows: Sequence[Row]) -> None:
    """Write the manifest: complete under its name, or the one that was there."""
    text = io.StringIO(newline="")
    if suffix_of(output) == ".jsonl":
        text.writelines(json.dumps(row.cells, ensure_ascii=False) + "\n" for row in rows)
    else:
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row.others)])
        table = csv.DictWriter(text, list(columns), delimiter="\t" if suffix_of(output) == ".tsv" else ",")
        table.writeheader()
        table.writerows({name: _flat(cell) for name, cell in row.cells.items()} for row in rows)
    write_atomically(output, text.getvalue())


def _flat(cell: Any) -> Any:
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell


def beside(output: Path, kind: Literal["recipes", "rejected"]) -> Path:
    """A file that belongs to a manifest; no manifest itself, so that a folder with it still holds one table."""
    return output.with_name(f"{output.name}.{kind}")


def add_recipes(output: Path, recipes: dict[str, dict[str, Any]]) -> None:
    """Keep what recipes stand for, beside those that are known."""
    path = beside(output, "recipes")
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        merged = {**known, **recipes}
    except (ValueError, TypeError) as error:
        raise ManifestError(f"{path}: is not as it was written ({error}); remove it") from error
    if merged:
        write_atomically(path, json.dumps(merged, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def notes(rows: list[Row]) -> Iterator[str]:
    """What a user may want to mend in captions, counted: those too short or too long, those that are not English."""
    counts = [(row.video, len(row.caption.split())) for row in rows]
    outside = [f"{video} ({count})" for video, count in counts if not MIN_WORDS <= count <= MAX_WORDS]
    if outside:
        yield f"words     {len(outside)} of {len(rows)} captions have not {MIN_WORDS} to {MAX_WORDS}: {_first(outside)}"
    foreign = [row.video for row in rows if not _is_latin(row.caption)]
    if foreign:
        yield f"script    {len(foreign)} of {len(rows)} captions are not in Latin letters: {_first(foreign)}"


def _is_latin(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum("LATIN" in unicodedata.name(letter, "") for letter in letters)
    return bool(letters) and latin >= LATIN_SHARE * len(letters)


def _first(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
