"""The order of samples: a pure function of (data set digest, seed, epoch). Touches no file.

An epoch is shuffled, grouped by bucket, cut into global batches of one bucket, and the batches are shuffled. A global
batch is what one optimizer step sees, over all ranks and accumulation; its places are dealt to ranks and micro-batches
by arithmetic. So every rank has equally many micro-batches, and one integer, the step, says where a run stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from shared.errors import ConfigError
from shared.seeds import seed_for

MISSING = -1  # a place that no sample fills: the last batch of a bucket may be short


@dataclass(frozen=True, eq=False)
class Sampler:
    """The order of a run.

    Args:
        buckets: [N] a number per sample, equal for samples of one bucket.
        global_batch: places of a global batch.
        digest: of the data set version.
    """

    buckets: np.ndarray
    global_batch: int
    digest: str
    seed: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch, the same in each."""
        _, counts = np.unique(self.buckets, return_counts=True)
        return int(np.sum(-(-counts // self.global_batch)))

    def batch(self, step: int) -> np.ndarray:
        """The global batch [global_batch] of a step, counted from 0 over all epochs."""
        epoch, row = divmod(step, self.steps_per_epoch)
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = self._epochs[epoch] = self.epoch(epoch)
            for old in sorted(self._epochs)[:-2]:  # a reader ahead, in a thread, may be in the next one
                self._epochs.pop(old, None)
        return batches[row]

    def epoch(self, epoch: int) -> np.ndarray:
        """The epoch's global batches [steps_per_epoch, global_batch]: samples by number, each exactly once.

        Missing places hold MISSING and come last in their batch.
        """
        rng = np.random.Generator(np.random.PCG64(seed_for(self.seed, self.digest, epoch, "order")))
        order = rng.permutation(len(self.buckets))
        order = order[np.argsort(self.buckets[order], kind="stable")]
        batches = []
        _, counts = np.unique(self.buckets, return_counts=True)
        for group in np.split(order, np.cumsum(counts)[:-1]):
            padded = np.full(-(-len(group) // self.global_batch) * self.global_batch, MISSING, np.int64)
            padded[: len(group)] = group
            batches.append(padded.reshape(-1, self.global_batch))
        joined = np.concatenate(batches)
        return joined[rng.permutation(len(joined))]


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
