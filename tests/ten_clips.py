"""A manifest of ten small clips, and what of its data set must not depend on who encoded it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import moving_square, write_video
from tests.test_preprocess import Opened

SIZE = ["--height", "32", "--width", "48", "--max_num_frames", "9"]
COUNT = 10


def write_manifest(folder: Path) -> Path:
    """Ten clips: one is broken, one too short, two share a caption; two rows are one and the same."""
    for number in range(COUNT):
        write_video(folder / f"{number}.mp4", moving_square(number, 8 if number == 4 else 9, 40, 56))
    (folder / "6.mp4").write_bytes(b"no video")
    rows: list[dict[str, object]] = [
        {"video": f"{number}.mp4", "caption": f"caption {min(number, 8)}"} for number in range(COUNT)
    ]
    rows += [rows[0], {"video": "1.mp4", "caption": "again", "weight": 0.5}]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "m.jsonl"


def words(cache: Path, model: Path, manifest: Path, *flags: object) -> list[str]:
    """The command line of a run that makes the data set `squares`, two clips a unit."""
    told = ["--cache", cache, "--dataset", "squares", "--pretrained_model_name_or_path", model]
    return [str(word) for word in (*told, "--dataset_name", manifest, *SIZE, "--shard_size", "2", *flags)]


def facts(cache: Path) -> tuple[Any, ...]:
    """What must not depend on who made it: all but the places of members."""
    opened = Opened(cache, "squares")
    places = ("part", "offset", "size_bytes", "crc32")
    rows = [{name: row[name] for name in row if not name.endswith(places)} for row in opened.rows]
    counted = {name: opened.report[name] for name in ("rejected", "buckets", "truncated", "duplicate_captions")}
    return opened.dataset.digest, rows, opened.rejected, counted
