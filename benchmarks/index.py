"""A data set of millions of samples: what publishing it, and opening it to plan the first batch, take.

`python -m benchmarks.index [--rows 10000000]`: made-up rows through the real writer, each step in a process of its own;
no member is written or read. `make bench` takes a million rows.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.fresh import in_fresh_process
from benchmarks.table import show

OPEN_LIMIT_S, OPEN_LIMIT_GIB, WRITE_LIMIT_GIB = 10.0, 2.0, 1.0
SHARD_SIZE = 64  # clips of a part, as stage 1 has it unless it is told otherwise
BUCKETS = ("49x480x720", "49x720x480", "49x480x480")
GLOBAL_BATCH = 8
EDITED = 20
EMPTY = {"embedding_key": "00" * 16, "embedding_part": "00" * 16, "embedding_offset": 512,
         "embedding_size_bytes": 1851520, "embedding_crc32": 0}  # fmt: skip
INFO = {"fingerprints": {"latents": "0a" * 16, "embeddings": "0b" * 16, "images": None}, "random_flip": 0.5,
        "empty_prompt": EMPTY}  # fmt: skip


@cache
def _part(kind: str, number: int) -> str:
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()[:32]


def _place(kind: str, rank: int, member: bytes) -> dict[str, Any]:
    """The place of the rank-th member that was written of a kind."""
    part, position = divmod(rank, SHARD_SIZE)
    size_bytes = 4493440 if kind != "embedding" else 1851520
    return {
        f"{kind}_part": _part(kind, part),
        f"{kind}_offset": 512 + position * (size_bytes + 1536),
        f"{kind}_size_bytes": size_bytes,
        f"{kind}_crc32": int.from_bytes(member[:4]),
    }


def made_up_rows(count: int, mirrored: bool) -> Iterator[dict[str, Any]]:
    """Rows as stage 1 makes them, members in manifest order; one prompt of EDITED lies elsewhere, encoded later."""
    nothing = {f"mirrored_{fact}": None for fact in ("key", "part", "offset", "size_bytes", "crc32")}
    common = {
        "weight": 1.0, "start_s": None, "end_s": None, "frame_indices": list(range(0, 147, 3)), "source_fps": 23.976,
        "fps": 7.992, "source_height": 1080, "source_width": 1920, "frames": 49, "truncated": False,
        "crop": {"top": 0, "left": 67, "height": 480, "width": 853}, "image_key": None, "image_part": None,
        "image_offset": None, "image_size_bytes": None, "image_crc32": None, **nothing,
    }  # fmt: skip
    for number in range(count):
        digest = hashlib.sha512(number.to_bytes(8)).digest()
        row = {
            **common,
            "sample_id": digest[:16].hex(),
            "caption": f"clip {number}: {digest[:24].hex()}",
            "effective_prompt": f"STYLE clip {number}: {digest[:24].hex()}",
            "source": f"clips/{number // 1000:06}/{number}.mp4",
            "bucket": BUCKETS[number % len(BUCKETS)],
            "height": 480,
            "width": 720,
            "tokens": 10 + digest[0] % 64,
            "latent_key": digest[16:32],
            "embedding_key": digest[32:48],
            **_place("latent", number, digest),
            **_place("embedding", number if digest[6] % EDITED else int.from_bytes(digest[:6]) % count, digest[4:]),
        }
        if mirrored:
            row |= {"mirrored_key": digest[48:], **_place("mirrored", number, digest[8:])}
        yield row


def publish(folder: str, count: str, mirrored: str) -> dict[str, float]:
    """Publish the rows as a data set of a new cache."""
    from shared.cache import Cache
    from shared.dataset import publish_dataset

    made_up = made_up_rows(int(count), mirrored == "True")
    making_s = 0.0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal making_s
        batch: list[dict[str, Any]] = [{}]
        while batch:
            started = time.process_time()
            batch = list(islice(made_up, 4096))
            making_s += time.process_time() - started
            yield from batch

    root = Cache(folder)
    with root.writer() as writer:
        publish_dataset(root, writer, "few", INFO, made_up_rows(1, True), [], dict)  # what is imported late
        started, busy, read = time.perf_counter(), time.process_time(), _bytes_read()
        digest = publish_dataset(root, writer, "many", INFO, rows(), [], dict)
    path = root.storage.local(f"datasets/many/versions/{digest}/samples.parquet")
    return {
        "seconds": time.perf_counter() - started,
        "work_s": time.process_time() - busy - making_s,
        "read": _bytes_read() - read,
        "bytes": path.stat().st_size,
    }


def repeat(folder: str, times: str) -> dict[str, float]:
    """Write the row groups of samples.parquet this many times; the names of samples and the version's stay."""
    import pyarrow.parquet as pq

    from shared.cache import Cache
    from shared.dataset import open_dataset

    dataset = open_dataset(Cache(folder), "many")
    path = dataset.cache.storage.local(f"{dataset.folder}/samples.parquet")
    with pq.ParquetFile(path) as file:
        options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        with pq.ParquetWriter(path.with_suffix(".more"), file.schema_arrow, **options) as writer:
            for _ in range(int(times)):
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))
    path.with_suffix(".more").replace(path)
    return {}


