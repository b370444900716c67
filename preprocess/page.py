"""The page of a data set version: what `preview.html.j2`, `preview.css` and `preview.js` show, in one HTML file."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.census import Census, bars
from preprocess.strips import Strip
from shared.dataset import DataSet
from shared.errors import REJECTION_REASONS
from shared.page import render_page

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Place:
    """Which page of how many, and which samples are on it: `first`, from 1, to `last`."""

    number: int
    pages: int
    first: int
    last: int

    @staticmethod
    def name(number: int) -> str:
        """The file of a page, counted from 1."""
        return "preview.html" if number == 1 else f"preview-{number}.html"


def render(
    dataset: DataSet,
    census: Census,
    rows: Sequence[dict[str, Any]],
    strips: Sequence[Strip],
    place: Place,
    decoded: dict[str, dict[str, Any]],
) -> str:
    """The page's HTML; the same data set gives the same bytes.

    Args:
        rows: of samples.parquet, each with its strip in `strips`.
        decoded: of `reconstruct`.
    """
    facts = dataset.info["facts"]
    limit = facts["embeddings"]["max_length"]
    samples = [_sample(row, strip, decoded.get(row["sample_id"])) for row, strip in zip(rows, strips, strict=True)]
    shown = {row["bucket"] for row in rows}
    most = max(census.buckets.values(), default=1)
    return render_page(
        HERE,
        "preview",
        kind="Data set",
        title=dataset.name,
        facts=_facts(dataset),
        total=dataset.num_rows,
        minutes=census.seconds / 60,
        census=census,
        limit=limit,
        buckets=[(name, count, count / most, name in shown) for name, count in sorted(census.buckets.items())],
        lengths=bars(census.frames),
        tokens=bars(census.tokens, limit),
        reasons=[(reason, count, REJECTION_REASONS.get(reason, "")) for reason, count in census.rejected.most_common()],
        samples=samples,
        has_decoded=bool(decoded),
        place=place,
        command=f"python -m preprocess.preview {shlex.quote(dataset.cache.url)} --dataset {shlex.quote(dataset.name)} "
        f"--version {dataset.digest[:12]} --all",
    )


def _facts(dataset: DataSet) -> list[tuple[str, str]]:
    info, latents = dataset.info, dataset.info["facts"]["latents"]
    tiling = latents["tiling"]
    tiles = f"tiles of {tiling['height']}x{tiling['width']}" if tiling else "untiled"
    return [
        ("version", dataset.digest[:12]),
        ("model", str(info["model"]["name"])),
        ("latents", f"{latents['dtype']}, kept as {latents['cache_dtype']}, {tiles}"),
        ("id token", info["id_token"] or "none"),
        ("mirrored", f"{info['random_flip']:.0%} of draws" if info["random_flip"] else "never"),
        ("prompts", f"{len(info['validation_prompts'])} for validation"),
    ]


def _sample(row: dict[str, Any], strip: Strip, decoded: dict[str, Any] | None) -> dict[str, Any]:
    """A card."""
    indices, rate = row["frame_indices"], row["source_fps"]
    times = [index / rate for index in indices] if rate else []
    caption, prompt = row["caption"], row["effective_prompt"]
    crop = row["crop"]
    return {
        **{name: row[name] for name in ("source", "bucket", "tokens", "truncated", "weight", "caption")},
        "prompt": prompt,
        "token": prompt.removesuffix(caption).strip() if prompt != caption and prompt.endswith(caption) else "",
        "source_size": f"{row['source_height']}x{row['source_width']} at {rate:.4g} fps",
        "taken": f"{times[0]:.2f} to {times[-1]:.2f} s, {len(indices)} frames at {row['fps']:.4g} fps"
        if times
        else f"{len(indices)} frames",
        "repeated": len(indices) - len(set(indices)),
        "indices": ", ".join(map(str, indices)),
        "crop": f"{crop['height']}x{crop['width']} from row {crop['top']}, column {crop['left']} after resizing",
        "mirrored": row["mirrored_key"] is not None,
        "sample_id": row["sample_id"],
        "latent_key": row["latent_key"].hex(),
        "strip": _picture(strip.jpeg, strip.fault),
        "decoded": None if decoded is None else {**decoded, "strip": _picture(decoded["jpeg"], decoded["fault"])},
    }


def _picture(jpeg: bytes | None, fault: str) -> dict[str, Any]:
    """A strip for an `img`: it must know its size before it is decoded, or the page would jump."""
    from PIL import Image, UnidentifiedImageError

    if jpeg is None:
        return {"uri": None, "fault": fault}
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            width, height = image.size
    except UnidentifiedImageError:
        return {"uri": None, "fault": "is no picture"}
    uri = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return {"uri": uri, "width": width, "height": height, "fault": ""}
