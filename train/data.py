"""Samples on their way from the cache to a step: which to read, reading them, and micro-batches in the order of a run.

The main process decides what each place of a global batch is (`Requests`); workers, spawned and never forked, read the
two members that a request names and draw its noise. Nothing is unpacked and nothing is kept.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shared.cache import Cache
from shared.dataset import DataSet, location_columns
from shared.errors import CacheError
from shared.models import Facts
from shared.shards import Location, decode_array, read_member
from train.draws import draw_bool, draw_normal, draw_timestep
from train.objective import Batch, padding
from train.sampler import MISSING, Deal, Sampler


@dataclass(frozen=True)
class Request:
    """One place of a global batch: what to read for it and what its draws depend on."""

    step: int
    place: int
    weight: float  # 0 for a stand-in where no sample fills the place
    sample_id: str
    latent_key: bytes
    latent: Location
    embedding_key: bytes
    embedding: Location


@dataclass(frozen=True)
class DrawSettings:
    """What the draws of a run depend on, beside step and place."""

    seed: int
    global_batch: int
    stratified: bool
    random_flip: float
    caption_dropout: float


class Samples:
    """The rows of a data set that training needs, by sample number.

    Attributes:
        fps: frames a second, the median.
        bucket_names: sorted.
        buckets: [N] each sample's bucket, as its place in bucket_names.
    """

    def __init__(self, dataset: DataSet) -> None:
        kinds = ("latent", "mirrored", "embedding")
        places = [column for kind in kinds for column in location_columns(kind)]
        keys = [f"{kind}_key" for kind in kinds]
        self._table = dataset.columns("sample_id", "bucket", *keys, *places).combine_chunks()
        bucket = self._table["bucket"].dictionary_encode().combine_chunks()
        names = bucket.dictionary.to_pylist()
        rank = np.argsort(np.argsort(names))  # bucket numbers follow their names, not the order of the rows
        self.bucket_names: list[str] = sorted(names)
        self.buckets = rank[bucket.indices.to_numpy()]
        self.fps = float(np.median(dataset.columns("fps")["fps"].to_numpy()))
        empty = dataset.info["empty_prompt"]
        self._empty = (bytes.fromhex(empty["embedding_key"]), _location(empty, "embedding"))

    def __len__(self) -> int:
        return len(self.buckets)

    def sample_id(self, number: int) -> str:
        """The stable name of a sample."""
        return str(self._table["sample_id"][number].as_py())

    def request(self, number: int, step: int, place: int, weight: float, draws: DrawSettings) -> Request:
        """What to read for a sample at a place, with its mirror image and caption drawn."""
        (row,) = self._table.slice(number, 1).to_pylist()
        seed, flip = draws.seed, draws.random_flip
        mirrored = row["mirrored_key"] is not None and draw_bool(seed, step, place, "mirror", flip)
        kind = "mirrored" if mirrored else "latent"
        dropped = draw_bool(seed, step, place, "caption_dropout", draws.caption_dropout)
        embedding = self._empty if dropped else (row["embedding_key"], _location(row, "embedding"))
        return Request(step, place, weight, row["sample_id"], row[f"{kind}_key"], _location(row, kind), *embedding)


def _location(row: dict[str, Any], kind: str) -> Location:
    return Location(*(row[column] for column in location_columns(kind)))


class LatentDataset(Dataset[dict[str, Any]]):
    """Reads requests. What a spawned worker is given: no open file, no table.

    Args:
        dataset: the data set that the requests are of.
    """

    def __init__(self, dataset: DataSet, facts: Facts, draws: DrawSettings) -> None:
        self._cache_url = dataset.cache.url
        self._folders = {kind: dataset.store_folder(kind) for kind in ("latent", "embedding")}
        self._facts_of_store = dataset.info["facts"]
        self._patch_size_t, self._draws = facts.patch_size_t, draws
        self._cache: Cache | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": None}

    def __getitem__(self, request: Request) -> dict[str, Any]:
        """A request's tensors, shapes as in `Batch` without the first axis.

        Raises:
            CacheError: a member is gone, has changed or is not finite; names the sample.
        """
        moments = self._read("latent", request, request.latent_key, request.latent)
        embeds = self._read("embedding", request, request.embedding_key, request.embedding)
        doubled, frames, height, width = moments.shape
        shape = (doubled // 2, frames, height, width)
        padded = (doubled // 2, frames + padding(frames, self._patch_size_t), height, width)
        seed, step, place = self._draws.seed, request.step, request.place
        timestep = draw_timestep(seed, step, place, self._draws.global_batch, stratified=self._draws.stratified)
        return {
            "moments": torch.from_numpy(moments.copy()),
            "posterior_noise": draw_normal(seed, step, place, "posterior", shape),
            "noise": draw_normal(seed, step, place, "noise", padded),
            "timesteps": torch.tensor(timestep),
            "prompt_embeds": torch.from_numpy(embeds.copy()),
            "weights": torch.tensor(request.weight),
            "places": place,
        }

    def __getitems__(self, requests: list[Request]) -> list[dict[str, Any]] | CacheError:
        """A micro-batch, or the mistake as a value: a worker would bury its line in a traceback."""
        try:
            return [self[request] for request in requests]
        except CacheError as error:
            return error

    def _read(self, kind: str, request: Request, key: bytes, location: Location) -> np.ndarray:
        if self._cache is None:
            self._cache = Cache(self._cache_url)
        what = f"sample {request.sample_id}, {kind} {key.hex()}"
        try:
            try:
                payload = read_member(self._cache.storage, self._folders[kind], location)
            except FileNotFoundError:  # the part was repaired away or collected: the key may lie in another one
                store, _ = self._folders[kind].split("/")
                told = self._facts_of_store[store]
                facts = {name: value for name, value in told.items() if name not in ("kind", "format_version")}
                payload = self._cache.store(store, facts).read(key)
        except (CacheError, FileNotFoundError) as error:
            raise CacheError(f"{what}: {error}") from error
        array = decode_array(payload, what)
        if not np.isfinite(array).all():
            raise CacheError(f"{what}: holds NaN or infinity; run `python -m preprocess.verify {self._cache_url}`")
        return array


def collate(rows: list[dict[str, Any]] | CacheError) -> Batch | CacheError:
    """A micro-batch of the rows that a worker read; a mistake as it is."""
    if isinstance(rows, CacheError):
        return rows
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "places"}
    return Batch(**stacked, places=[row["places"] for row in rows])


class Requests:
    """The micro-batches of one rank from a step on, as lists of requests: what a DataLoader takes as batch sampler."""

    def __init__(
        self, samples: Samples, sampler: Sampler, deal: Deal, rank: int, steps: range, draws: DrawSettings
    ) -> None:
        self._samples, self._sampler, self._deal, self._rank = samples, sampler, deal, rank
        self._steps, self._draws = steps, draws

    def __iter__(self) -> Iterator[list[Request]]:
        for step in self._steps:
            batch = self._sampler.batch(step)
            for micro in range(self._deal.micros(batch)):
                places = self._deal.places(micro, self._rank)
                yield [self._request(batch, step, place) for place in places]

    def _request(self, batch: np.ndarray, step: int, place: int) -> Request:
        number = int(batch[place])
        missing = number == MISSING
        # a stand-in of weight 0 keeps shapes and collectives alike on every rank
        return self._samples.request(int(batch[0]) if missing else number, step, place, float(not missing), self._draws)


def micro_batches(
    dataset: LatentDataset, requests: Requests, *, num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """The micro-batches that `requests` asks for, read ahead by spawned processes; with none of them, by a thread.

    Raises:
        CacheError: a member is gone, has changed or is not finite; names the sample.
    """
    options: dict[str, Any] = {}
    if num_workers:
        options = {"multiprocessing_context": "spawn", "prefetch_factor": 2, "worker_init_fn": _ignore_signals}
    loader = DataLoader(
        dataset,
        batch_sampler=requests,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        **options,
    )
    if not num_workers:
        yield from _in_background(iter(loader), ahead=2)
        return
    for batch in loader:
        if isinstance(batch, CacheError):
            raise batch
        yield batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process of a run: its main one decides when the reading ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _in_background(items: Iterator[Batch | CacheError], ahead: int) -> Generator[Batch, None, None]:
    """The same items, made by a thread that keeps `ahead` of them ready; what it raises is raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                break

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the loop that waits must hear of it
            put(error)

    thread = threading.Thread(target=work, name="reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
