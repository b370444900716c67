"""What changes the numbers of each store and is not in its keys: see docs/format.md. Reads configs and digests only."""

from __future__ import annotations

from typing import Any

from shared.models import Checkpoint

# sigma = exp(N(mean, std^2)) of the noise on image conditions, in pixels in [-1, 1]: as in the pre-training.
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -3.0, 0.5


def latents_fingerprint(
    checkpoint: Checkpoint, *, dtype: str, cache_dtype: str, tiling: dict[str, Any] | None, rehash: bool
) -> dict[str, Any]:
    """Of video moments. The VAE's scaling factor, slicing and batches change nothing, so they are not in it.

    Args:
        tiling: the geometry of the tiles; None: untiled.
    """
    return {
        "vae": {"weights": checkpoint.weights_digest("vae", rehash=rehash), "config": checkpoint.encoding_config()},
        "dtype": dtype,
        "cache_dtype": cache_dtype,
        "tiling": tiling,
    }


def images_fingerprint(latents: dict[str, Any], variants: int) -> dict[str, Any]:
    """Of noised first frames: that of the video moments which the same VAE makes, and the noise."""
    return {**latents, "variants": variants, "log_sigma_mean": LOG_SIGMA_MEAN, "log_sigma_std": LOG_SIGMA_STD}


def tile_geometry(checkpoint: Checkpoint) -> dict[str, Any]:
    """The VAE's default tiles, in pixels: half of its sample size, overlapping by a sixth and a fifth."""
    config = checkpoint.config("vae")
    return {
        "height": config["sample_height"] // 2,
        "width": config["sample_width"] // 2,
        "overlap_height": 1 / 6,
        "overlap_width": 1 / 5,
    }


def embeddings_fingerprint(checkpoint: Checkpoint, *, dtype: str, cache_dtype: str, rehash: bool) -> dict[str, Any]:
    """Of prompt embeddings."""
    told = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
    config = {key: value for key, value in checkpoint.config("text_encoder").items() if key not in told}
    return {
        "text_encoder": {"weights": checkpoint.weights_digest("text_encoder", rehash=rehash), "config": config},
        "tokenizer": checkpoint.tokenizer_digest(rehash=rehash),
        "max_length": checkpoint.facts.max_text_seq_length,
        "dtype": dtype,
        "cache_dtype": cache_dtype,
    }
