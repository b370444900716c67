"""A file of prompts: what each video is asked to be, and what it wants otherwise than the flags say.

    prompts.txt      a prompt a line
    prompts.csv      a header of columns, a row a video; an empty cell: as the flags say
    prompts.jsonl    an object a line; a missing or null value: as the flags say

The columns are the fields of `PromptRow`, which are stage 3's flags. A column of another name is refused: a misspelt
`sed` would otherwise be a seed that nobody reads. Stage 1 reads the prompts and images, to encode them; stage 2 hands
the file's rows to stage 3 for validation; stage 3 makes the videos.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared.errors import ConfigError

SUFFIXES = (".txt", ".csv", ".jsonl")
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class PromptRow:
    """One video that is asked for. None: as the flags say.

    Attributes:
        prompt: as the user wrote it, without the space around it and without id token.
        image: picture that it starts from; relative paths are from the file's folder, and absolute here.
        seed: of its noise, 0 to 2^63 - 1.
        height, width: in pixels.
        num_frames: 4k + 1.
        num_inference_steps: 1 to 1000.
        guidance_scale: 0 or more.
        use_dynamic_cfg: vary the guidance as diffusers does.
        lora_scale: strength of the LoRA, 1 as trained.
        origin: `FILE:LINE`, for messages; `--prompt` where a flag gave it.
    """

    prompt: str
    image: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    use_dynamic_cfg: bool | None = None
    lora_scale: float | None = None
    origin: str = "--prompt"


COLUMNS = tuple(field.name for field in fields(PromptRow) if field.name != "origin")
INTEGERS = {
    "seed": (0, 2**63 - 1),
    "height": (16, 2**15),
    "width": (16, 2**15),
    "num_frames": (1, 2**15),
    "num_inference_steps": (1, 1000),
}
NUMBERS = {"guidance_scale": (0.0, math.inf), "lora_scale": (-math.inf, math.inf)}


def read_prompts(path: str, flag: str) -> list[PromptRow]:
    """The rows of a file of prompts, in order; never none.

    Args:
        path: a .txt, .csv or .jsonl file; of another suffix, it is read as .txt.
        flag: that gave it, such as `--prompts`, for messages.

    Raises:
        ConfigError: it cannot be read, a row cannot be used, or there is none; names the line and the column.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: cannot be read ({error.strerror}); give a .txt, .csv or .jsonl file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path}: is not UTF-8 text ({error}); save it as UTF-8") from error
    cells = {".csv": _csv_cells, ".jsonl": _json_cells}.get(file.suffix.lower(), _text_cells)
    rows = [make_row(values, f"{path}:{line}", file.parent) for line, values in cells(text, path)]
    if not rows:
        raise ConfigError(f"{flag} {path}: holds no prompt; write one a line")
    return rows


def row_values(row: PromptRow) -> dict[str, Any]:
    """The columns that a row says something of, as a line of a .jsonl file has them."""
    values = {name: getattr(row, name) for name in COLUMNS}
    return {name: value for name, value in values.items() if value is not None}


def prompt_lines(rows: Iterable[PromptRow]) -> str:
    """The text of a .jsonl file of rows."""
    return "".join(f"{json.dumps(row_values(row), ensure_ascii=False)}\n" for row in rows)


def _text_cells(text: str, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, prompt in enumerate(text.splitlines(), start=1):
        if prompt.strip():
            yield line, {"prompt": prompt}


def _csv_cells(text: str, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # strict: an open quote would swallow what follows
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = [name.strip() for name in cells]
                _check_columns(header, f"{path}:1")
            elif any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise ConfigError(f"{path}:{line}: {len(cells)} cells, the header {len(header)}; quote the prompt")
                yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
            line = reader.line_num + 1  # where the next row starts: cells may hold newlines
    except csv.Error as error:
        raise ConfigError(f"{path}:{line}: is not CSV ({error}); quote what holds commas or quotes") from error


def _json_cells(text: str, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, words in enumerate(text.split("\n"), start=1):
        if not words.strip():
            continue
        try:
            values = json.loads(words)
        except ValueError as error:
            raise ConfigError(f"{path}:{line}: is not JSON ({error}); write an object a line") from error
        if not isinstance(values, dict):
            raise ConfigError(f'{path}:{line}: {words.strip():.60}; must be an object such as {{"prompt": "..."}}')
        _check_columns(list(values), f"{path}:{line}")
        yield line, {name: value for name, value in values.items() if value is not None}


def _check_columns(names: list[str], origin: str) -> None:
    for name in names:
        if name not in COLUMNS:
            raise ConfigError(f"{origin}: column {name!r}; must be one of {', '.join(COLUMNS)}")
        if names.count(name) > 1:
            raise ConfigError(f"{origin}: column {name!r} is there twice; keep one")


def make_row(values: Mapping[str, Any], origin: str, folder: Path) -> PromptRow:
    """A row of the values of some columns.

    Args:
        origin: for messages.
        folder: that a relative image is in.

    Raises:
        ConfigError: a value cannot be used, or there is no prompt.
    """
    given = {name: _value(name, value, f"{origin}: {name} {value!r:.80}") for name, value in values.items()}
    if not given.get("prompt"):
        raise ConfigError(f"{origin}: has no prompt; write one, or remove the line")
    if "image" in given:
        given["image"] = str((folder / Path(given["image"]).expanduser()).resolve())
    return PromptRow(**given, origin=origin)


def _value(name: str, value: Any, told: str) -> Any:
    """A cell's value, from what CSV (text) or JSON (typed) says. `told` opens the message when it is of no use."""
    if name in ("prompt", "image"):
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{told}; must be a text")
        return value.strip()
    if name == "use_dynamic_cfg":
        answer = value if isinstance(value, bool) else WORDS.get(str(value).strip().lower())
        if answer is None:
            raise ConfigError(f"{told}; must be true or false")
        return answer
    if name in INTEGERS:
        least, most = INTEGERS[name]
        number = _number(int, value)
        if number is None or not least <= number <= most:
            raise ConfigError(f"{told}; must be a whole number of {least} to {most}")
        return number
    low, high = NUMBERS[name]
    number = _number(float, value)
    if number is None or not math.isfinite(number) or not low <= number <= high:
        raise ConfigError(f"{told}; must be a finite number" + (f" of {low:g} or more" if math.isfinite(low) else ""))
    return number


def _number(kind: type[int] | type[float], value: Any) -> int | float | None:
    """The value as a number of that kind, where it is one: JSON's true is none, nor is 1.5 an integer."""
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return None
    try:
        return kind(value)
    except (TypeError, ValueError):
        return None
