"""Samples on their way from the cache to a step: which to read, and micro-batches in the order of a run.

The main process decides what each place of a global batch is (`Requests`); workers, spawned and never forked, read the
two members that a request names and draw its noise (`train/reading.py`). Nothing is unpacked.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
from torch.utils.data import DataLoader

from shared.errors import UserError
from shared.processes import die_with_parent, ignore_stop_signals
from train.mixture import Mixture
from train.objective import Batch
from train.reading import LatentDataset, Shared, Tasks, deliver
from train.ring import Ring
from train.sampler import MISSING, Deal, Sampler
from train.samples import DrawSettings, Request, Samples

PREFETCH = 2  # tasks that a worker is given ahead
AHEAD = 2  # batches that wait for the loop
HELD = 2  # batches that are neither ahead nor a worker's: the loop's own, and the one that the thread waits with


class Requests:
    """The micro-batches of one rank from a step on, as lists of requests."""

    def __init__(
        self, samples: Mixture | Samples, sampler: Sampler, deal: Deal, rank: int, steps: range, draws: DrawSettings
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
    dataset: LatentDataset,
    requests: Iterable[list[Request]],
    *,
    num_workers: int,
    pin_memory: bool,
    slot_bytes: int = 0,
) -> Generator[Batch, None, None]:
    """The micro-batches that `requests` asks for, read ahead by spawned processes or, with none of them, by a thread.

    A batch holds until the next one is asked for: workers write into the same memory again and again.

    Args:
        slot_bytes: of the largest micro-batch, where there are workers: see `LatentDataset.slot_bytes`.

    Raises:
        CacheError: a member is gone, has changed or is not finite; names the sample.
        NetworkError, ConfigError: the cache cannot be reached, or local copies or shared memory cannot be had.
    """
    tasks = Tasks(requests, max(1, num_workers), dataset.prefetch)
    if num_workers:
        ring = Ring(num_workers * PREFETCH + AHEAD + HELD, slot_bytes)
        loader = DataLoader(
            dataset,
            batch_sampler=tasks,
            collate_fn=partial(deliver, ring=ring),
            num_workers=num_workers,
            multiprocessing_context="spawn",
            prefetch_factor=PREFETCH,
            worker_init_fn=_serve_parent,
        )
        batches = _looked_at(loader, ring)
    else:
        batches = iter(DataLoader(dataset, batch_sampler=tasks, collate_fn=partial(deliver, ring=None)))
    yield from _in_background(_pinned(batches) if pin_memory else batches)


def _looked_at(loader: Iterable[Shared | UserError], ring: Ring) -> Iterator[Batch | UserError]:
    for shared in loader:
        yield shared if isinstance(shared, UserError) else shared.batch(ring)


def _pinned(batches: Iterable[Batch | UserError]) -> Iterator[Batch | UserError]:
    """Copies that a GPU can fetch while the host goes on. Not run where this was written: no GPU."""
    for batch in batches:
        yield batch if isinstance(batch, UserError) else batch.pin_memory()


def _serve_parent(worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process of a run: its main one decides when the reading ends."""
    ignore_stop_signals()
    die_with_parent()  # torch's own watchdog takes seconds, and waits for a read that hangs


def _in_background(items: Iterable[Batch | UserError]) -> Generator[Batch, None, None]:
    """The same items, made by a thread that keeps AHEAD of them ready; what it raises is raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=AHEAD)
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
