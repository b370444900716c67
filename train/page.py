"""The page of one or several runs: what `report.html.j2`, `report.css` and `report.js` show, in one HTML file.

Names, prompts and flags are text that others wrote: the template escapes them, and the data for the script is JSON
with `<`, `>`, `&` and `'` escaped. What it has in common with other pages is in `shared/page.py`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.page import render_page, video_cell
from train.curves import PHASES, POINTS, QUARTILE_COLUMNS, WINDOW
from train.record import Record, ValidationVideo

HERE = Path(__file__).resolve().parent
COLOURS = 7  # of runs, in report.css; further ones are the same colours, dashed
DIGITS = 6  # of a value in a curve
ABSENT = "—"
SMOOTHED = ("loss", "grad_norm", *QUARTILE_COLUMNS)
PLAIN = ("lr", "lora_norm", *PHASES, "seconds")


def render(records: list[Record], place: Path) -> str:
    """The page's HTML.

    Args:
        records: the runs, in the order that they are shown in.
        place: where the file will lie; paths to videos are relative to it.
    """
    names = names_apart(records)
    differing, same = compare([record.config for record in records])
    return render_page(
        HERE,
        "report",
        kind="Training report",
        title=" · ".join(names),
        cards=[_card(record, name) for record, name in zip(records, names, strict=True)],
        names=names,
        colours=COLOURS,
        data={"runs": [_series(record, name) for record, name in zip(records, names, strict=True)]},
        differing=differing,
        same=same,
        lora=_lora_rows(records),
        prompts=video_grid(records, place),
        widest=max(record.curves.width for record in records),
        points=POINTS,
        window=100 / WINDOW,
        made=_moment(time.time()),
    )


def names_apart(records: list[Record]) -> list[str]:
    """A name for each run: its folder's; where two have the same, with the folders above that tell them apart."""
    parts = [record.folder.resolve().parts for record in records]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def compare(configs: list[dict[str, Any]]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """The flags that differ between runs, and the others: name, and the value of each run.

    `output_dir`, which no two runs have in common, is not counted as a difference.
    """
    differing: list[tuple[str, list[str]]] = []
    same: list[tuple[str, list[str]]] = []
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [_flag(config[name]) if name in config else ABSENT for config in configs]
        row = (name, values)
        (differing if len(set(values)) > 1 and name != "output_dir" else same).append(row)
    return differing, same


def _flag(value: Any) -> str:
    """A flag's value as a command line or a TOML file has it."""
    if value is None:
        return "not given"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _card(record: Record, name: str) -> dict[str, Any]:
    """The header of a run."""
    lora, config, curves = record.lora, record.config, record.curves
    asked = config.get("max_train_steps")
    done = f"{curves.last_step:,}" + (f" of {asked:,}" if isinstance(asked, int) and not record.finished else "")
    if record.finished:
        state = "finished"
    else:
        state = f"at step {curves.last_step:,}, written {_moment(record.written)}" if curves.points else "no step yet"
    rank, alpha = (lora.rank, lora.alpha) if lora else (config.get("rank"), config.get("lora_alpha"))
    base = lora.base_model if lora else config.get("pretrained_model_name_or_path") or "the data set's"
    dataset = (lora.dataset if lora else config.get("dataset")) or ABSENT
    rate = curves.samples / curves.seconds if curves.seconds else None
    facts = [
        ("base model", base),
        ("data set", f"{dataset}, version {lora.dataset_digest[:12]}" if lora else dataset),
        ("LoRA", f"rank {rank}, alpha {alpha:g}" if rank is not None and alpha is not None else ABSENT),
        ("steps", done),
        ("time in steps", duration(curves.seconds)),
        ("samples/s", f"{rate:#.3g}" if rate else ABSENT),
    ]
    if curves.skipped:
        facts.append(("skipped steps", f"{curves.skipped:,}"))
    best = min(record.holdout, key=lambda row: float(row["loss"]), default=None)
    return {
        "name": name,
        "folder": str(record.folder),
        "state": state,
        "finished": record.finished,
        "facts": facts,
        "holdout": None
        if best is None
        else {"last": record.holdout[-1]["loss"], "best": best["loss"], "best_step": best["step"]},
        "loss": next((value for value in reversed(curves.smoothed("loss")) if value is not None), None),
    }


def _series(record: Record, name: str) -> dict[str, Any]:
    """A run for the script: lists as long as `steps`, a point each; null where a run has no value."""
    curves = record.curves
    means: dict[str, list[float | None]] = {column: curves.means(column) for column in (*PLAIN, "loss", "grad_norm")}
    means["samples_per_second"] = curves.rates()
    smoothed = {column: curves.smoothed(column) for column in SMOOTHED}
    smoothed["samples_per_second"] = curves.smoothed_rates()
    ranges = {column: curves.ranges(column) for column in ("loss", "grad_norm")} if curves.width > 1 else {}
    return {
        "name": name,
        "width": curves.width,
        "steps": [point.last for point in curves.points],
        "skipped": [point.last for point in curves.points if point.skipped],
        "means": {column: _short(values) for column, values in means.items() if _any(values)},
        "smoothed": {column: _short(values) for column, values in smoothed.items() if _any(values)},
        "low": {column: _short([pair and pair[0] for pair in pairs]) for column, pairs in ranges.items()},
        "high": {column: _short([pair and pair[1] for pair in pairs]) for column, pairs in ranges.items()},
        "holdout": {
            "steps": [row["step"] for row in record.holdout],
            "loss": _short([row["loss"] for row in record.holdout]),
            "quartiles": [_short(list(row.get("quartiles") or [None] * 4)) for row in record.holdout],
        },
    }


def _short(values: list[float | None]) -> list[float | None]:
    """Values with as many digits as a chart can show; JSON has no NaN."""
    return [float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value) else None for value in values]


