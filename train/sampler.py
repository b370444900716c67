"""The order of samples: a pure function of (data set digest, seed, epoch). Touches no file.

An epoch is shuffled, grouped by bucket, cut into global batches of one bucket, and the batches are shuffled. A global
batch is what one optimizer step sees, over all ranks and accumulation; its places are dealt to ranks and micro-batches
by arithmetic. So every rank has equally many micro-batches, and one integer, the step, says where a run stands.

Where all weights are equal, an epoch has every sample exactly once. Else it has as many draws as there are samples, the
same number of each bucket in each epoch, and a sample has its share of them, rounded up or down (systematic sampling).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from shared.errors import ConfigError
from shared.seeds import seed_for

MISSING = -1  # a place that no sample fills: the last batch of a bucket may be short
STEPS_AHEAD = 64  # that a reader in a thread may be: of a small data set it is epochs, which both would make in turns


@dataclass(frozen=True, eq=False)
class Sampler:
    """The order of a run.

    Args:
        buckets: [N] a number per sample, equal for samples of one bucket.
        global_batch: places of a global batch.
        digest: of the data set version.
        numbers: of the samples that are trained on; None: all.
        weights: [N] how often a sample is drawn, beside others; None: all alike.
        drop_last: leave out batches that are not full.
    """

    buckets: np.ndarray
    global_batch: int
    digest: str
    seed: int
    numbers: np.ndarray | None = None
    weights: np.ndarray | None = None
    drop_last: bool = False
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the same in each."""
        return sum(self._batches(draws) for _, draws in self._groups)

    @cached_property
    def left_out(self) -> dict[int, int]:
        """Buckets of which no epoch has a batch, as too few draws are theirs; how many of their samples have a weight.

        Each epoch has the same number of each bucket, so what is rounded to none is never trained on.
        """
        counts = {
            int(self.buckets[group[0]]): len(group) if self.weights is None else int((self.weights[group] > 0).sum())
            for group, draws in self._all_groups
            if not self._batches(draws)
        }
        return {bucket: count for bucket, count in counts.items() if count}

    @property
    def _groups(self) -> list[tuple[np.ndarray, int]]:
        return [(group, draws) for group, draws in self._all_groups if draws]

    @cached_property
    def _all_groups(self) -> list[tuple[np.ndarray, int]]:
        """The numbers of each bucket's samples, and how many draws it has in an epoch."""
        numbers = np.arange(len(self.buckets)) if self.numbers is None else self.numbers
        numbers = numbers.astype(np.int32 if len(self.buckets) < 2**31 else np.int64)
        numbers = numbers[np.argsort(self.buckets[numbers], kind="stable")]
        _, counts = np.unique(self.buckets[numbers], return_counts=True)
        groups = np.split(numbers, np.cumsum(counts)[:-1])
        if self.weights is None:
            return list(zip(groups, counts.tolist(), strict=True))
        shares = np.array([self.weights[group].sum(dtype=np.float64) for group in groups])
        exact = shares / shares.sum() * len(numbers)
        draws = np.floor(exact).astype(int)
        most_cut = np.argsort(draws - exact, kind="stable")[: len(numbers) - draws.sum()]
        draws[most_cut] += 1
        return list(zip(groups, draws.tolist(), strict=True))

    def _batches(self, draws: int) -> int:
        return draws // self.global_batch if self.drop_last else -(-draws // self.global_batch)

    def batch(self, step: int) -> np.ndarray:
        """The global batch [global_batch] of a step, counted from 0 over all epochs."""
        epoch, row = divmod(step, self.steps_per_epoch)
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = self._epochs[epoch] = self.epoch(epoch)
            for old in sorted(self._epochs)[: -2 - STEPS_AHEAD // self.steps_per_epoch]:
                self._epochs.pop(old, None)
        return batches[row]

    def epoch(self, epoch: int) -> np.ndarray:
        """The epoch's global batches [steps_per_epoch, global_batch]: samples by number.

        Missing places hold MISSING and come last in their batch.
        """
        rng = np.random.Generator(np.random.PCG64(seed_for(self.seed, self.digest, epoch, "order")))
        joined = np.concatenate([self._cut(order) for order in self._orders(rng)])
        return joined[rng.permutation(len(joined))]

    def _orders(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The draws of each bucket, shuffled."""
        for group, draws in self._groups:
            order = rng.permutation(group)
            if self.weights is not None:
                ends = np.cumsum(self.weights[order], dtype=np.float64)  # float32 loses a light one among a million
                spots = (np.arange(draws) + rng.random()) * (ends[-1] / draws)
                order = rng.permutation(order[np.minimum(np.searchsorted(ends, spots, "right"), len(order) - 1)])
            yield order

    def _cut(self, order: np.ndarray) -> np.ndarray:
        """[batches, global_batch] of a bucket's draws."""
        cut = np.full(self._batches(len(order)) * self.global_batch, MISSING, order.dtype)
        cut[: len(order)] = order[: len(cut)]
        return cut.reshape(-1, self.global_batch)


@dataclass(frozen=True)
class Deal:
    """How a global batch is dealt: place = (micro * ranks + rank) * batch_size + i.

    Args:
        batch_size: places of a rank's micro-batch.
        accumulation: micro-batches of a step.
    """

    batch_size: int
    ranks: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Places of a global batch."""
        return self.batch_size * self.ranks * self.accumulation

    def micros(self, batch: np.ndarray) -> int:
        """Micro-batches that hold any sample, on whatever rank: the others are left out on every rank alike."""
        filled = int(np.count_nonzero(batch != MISSING))
        return -(-filled // (self.batch_size * self.ranks))

    def places(self, micro: int, rank: int) -> range:
        """The places of a rank's micro-batch."""
        first = (micro * self.ranks + rank) * self.batch_size
        return range(first, first + self.batch_size)


def deal_as(global_batch: int, batch_size: int, ranks: int) -> Deal:
    """The deal of a given global batch over some ranks: accumulation follows.

    Raises:
        ConfigError: it does not divide.
    """
    if global_batch % (batch_size * ranks):
        raise ConfigError(
            f"the checkpoint's global batch of {global_batch} cannot be dealt to {ranks} processes with "
            f"--train_batch_size {batch_size}; their product must divide it"
        )
    return Deal(batch_size, ranks, global_batch // (batch_size * ranks))
