"""Reading what a run asks for: requests become tensors, with several range reads on their way at a time.

A reader, the background thread or a spawned worker, is given a micro-batch together with those that it will be given
next (`Tasks`). It reads the members of all of them in order of need, `--prefetch` at a time, while it draws and
collates. What comes out is the same whatever reads how far ahead: draws are functions of (seed, step, place, purpose).
"""

from __future__ import annotations

import math
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shared.dataset import DataSet
from shared.errors import CacheError, NetworkError, UserError
from shared.geometry import Bucket
from shared.models import Facts
from train.draws import draw_bool, draw_normal, draw_number
from train.local_cache import LocalCache
from train.members import Member, MemberReader
from train.objective import Batch, padding
from train.ring import Placed, Ring, packed_bytes

if TYPE_CHECKING:
    from train.samples import DrawSettings, Request

# What the noise of a batch is drawn for, by its name there.
PURPOSES = {"posterior_noise": "posterior", "noise": "noise", "image_posterior_noise": "image_posterior"}
SCALARS = ("timesteps", "weights", "image_factors")  # of a place


@dataclass(frozen=True)
class Task:
    """What a reader is given: the requests of a micro-batch, those that it will be given after it, and its number."""

    requests: list[Request]
    ahead: list[Request]
    number: int = 0


@dataclass(frozen=True)
class Rows:
    """What a reader read for a task: the places of a micro-batch, and the task's number."""

    number: int
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Shared:
    """A micro-batch in a slot of a ring: what a worker sends in its place."""

    slot: int
    placed: dict[str, Placed]
    places: list[int]
    skipped: list[str]

    def batch(self, ring: Ring) -> Batch:
        """The micro-batch, in place."""
        return Batch(**ring.read(self.slot, self.placed), places=self.places, skipped=self.skipped)


class Tasks:
    """The micro-batches of a run as tasks: what a DataLoader takes as batch sampler.

    Args:
        micro_batches: lists of requests.
        readers: that a DataLoader deals them to in turn. Were it to deal otherwise, reads ahead would be in vain, and
            nothing else would change.
        prefetch: reads that a reader has on their way at a time.
    """

    def __init__(self, micro_batches: Iterable[list[Request]], readers: int, prefetch: int) -> None:
        self._micro_batches, self._readers, self._prefetch = micro_batches, readers, prefetch

    def __iter__(self) -> Iterator[Any]:  # of Task; torch's stubs know lists only
        waiting: deque[list[Request]] = deque()
        numbers = count()
        for requests in self._micro_batches:
            waiting.append(requests)
            ahead = -(-self._prefetch // sum(request.reads for request in requests))  # whole micro-batches
            while len(waiting) > ahead * self._readers:
                yield self._next(waiting, next(numbers))
        while waiting:
            yield self._next(waiting, next(numbers))

    def _next(self, waiting: deque[list[Request]], number: int) -> Task:
        ahead = [request for requests in islice(waiting, self._readers, None, self._readers) for request in requests]
        return Task(waiting.popleft(), ahead, number)


class ReadPool:
    """Threads that do what they are given, in order. They end with the pool, and keep no process from ending."""

    def __init__(self, threads: int) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=_work_off, args=(self._work,), name="range read", daemon=True).start()
        weakref.finalize(self, _end, self._work, threads)

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """What the work will have given."""
        future: Future[Any] = Future()
        self._work.put((future, work))
        return future


def _work_off(waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := waiting.get()) is not None:
        future, work = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:  # whatever it is, who waits for the result is told
                future.set_exception(error)
        del item, future, work  # nothing is kept while there is nothing to do


def _end(waiting: queue.SimpleQueue[Any], threads: int) -> None:
    for _ in range(threads):
        waiting.put(None)


