"""Every random draw of a training step, each from a CPU generator seeded by (seed, step, place, purpose).

So the draws are the same on one rank or eight, on any device, in any worker, after a resume or without one; and
different at each place.
"""

from __future__ import annotations

import random

import torch

from shared.seeds import seed_for

TIMESTEPS = 1000  # of the training schedule


def draw_timestep(seed: int, step: int, place: int, global_batch: int, *, stratified: bool) -> int:
    """A timestep, uniform on 0..999.

    Stratified: the global batch's places take one each of `global_batch` equal strata, dealt anew each step, so that
    each place is uniform by itself and a batch covers the range.
    """
    uniform = random.Random(seed_for(seed, step, place, "timestep")).random()
    if stratified:
        strata = list(range(global_batch))
        random.Random(seed_for(seed, step, "strata")).shuffle(strata)
        uniform = (strata[place] + uniform) / global_batch
    return min(int(uniform * TIMESTEPS), TIMESTEPS - 1)


def draw_normal(seed: int, step: int, place: int, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, float32."""
    generator = torch.Generator().manual_seed(seed_for(seed, step, place, purpose))
    return torch.randn(shape, generator=generator)


def draw_bool(seed: int, step: int, place: int, purpose: str, probability: float) -> bool:
    """True with the given probability."""
    return random.Random(seed_for(seed, step, place, purpose)).random() < probability


def draw_number(seed: int, step: int, place: int, purpose: str, count: int) -> int:
    """One of 0..count - 1, each as likely."""
    return random.Random(seed_for(seed, step, place, purpose)).randrange(count)
