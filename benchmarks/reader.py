"""What reading costs beside the bare reads, and how long a step waits for it.

`python -m benchmarks.reader`: latents and embeddings of the shapes of 49x480x720. The reader with two workers, and a
bare loop of `os.pread` and `numpy.frombuffer` in this process, read the same ranges in the same order, in turns. First
each comes from the disk, having been dropped from the page cache, and its checksum is compared; then from the page
cache. Draws are left out, as noise is a cost of the step's; then comes the same with the draws, for comparison.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.table import show
from shared.cache import MEMBERS, Cache, Store
from shared.models import Facts
from shared.shards import ShardWriter
from train.data import DrawSettings, Request, micro_batches
from train.reading import LatentDataset

BUCKET = "49x480x720"
SHAPES = {"latents": (32, 13, 60, 90), "embeddings": (226, 4096)}
FACTS = Facts(
    in_channels=16, out_channels=16, latent_channels=16, patch_size=2, patch_size_t=None, attention_head_dim=64,
    ofs_embed_dim=None, rotary=True, learned_positions=False, sample_height=60, sample_width=90, sample_frames=49,
    max_text_seq_length=226, text_embed_dim=4096, scaling_factor=0.7, invert_scale_latents=False,
)  # fmt: skip
DRAWS = DrawSettings(seed=1, global_batch=1, stratified=True, random_flip=0.0, caption_dropout=0.0)
CLIPS, CLIPS_OF_A_PART = 160, 32
EDGE = 16  # clips at both ends of a pass that are not timed: while workers start, and run out of what to read ahead
ROUNDS, WORKERS = 7, 2
STEPS, WARM_UP = 60, 10
LIMIT = 1 / 0.8  # in time: 80 % of the speed
WAIT_LIMIT = 2.0  # percent of a step


class NativeDataSet:
    """As much of a data set as a reader asks for: two stores of arrays of native shapes."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.info = {"facts": {kind: {"cache_dtype": "float16"} for kind in SHAPES}}
        self._stores = {kind: self._filled(cache.store(kind, {})) for kind in SHAPES}

    def _filled(self, store: Store) -> Store:
        values = np.random.default_rng(0).standard_normal(SHAPES[store.kind], np.float32).astype(np.float16)
        for first in range(0, CLIPS, CLIPS_OF_A_PART):
            with self.cache.writer() as folder:
                shard = ShardWriter(folder)
                for number in range(first, first + CLIPS_OF_A_PART):
                    values.reshape(-1)[0] = number
                    shard.add(number.to_bytes(16), {MEMBERS[store.kind]: values})
                store.publish(shard.finish())
        return store

    def store_folder(self, kind: str) -> str:
        """Where the parts of a kind of member are."""
        return self._stores["latents" if kind == "latent" else "embeddings"].folder

    def requests(self) -> list[list[Request]]:
        """Micro-batches of one clip each: all clips in an order of chance, twice."""
        found = []
        for place, number in enumerate(np.random.default_rng(1).permutation(CLIPS).tolist()):
            key = number.to_bytes(16)
            latent, embedding = (store.location(int(store.find([key])[0])) for store in self._stores.values())
            found.append([Request(0, 0, 1.0, str(place), key, latent, key, embedding, BUCKET)])
        return 2 * found