class LatentDataset(Dataset[dict[str, Any]]):
    """Reads requests. What a spawned worker is given: no open file, no table, no thread.

    Args:
        datasets: what the requests are of: one, or those that `Request.dataset` counts.
        prefetch: reads on their way at a time.
        local_cache: where copies of what is read are kept.
        skip_bad: a sample that is gone, has changed or is not finite becomes a place of weight 0, instead of an error.
        image_factor: of the first frames, a choice of `Facts.image_factor`.
    """

    def __init__(
        self,
        datasets: DataSet | Sequence[DataSet],
        facts: Facts,
        draws: DrawSettings,
        *,
        prefetch: int = 4,
        local_cache: LocalCache | None = None,
        skip_bad: bool = False,
        image_factor: str = "pipeline",
    ) -> None:
        self.prefetch = prefetch
        self._facts, self._draws, self._skip_bad = facts, draws, skip_bad
        self._image_factor = facts.image_factor(image_factor)
        several = (datasets,) if isinstance(datasets, DataSet) else datasets
        self._readers = [MemberReader(dataset, local_cache) for dataset in several]
        images = [dataset.info["facts"]["images"] for dataset in several] if facts.image_to_video else []
        self._variants = [told["variants"] for told in images]  # of first frames, by data set; none: text-to-video
        self._shapes_of: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}  # by bucket
        self._pool: ReadPool | None = None
        self._reads: dict[Member, Future[np.ndarray]] = {}  # on their way, or read ahead

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None, "_reads": {}}

    def __getitem__(self, request: Request) -> dict[str, Any]:
        """What a place of a batch holds, shapes as in `Batch` without the first axis; what was read as numpy arrays.

        Raises:
            CacheError: a member is gone, has changed or is not finite; names the sample.
            NetworkError: the cache cannot be reached.
        """
        members = self._members(request)
        reads = {name: self._start(member) for name, member in members.items()}
        found, skipped = {}, ""
        for name, read in reads.items():
            try:
                found[name] = read.result()
            except NetworkError:  # says nothing of the sample
                raise
            except CacheError as error:
                if not self._skip_bad:
                    raise
                skipped = skipped or str(error)
        if skipped:
            found = {
                name: np.zeros(member.shape, self._readers[member.dataset].dtype(member.kind))
                for name, member in members.items()
            }
        if "image_moments" in found:
            found["image_moments"] = found["image_moments"][self._variant(request)]
        return {
            **found,
            **self.draw(request, members["moments"].shape),
            "weights": torch.tensor(0.0 if skipped else request.weight),
            "places": request.place,
            "skipped": skipped,
        }

    def __getitems__(self, task: Task) -> Rows | UserError:
        """A micro-batch, or the mistake as a value: a worker would bury its line in a traceback."""
        wanted = [member for one in (*task.requests, *task.ahead) for member in self._members(one).values()]
        self._reads = {member: self._start(member) for member in wanted}
        try:
            return Rows(task.number, [self[request] for request in task.requests])
        except UserError as error:
            return error

    def draw(self, request: Request, moments_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The draws of a place: the posterior's noise, the noise that is added, its timestep; those of its image."""
        seed, step, place = self._draws.seed, request.step, request.place
        drawn = {
            name: draw_normal(seed, step, place, PURPOSES[name], shape)
            for name, shape in self._noise_shapes(moments_shape).items()
        }
        drawn["timesteps"] = torch.tensor(self._draws.timestep(step, place))
        if self._variants:
            dropped = draw_bool(seed, step, place, "image_dropout", self._draws.noised_image_dropout)
            drawn["image_factors"] = torch.tensor(0.0 if dropped else self._image_factor)
        return drawn

    def slot_bytes(self, buckets: Iterable[str], places: int) -> int:
        """How large a slot of a `Ring` must be for a micro-batch of so many places, of any of these buckets."""
        return max(self._packed_bytes(bucket, places) for bucket in buckets)

    def _packed_bytes(self, bucket: str, places: int) -> int:
        shapes = self._shapes(bucket)
        sizes = [
            math.prod(shape) * max(reader.dtype(kind).itemsize for reader in self._readers)
            for kind, shape in shapes.values()
        ]
        sizes += [
            math.prod(shape) * torch.float32.itemsize for shape in self._noise_shapes(shapes["moments"][1]).values()
        ]
        sizes += [torch.int64.itemsize] * len(SCALARS)
        return packed_bytes([places * size for size in sizes])

    def _noise_shapes(self, moments_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the noise of a place, by the name that it has in a batch."""
        doubled, frames, height, width = moments_shape
        channels, padded = doubled // 2, frames + padding(frames, self._facts.patch_size_t)
        shapes: dict[str, tuple[int, ...]] = {
            "posterior_noise": (channels, frames, height, width),
            "noise": (channels, padded, height, width),
        }
        return shapes | ({"image_posterior_noise": (channels, 1, height, width)} if self._variants else {})

    def _variant(self, request: Request) -> int:
        variants = self._variants[request.dataset]
        return draw_number(self._draws.seed, request.step, request.place, "image_variant", variants)

    def _members(self, request: Request) -> dict[str, Member]:
        """What to read for a request, by the name that it has in a batch."""
        shapes = self._shapes(request.bucket)
        kind, shape = shapes["moments"]
        of = partial(Member, request.sample_id, dataset=request.dataset)
        members = {
            "moments": of(kind, request.latent_key, request.latent, shape),
            "prompt_embeds": of("embedding", request.embedding_key, request.embedding, shapes["prompt_embeds"][1]),
        }
        if request.image is not None:
            assert request.image_key is not None
            kind, shape = shapes["image_moments"]
            stacked = (self._variants[request.dataset], *shape)
            members["image_moments"] = of(kind, request.image_key, request.image, stacked)
        return members

    def _shapes(self, bucket: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Kind and shape of what is read for a place, by the name that it has in a batch."""
        if bucket not in self._shapes_of:
            facts, shape = self._facts, Bucket.parse(bucket).latent_shape
            doubled = 2 * facts.latent_channels
            shapes = {
                "moments": ("latent", (doubled, *shape)),
                "prompt_embeds": ("embedding", (facts.max_text_seq_length, facts.text_embed_dim)),
            }
            image = {"image_moments": ("image", (doubled, 1, *shape[1:]))} if self._variants else {}
            self._shapes_of[bucket] = {**shapes, **image}
        return self._shapes_of[bucket]

    def _start(self, member: Member) -> Future[np.ndarray]:
        """The read of a member: the one that is on its way, or a new one behind all others."""
        self._pool = self._pool or ReadPool(self.prefetch)
        return self._reads.get(member) or self._pool.submit(partial(self._readers[member.dataset].read, member))


def deliver(read: Rows | UserError, ring: Ring | None = None) -> Batch | Shared | UserError:
    """What leaves a reader: a micro-batch; with a ring, in the slot of its number. A mistake as it is."""
    if isinstance(read, UserError):
        return read
    if ring is None:
        return collate(read.rows)
    columns, told = _columns(read.rows)
    slot = read.number % ring.slots
    return Shared(slot, ring.write(slot, columns), **told)


def collate(rows: list[dict[str, Any]]) -> Batch:
    """A micro-batch of the rows of a reader."""
    columns, told = _columns(rows)
    tensors: dict[str, Any] = {name: _stack(values) for name, values in columns.items()}
    return Batch(**tensors, **told)


def _columns(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What becomes tensors, by name; and what is told beside them."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    places, skipped = columns.pop("places"), columns.pop("skipped")
    return columns, {"places": places, "skipped": [why for why in skipped if why]}


def _stack(values: list[Any]) -> torch.Tensor:
    if isinstance(values[0], np.ndarray):
        return torch.from_numpy(np.stack(values))  # the one copy: what was read is read-only
    return torch.stack(values)
