"""The image condition of image-to-video: a clip's first frame, several times, each time with its own noise.

As in the pre-training, the noise is added to the pixels, so that no training run can add it later: the cache keeps
`--image_variants` noised encodings and training picks one at each visit.

Shapes: K variants, H and W height and width in pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from preprocess.fingerprints import LOG_SIGMA_MEAN, LOG_SIGMA_STD
from shared.seeds import seed_for


def noise_generator(key: bytes, variant: int) -> torch.Generator:
    """The generator that a variant's sigma and then its noise are drawn from: the same in whatever run."""
    return torch.Generator().manual_seed(seed_for("image", key.hex(), variant))


def draw_sigma(generator: torch.Generator) -> float:
    """A noise level: its logarithm is normal."""
    normal = torch.randn((), generator=generator, dtype=torch.float64).item()
    return math.exp(LOG_SIGMA_MEAN + LOG_SIGMA_STD * normal)


def noised_images(frame: np.ndarray, key: bytes, variants: int) -> tuple[torch.Tensor, list[float]]:
    """A frame with noise, for each variant its own.

    Args:
        frame: uint8 [H, W, 3] in RGB.
        key: of the image.

    Returns:
        float32 [K, 3, 1, H, W], the frame in [-1, 1] and the noise beyond that; and the sigma of each.
    """
    image = torch.from_numpy(frame).permute(2, 0, 1).float() / 127.5 - 1
    noised, sigmas = [], []
    for variant in range(variants):
        generator = noise_generator(key, variant)
        sigma = draw_sigma(generator)
        noised.append(image + sigma * torch.randn(image.shape, generator=generator))
        sigmas.append(sigma)
    return torch.stack(noised).unsqueeze(2), sigmas
