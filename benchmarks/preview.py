"""What the page of a data set weighs, and what it adds to publishing: it must not grow with the samples.

`python -m benchmarks.preview [--rows 200000] [--times 5]`: made-up rows; the first 2,000 have strips in parts of 64
clips, as stage 1 leaves them. Each step is a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from benchmarks.fresh import in_fresh_process
from benchmarks.index import INFO, SHARD_SIZE, made_up_rows
from benchmarks.table import show

PAGE_SAMPLES = 2000
MORE_LIMIT_S = 3.0  # of processor time, for a million samples
GROWTH_LIMIT = 1.5  # of the peak memory, from 2,000 samples to all
CARD_LIMIT_KB = 3.0  # of a card, beside its strip
STORE = "0a" * 16  # as INFO says
FACTS: dict[str, Any] = {
    "latents": {"dtype": "bfloat16", "cache_dtype": "float16", "tiling": None},
    "embeddings": {"max_length": 226},
}
TOLD = {
    **INFO,
    "facts": FACTS,
    "model": {"name": "made-up/CogVideoX-2b"},
    "id_token": "STYLE",
    "validation_prompts": [],
}
REJECTED = {"caption": "a door closes", "reason": "too_short", "detail": "4 usable frames of 4 give 1 at 8 fps, need 9"}


def publish(folder: str, count: str) -> dict[str, float]:
    """Publish the rows as `many`, their first 2,000 as `few`; and the parts of these."""
    import numpy as np

    from preprocess.decode import make_preview
    from shared.cache import Cache
    from shared.dataset import publish_dataset
    from shared.shards import ShardWriter

    root, rng = Cache(folder), np.random.default_rng(0)
    few = list(made_up_rows(PAGE_SAMPLES, False))
    ramp, strips = np.linspace(0, 200, 4 * 96 * 144 * 3).reshape(4, 96, 144, 3), 0
    with root.writer() as writer:
        for start in range(0, len(few), SHARD_SIZE):
            shard = ShardWriter(writer)
            unit = few[start : start + SHARD_SIZE]
            for row in unit:
                frames = ramp + rng.normal(0, 10, (4, 96, 144, 1))
                strip = make_preview(frames.clip(0, 255).astype(np.uint8))
                strips += len(strip)
                moments = np.frombuffer(row["latent_key"], np.float16)
                shard.add(row["latent_key"], {"moments.npy": moments, "json": b"{}", "preview.jpg": strip})
            part = shard.finish()
            root.storage.publish(part.tar, f"latents/{STORE}/{part.part}.tar")
            root.storage.publish(part.index, f"latents/{STORE}/{part.part}.parquet")
            for row in unit:
                row["latent_part"] = part.part

        def rows() -> Iterator[dict[str, Any]]:
            yield from few
            yield from islice(made_up_rows(int(count), False), PAGE_SAMPLES, None)

        names = (f"{hashlib.sha256(bytes([number % 256])).hexdigest()}.mp4" for number in range(20_000))
        rejected = [{"source": name, **REJECTED} for name in names]
        publish_dataset(root, writer, "few", TOLD, few, rejected, dict)
        publish_dataset(root, writer, "many", TOLD, rows(), rejected, dict)
    return {"strips": strips}


def page(folder: str, name: str) -> dict[str, float]:
    """Put the page into the version, as stage 1 does once it has published it."""
    from preprocess.preview import write_preview
    from shared.cache import Cache
    from shared.dataset import open_dataset

    root = Cache(folder)
    dataset = open_dataset(root, name)
    with root.writer() as writer:
        started, busy = time.perf_counter(), time.process_time()
        write_preview(root, writer, dataset)
        seconds, work_s = time.perf_counter() - started, time.process_time() - busy
    size_bytes = root.storage.size(f"{dataset.folder}/preview.html")
    return {"seconds": seconds, "work_s": work_s, "bytes": size_bytes, "samples": dataset.num_rows}


def main(rows: int = 200_000, times: int = 5) -> bool:
    """Measure and print; returns whether all figures are within their limits.

    Args:
        rows: that go through the writer.
        times: how often the file then holds them.
    """
    root = tempfile.mkdtemp(prefix="latentreel-preview-")
    try:
        strips = in_fresh_process("preview", "publish", root, rows)["strips"]
        in_fresh_process("index", "repeat", root, times)
        few, many = (in_fresh_process("preview", "page", root, name) for name in ("few", "many"))
    finally:
        shutil.rmtree(root)
    return show(
        f"the page of a data set of {few['samples']:,} samples, and of {many['samples']:,}",
        [
            ("a strip", strips / PAGE_SAMPLES / 1e3, None, " kB"),
            ("the page", few["bytes"] / 1e6, None, " MB"),
            ("a card, its strip left out", (few["bytes"] - strips * 4 / 3) / PAGE_SAMPLES / 1e3, CARD_LIMIT_KB, " kB"),
            ("to make it", few["seconds"], None, " s"),
            ("to make it: processor time", few["work_s"], None, " s"),
            ("to make the first of many: processor time", many["work_s"], None, " s"),
            ("of that, more than for few", many["work_s"] - few["work_s"], MORE_LIMIT_S, " s"),
            ("peak memory of the process", few["peak_gib"], None, " GiB"),
            ("peak memory: many / few", many["peak_gib"] / few["peak_gib"], GROWTH_LIMIT, ""),
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="rows that go through the writer")
    parser.add_argument("--times", type=int, default=5, help="how often the file then holds them")
    told = parser.parse_args()
    raise SystemExit(0 if main(told.rows, told.times) else 1)
