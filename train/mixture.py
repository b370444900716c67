"""What a run trains on: one data set, or several mixed by weight, numbered through; and which caption a visit sees.

    --dataset people                  every sample once an epoch, or by its own weight in the manifest
    --dataset people:0.7,places:0.3   as many draws as there are samples, seven of ten from the first
    --captions draw                   a clip with several captions is visited once an epoch, with one of them

Numbers of samples run through all data sets, in the order in which they are named.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from shared.dataset import DataSet
from shared.errors import ConfigError
from shared.seeds import seed_for
from shared.storage import digest_of
from train.samples import KINDS, DrawSettings, Request, Samples


class Mixture:
    """The samples of some data sets.

    Args:
        shares: of the draws, of each data set; None: of a single one.
        draw_captions: take samples of the same clip for one, whose caption is drawn at each visit.
        kinds: of members that are read, as `kinds_for` has them.

    Attributes:
        bucket_names: of all data sets, sorted.
        buckets: [N] each sample's bucket, as its place in bucket_names.
        fps: frames a second, the median of the data sets'.
    """

    def __init__(
        self,
        datasets: Sequence[DataSet],
        shares: Sequence[float] | None = None,
        *,
        draw_captions: bool = False,
        kinds: tuple[str, ...] = KINDS,
    ) -> None:
        self.datasets, self.shares, self.draw_captions = tuple(datasets), shares, draw_captions
        self.parts = [Samples(dataset, kinds) for dataset in datasets]
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self.bucket_names = sorted({name for part in self.parts for name in part.bucket_names})
        places = {name: place for place, name in enumerate(self.bucket_names)}
        self.buckets = np.concatenate(
            [np.array([places[name] for name in part.bucket_names], np.uint16)[part.buckets] for part in self.parts]
        )
        self.fps = float(np.median([part.fps for part in self.parts]))
        self.random_flip = max(float(dataset.info["random_flip"]) for dataset in datasets)

    def __len__(self) -> int:
        return len(self.buckets)

    @property
    def digest(self) -> str:
        """What a checkpoint must agree on: the versions of the data sets, and their shares."""
        if self.shares is None:
            return self.datasets[0].digest
        return digest_of(
            [[dataset.digest, share] for dataset, share in zip(self.datasets, self.shares, strict=True)]
        ).hex()

    def latent_keys(self) -> np.ndarray:
        """What names the clip of each sample, [N, KEY_BYTES] uint8: equal in two data sets for the same clip."""
        return np.concatenate([part.keys("latent") for part in self.parts])

    def sources(self) -> pa.ChunkedArray:
        """The video of each sample [N], as its manifest names it."""
        columns = [dataset.columns("source")["source"] for dataset in self.datasets]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks])

    def place(self, number: int) -> tuple[int, int]:
        """Which data set a sample is of, and its number there."""
        part = int(np.searchsorted(self._starts, number, "right")) - 1
        return part, int(number - self._starts[part])

    def sample_id(self, number: int) -> str:
        """The stable name of a sample."""
        part, own = self.place(number)
        return self.parts[part].sample_id(own)

    def request(self, number: int, step: int, place: int, weight: float, draws: DrawSettings) -> Request:
        """What to read for a sample at a place, with its mirror image and caption drawn."""
        part, own = self.place(self.visited(number, step, place, draws.seed))
        if draws.random_flip:
            draws = replace(draws, random_flip=float(self.datasets[part].info["random_flip"]))
        return replace(self.parts[part].request(own, step, place, weight, draws), dataset=part)

    def visited(self, number: int, step: int, place: int, seed: int) -> int:
        """The sample that a place of a step sees: this one, or one of the same clip with another caption."""
        if not self.draw_captions:
            return number
        order, starts, groups = self._clips
        group = groups[number]
        captions = order[starts[group] : starts[group + 1]]
        weights = self._row_weights[captions]
        if not weights.any():  # it may be held out
            return number
        draw = random.Random(seed_for(seed, step, place, "caption"))
        return int(draw.choices(captions.tolist(), weights.tolist())[0])

    def numbers(self, held: np.ndarray | None) -> np.ndarray | None:
        """The samples to train on: where captions are drawn, the first of each clip that has one of weight; None: all.

        Args:
            held: [N] bool, those that are held out.
        """
        kept = np.ones(len(self), bool) if held is None else ~held
        if self.draw_captions:
            order, starts, _ = self._clips
            first = np.zeros(len(self), bool)
            first[order[starts[:-1]]] = np.add.reduceat(self._row_weights[order], starts[:-1]) > 0
            kept &= first
        return None if kept.all() else np.flatnonzero(kept)

    def draw_weights(self, numbers: np.ndarray | None) -> np.ndarray | None:
        """How often each sample [N] is drawn beside others; None: all alike.

        Args:
            numbers: of the samples that are trained on; None: all.

        Raises:
            ConfigError: of a data set nothing would be drawn.
        """
        own = np.ones(len(self)) if self.draw_captions else self._row_weights
        trained = np.ones(len(self), bool)
        if numbers is not None:
            trained[:] = False
            trained[numbers] = True
        weights = np.where(trained, own, 0.0)
        for part, dataset in enumerate(self.datasets):
            rows = slice(self._starts[part], self._starts[part + 1])
            total = weights[rows].sum(dtype=np.float64)
            if not total:
                raise ConfigError(f"--dataset {dataset.name}: no sample of it is left to train on; give another")
            if self.shares is not None:
                weights[rows] *= self.shares[part] / total
        there = weights[trained]
        return None if (there == there[0]).all() else weights

    @cached_property
    def _row_weights(self) -> np.ndarray:
        return np.concatenate([part.weights for part in self.parts])

    @cached_property
    def _clips(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples by clip [N], where each clip's begin among them [clips + 1], and the clip of each sample [N]."""
        groups, count = np.empty(len(self), np.int64), 0
        for part, samples in enumerate(self.parts):
            _, clip = np.unique(samples.keys("latent").view(f"V{samples.keys('latent').shape[1]}")[:, 0],
                                return_inverse=True)  # fmt: skip
            groups[self._starts[part] : self._starts[part + 1]] = clip + count
            count += int(clip.max()) + 1
        order = np.argsort(groups, kind="stable")  # of a clip, the manifest's first comes first
        return order, np.searchsorted(groups[order], np.arange(count + 1)), groups