class Undrawn(LatentDataset):
    """Reads, and draws nothing."""

    def draw(self, request: Request, moments_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Nothing, under the names that a batch has."""
        return {name: torch.empty(0) for name in ("posterior_noise", "noise", "timesteps")}


def main() -> bool:
    """Measure and print; returns whether all figures are within their limits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as name:  # on the disk of the checkout: /tmp may be memory
        read = reading(Path(name))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        waited = waiting(Path(name))
    return read and waited


def reading(folder: Path) -> bool:
    """The reader beside the bare reads."""
    dataset: Any = NativeDataSet(Cache(str(folder)))
    requests = dataset.requests()
    folders = [folder / dataset.store_folder(kind) for kind in ("latent", "embedding")]
    size_bytes = requests[0][0].latent.size_bytes + requests[0][0].embedding.size_bytes
    disk: dict[str, list[float]] = {"bare": [], "reader": [], "drawing": []}  # seconds a clip
    memory: dict[str, list[float]] = {"bare": [], "reader": [], "drawing": []}
    for _ in range(ROUNDS):
        for name, arrivals in (
            ("bare", lambda: bare(folders, requests)),
            ("reader", lambda: whole(Undrawn((dataset,), FACTS, DRAWS), requests)),
            ("drawing", lambda: whole(LatentDataset((dataset,), FACTS, DRAWS), requests)),
        ):
            drop(folder)
            times = arrivals()
            for seconds, start in ((disk, 0), (memory, CLIPS)):
                first, last = start + EDGE, start + CLIPS - EDGE
                seconds[name].append((times[last] - times[first]) / (last - first))

    def speed(seconds: list[float]) -> float:
        return size_bytes / statistics.median(seconds) / 1e9

    def ratio(seconds: dict[str, list[float]]) -> float:
        return statistics.median(seconds["reader"]) / statistics.median(seconds["bare"])

    return show(
        f"reading clips of {BUCKET}, {size_bytes / 1e6:.1f} MB each: {WORKERS} workers, beside a bare loop; "
        f"medians of {ROUNDS}",
        [
            ("from the disk: bare pread and frombuffer", speed(disk["bare"]), None, " GB/s"),
            ("from the disk: the reader, with checksums", speed(disk["reader"]), None, " GB/s"),
            ("from the disk: reader / bare, in time", ratio(disk), LIMIT, ""),
            ("from the disk: the reader and its draws", speed(disk["drawing"]), None, " GB/s"),
            ("from the page cache: bare pread and frombuffer", speed(memory["bare"]), None, " GB/s"),
            ("from the page cache: the reader, a later visit", speed(memory["reader"]), None, " GB/s"),
            ("from the page cache: reader / bare, in time", ratio(memory), None, ""),
            ("from the page cache: the reader and its draws", speed(memory["drawing"]), None, " GB/s"),
        ],
    )


def drop(folder: Path) -> None:
    """Drop the parts from the page cache."""
    for path in folder.rglob("*.tar"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bare(folders: list[Path], requests: list[list[Request]]) -> list[float]:
    """When each clip's two arrays were there."""
    files: dict[Path, int] = {}
    arrivals = []
    for (request,) in requests:
        arrays = []
        for folder, location in zip(folders, (request.latent, request.embedding), strict=True):
            path = folder / f"{location.part}.tar"
            if path not in files:
                files[path] = os.open(path, os.O_RDONLY)
            payload = os.pread(files[path], location.size_bytes, location.offset)
            arrays.append(np.frombuffer(payload, np.float16, offset=128))
        arrivals.append(time.perf_counter())
    for descriptor in files.values():
        os.close(descriptor)
    return arrivals


def whole(dataset: LatentDataset, requests: list[list[Request]]) -> list[float]:
    """When each clip's batch came out of the loader."""
    slot_bytes = dataset.slot_bytes([BUCKET], 1)
    batches: Any = micro_batches(dataset, requests, num_workers=WORKERS, pin_memory=False, slot_bytes=slot_bytes)
    with closing(batches):
        return [time.perf_counter() for _ in batches]


def waiting(folder: Path) -> bool:
    """How much of a step of a small model is waiting for its batches."""
    from benchmarks.step import small_run
    from train.data import Requests
    from train.step import settle, take_step

    run = small_run(folder, 2 * STEPS)
    shares = {}
    for workers in (0, WORKERS):
        requests = Requests(run.samples, run.sampler, run.deal, 0, range(STEPS), run.draws)
        slot_bytes = run.reader.slot_bytes(run.samples.bucket_names, run.deal.batch_size)
        batches = micro_batches(run.reader, requests, num_workers=workers, pin_memory=False, slot_bytes=slot_bytes)
        with closing(batches):
            taken = [take_step(run, step, batches, stopping=False, lora_norm=False) for step in range(STEPS)]
            rows, _ = settle(run, taken)
        waited, took = (sum(row[name] for row in rows[WARM_UP:]) for name in ("data_seconds", "seconds"))
        shares[workers] = (100 * waited / took, 1e3 * took / len(rows[WARM_UP:]))
    return show(
        f"waiting for data, of {STEPS - WARM_UP} steps of a small model",
        [
            ("a step", shares[WORKERS][1], None, " ms"),
            ("waiting, with a thread that reads ahead", shares[0][0], WAIT_LIMIT, " %"),
            (f"waiting, with {WORKERS} workers", shares[WORKERS][0], WAIT_LIMIT, " %"),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