def open_and_plan(folder: str) -> dict[str, float]:
    """Open a data set and plan the first batch, as training does."""
    import pyarrow.parquet as pq

    from shared.cache import Cache
    from shared.dataset import open_dataset
    from train.data import DrawSettings, Requests, Samples  # torch takes seconds, whatever the data
    from train.sampler import Deal, Sampler

    Samples(open_dataset(Cache(folder), "few"))  # what is imported late
    read, started = _bytes_read(), time.perf_counter()
    dataset = open_dataset(Cache(folder), "many")
    samples = Samples(dataset)
    opened = time.perf_counter()
    deal = Deal(1, 1, GLOBAL_BATCH)
    sampler = Sampler(samples.buckets, GLOBAL_BATCH, dataset.digest, seed=0)
    draws = DrawSettings(seed=0, global_batch=GLOBAL_BATCH, stratified=True, random_flip=0.5, caption_dropout=0.1)
    first = [request for (request,) in Requests(samples, sampler, deal, 0, range(1), draws)]
    planned, read = time.perf_counter(), _bytes_read() - read
    path = dataset.cache.storage.local(f"{dataset.folder}/samples.parquet")
    assert len({request.sample_id for request in first}) == GLOBAL_BATCH
    return {
        "samples": len(samples),
        "open_s": opened - started,
        "plan_s": planned - opened,
        "columns_gib": samples.nbytes / 2**30,
        "bytes": path.stat().st_size,
        "row_groups": pq.ParquetFile(path).num_row_groups,
        "read": read,
    }


def _bytes_read() -> int:
    """Bytes that this process has read of files so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(counters["rchar"])


def main(rows: int = 1_000_000, times: int = 1, mirrored: bool = False, folder: str | None = None) -> bool:
    """Measure and print; returns whether all figures are within their limits.

    Args:
        times: how often the file holds the rows.
        mirrored: every clip has its mirror image too.
        folder: where the cache is written and stays; one that is there is opened only. None: a temporary folder.
    """
    figures: list[tuple[str, float, float | None, str]] = []
    root = folder or tempfile.mkdtemp(prefix="latentreel-index-")
    try:
        if not Path(root, "datasets").exists():
            written = in_fresh_process("index", "publish", root, rows, mirrored)
            figures += [
                ("publish", written["seconds"], None, " s"),
                ("publish: processor time, making the rows up left out", written["work_s"], None, " s"),
                ("publish: rows of a second of processor time", rows / written["work_s"], None, ""),
                ("publish: peak memory of the process", written["peak_gib"], WRITE_LIMIT_GIB, " GiB"),
                ("publish: bytes read / bytes of samples.parquet", written["read"] / written["bytes"], 0.01, ""),
            ]
            if times > 1:
                in_fresh_process("index", "repeat", root, times)
        found = in_fresh_process("index", "open_and_plan", root)
    finally:
        if folder is None:
            shutil.rmtree(root)
    repeated = f"{rows:,} rows, {times} times, " if times > 1 else ""
    mirror = "with" if mirrored else "without"
    return show(
        f"a data set of {found['samples']:,} samples ({repeated}{mirror} mirrored clips)",
        [
            *figures,
            ("samples.parquet", found["bytes"] / 2**30, None, " GiB"),
            ("samples.parquet: row groups", found["row_groups"], None, ""),
            ("open: read its columns", found["open_s"], None, " s"),
            ("open: plan the first batch", found["plan_s"], None, " s"),
            ("open and plan", found["open_s"] + found["plan_s"], OPEN_LIMIT_S, " s"),
            ("open and plan: with Python's start and imports", found["whole_s"], None, " s"),
            ("open and plan: processor time of all that", found["cpu_s"], None, " s"),
            ("open and plan: peak memory of the process", found["peak_gib"], OPEN_LIMIT_GIB, " GiB"),
            ("open and plan: of that, the columns", found["columns_gib"], None, " GiB"),
            ("open: bytes read / bytes of samples.parquet", found["read"] / found["bytes"], 1.01, ""),
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows that go through the writer")
    parser.add_argument("--times", type=int, default=1, help="how often the file then holds them")
    parser.add_argument("--mirrored", action="store_true", help="every clip has its mirror image too")
    parser.add_argument("--cache", help="folder that the cache is written into and stays in, or that has one already")
    told = parser.parse_args()
    raise SystemExit(0 if main(told.rows, told.times, told.mirrored, told.cache) else 1)
