"""Held-out loss: samples that are never trained on, at fixed timesteps, with fixed noise: what runs are compared by.

Its draws are functions of the sample alone, neither of the run's seed nor of its step: two runs over one data set see
the same, and the training's own draws are what they are without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from shared.cache import KEY_BYTES
from shared.errors import CacheError, ConfigError
from shared.seeds import seed_for
from shared.storage import digest_of
from train.data import micro_batches
from train.mixture import Mixture
from train.objective import batch_loss
from train.reading import LatentDataset
from train.samples import DrawSettings, Request, Samples

QUARTILES = 4  # timesteps of each sample, one of each quarter of the schedule
MOST = 256  # samples that are looked at; however many are held out
PURPOSE = "holdout"
DRAWS = DrawSettings(
    seed=seed_for(PURPOSE), global_batch=QUARTILES, stratified=True, random_flip=0.0, caption_dropout=0.0
)


def split_sources(sources: Sequence[str] | pa.ChunkedArray, share: float) -> np.ndarray:
    """Which rows are held out: [N] bool. All clips of a video go the same way; another row moves few videos.

    Args:
        sources: [N] the video of each row.
        share: of the videos; at least one, and never all.

    Raises:
        ConfigError: there is but one video.
    """
    column = sources if isinstance(sources, pa.ChunkedArray) else pa.chunked_array([pa.array(sources, pa.string())])
    encoded = column.dictionary_encode().unify_dictionaries().combine_chunks()
    names = encoded.dictionary
    if len(names) < 2:
        raise ConfigError(f"--holdout {share:g}: all {len(column)} clips are of one video; add videos, or leave it out")
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    ranks = np.fromiter((_rank(name.as_py()) for name in names), np.uint64, len(names))
    held = np.zeros(len(names), bool)
    held[np.argsort(ranks, kind="stable")[:count]] = True
    return held[encoded.indices.to_numpy()]


def held_samples(samples: Mixture, share: float) -> np.ndarray:
    """Which samples are held out: [N] bool. With a video goes what is the same clip under another name.

    Raises:
        ConfigError: as `split_sources`; or nothing is left.
    """
    held, keys = split_sources(samples.sources(), share), samples.latent_keys()
    held = are_among(keys, keys[held])
    if held.all():
        raise ConfigError(
            f"--holdout {share:g}: all of the clips that would be left are held out under another name; add videos, or "
            "leave it out"
        )
    return held


def are_among(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of some keys [N, KEY_BYTES] uint8 are among others [M, KEY_BYTES], M above 0: [N] bool."""
    texts, known = (np.ascontiguousarray(one).view(f"S{KEY_BYTES}")[:, 0] for one in (keys, others))
    known = np.unique(known)
    return np.asarray(known[np.minimum(np.searchsorted(known, texts), len(known) - 1)] == texts)


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{PURPOSE}/{name}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class HeldOut:
    """Samples that are held out.

    Attributes:
        numbers: of the samples; the first MOST by a digest of their names are looked at.
    """

    samples: Mixture | Samples
    reader: LatentDataset
    numbers: np.ndarray

    @cached_property
    def digest(self) -> str:
        """What is held out, for a checkpoint to agree on."""
        return digest_of(sorted(self.samples.sample_id(int(number)) for number in self.numbers), 16).hex()

    def requests(self, rank: int, ranks: int, batch_size: int) -> Iterator[list[Request]]:
        """The micro-batches of a rank: QUARTILES places of each of its samples."""
        names = {int(number): self.samples.sample_id(int(number)) for number in self.numbers}
        chosen = sorted(names, key=lambda number: _rank(names[number]))[:MOST]
        for number in chosen[rank::ranks]:
            step = seed_for(names[number])  # in place of a step: the draws are the sample's own
            places = [self.samples.request(number, step, place, 1.0, DRAWS) for place in range(QUARTILES)]
            for start in range(0, QUARTILES, batch_size):
                yield places[start : start + batch_size]


def held_out_loss(run: Any, held: HeldOut) -> dict[str, Any]:
    """The mean loss over the samples that are held out: `loss`, `quartiles` by timestep, and how many `samples`.

    On every rank alike; each takes its share.
    """
    accelerator, transformer = run.accelerator, run.state.transformer
    requests = list(held.requests(accelerator.process_index, accelerator.num_processes, run.config.train_batch_size))
    sums = torch.zeros(2, QUARTILES, dtype=torch.float64, device=accelerator.device)  # of losses, of weights
    transformer.eval()
    try:
        reading = micro_batches(held.reader, requests, num_workers=0, pin_memory=False)
        averaged = run.state.ema.applied() if run.state.ema else nullcontext()  # what is saved is what is looked at
        with closing(reading) as batches, torch.no_grad(), averaged:
            for batch in batches:
                batch = batch.to(accelerator.device)
                with accelerator.autocast():
                    losses = batch_loss(transformer, batch, run.facts, run.schedule, run.dtype)
                quarters = batch.timesteps * QUARTILES // len(run.schedule)
                sums.index_add_(1, quarters, torch.stack([losses * batch.weights, batch.weights]).double())
    finally:
        transformer.train()
    losses, weights = accelerator.reduce(sums, reduction="sum").cpu().numpy()
    if not weights.all():
        raise CacheError("--bad_samples skip: of what is held out nothing can be read; hold out other videos")
    return {
        "loss": float(losses.sum() / weights.sum()),
        "quartiles": (losses / weights).tolist(),
        "samples": round(weights.sum() / QUARTILES),
    }
