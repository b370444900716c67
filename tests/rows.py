"""Rows of validation videos with pictures, and stage 1 told of them, for the tests of both stages."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from preprocess.__main__ import main
from shared.cache import Cache
from shared.dataset import DataSet, open_dataset
from tests.conftest import moving_square

ROWS: list[dict[str, Any]] = [
    {"prompt": "a blue square", "image": "start.png", "seed": 7},
    {"prompt": "a red\nsquare", "image": "turned.jpg", "height": 96, "width": 64, "num_frames": 17,
     "guidance_scale": 3.5, "num_inference_steps": 4},
    {"prompt": "a blue square", "image": "again.png", "seed": 8},
]  # fmt: skip


def write_pictures(folder: Path) -> Path:
    """Write two pictures, one of them twice, and rows.jsonl that names them relative to itself."""
    Image.fromarray(moving_square(5, 1, 90, 120)[0]).save(folder / "start.png")
    shutil.copy(folder / "start.png", folder / "again.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # as a telephone held upright writes it
    Image.fromarray(moving_square(6, 1, 90, 120)[0]).save(folder / "turned.jpg", exif=exif)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def stage_1(cache: Path | str, model: Path, clips: Path, *flags: object) -> int:
    """Run stage 1 with flags of its own."""
    words: list[object] = ["--cache", cache, "--dataset", "squares", "--pretrained_model_name_or_path", model]
    words += ["--dataset_name", clips, "--buckets", "9x64x96,9x96x64", "--fps", "8", "--id_token", "SQR", *flags]
    return main([str(word) for word in words])


def opened(cache: Path | str) -> DataSet:
    """Its data set."""
    return open_dataset(Cache(str(cache)), "squares")


def digest_of(file: Path) -> str:
    """sha256 of a file, hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