def _any(values: list[float | None]) -> bool:
    return any(value is not None for value in values)


def _lora_rows(records: list[Record]) -> list[tuple[str, list[str], bool]]:
    """Each fact of the runs' LoRAs: its name, the value of each run, whether they differ."""
    facts = [asdict(record.lora) if record.lora else {} for record in records]
    rows = []
    for name in dict.fromkeys(name for told in facts for name in told):
        values = [_fact(told[name]) if name in told else ABSENT for told in facts]
        rows.append((name, values, len(set(values)) > 1))
    return rows


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return ABSENT if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def video_grid(records: list[Record], place: Path) -> list[dict[str, Any]]:
    """The validation videos: for each prompt and seed the steps, and for each run a cell a step.

    A cell is None where the run has made no video of that prompt at that step though another has, or itself at
    another step; `url` is None where its JSON is there and the video is not.
    """
    found: dict[tuple[str, int | None, int], dict[tuple[int, int], ValidationVideo]] = {}
    for number, record in enumerate(records):
        seen: dict[tuple[str, int | None, int], int] = {}
        for video in sorted(record.videos, key=lambda video: (video.step, video.row)):
            told = (video.prompt if video.prompt is not None else video.name, video.seed, video.step)
            nth = seen[told] = seen.get(told, -1) + 1  # the same prompt twice at a step: with other settings
            found.setdefault((told[0], video.seed, nth), {})[number, video.step] = video
    grid = []
    for (prompt, seed, _), videos in sorted(found.items(), key=lambda pair: _reading_order(*pair[0])):
        steps = sorted({step for _, step in videos})
        runs = [
            {"number": number, "cells": [_cell(videos.get((number, step)), place) for step in steps]}
            for number, record in enumerate(records)
            if record.videos
        ]
        grid.append({"prompt": prompt, "seed": seed, "steps": steps, "runs": runs})
    return grid


def _reading_order(prompt: str, seed: int | None, nth: int) -> tuple[Any, ...]:
    return prompt.casefold(), prompt, -1 if seed is None else seed, nth


def _cell(video: ValidationVideo | None, place: Path) -> dict[str, Any] | None:
    if video is None or video.size_bytes is None:
        return None
    return video_cell(video.path, place, video.size_bytes, video.size)


def duration(seconds: float) -> str:
    """A time as people tell it: `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
