"""The training objective: how far the predicted velocity is from the true one. Every formula of it, once.

Shapes: B batch, C latent channels, T latent frames, H and W latent height and width, L tokens, D features. The cache
holds [C, T, H, W], the transformer takes [B, T, C, H, W]: the one transpose between them is in `noisy_input`.

    z0 = s (mean + std n)              every checkpoint, 1.5 too
    z_t = sqrt(abar) z0 + sqrt(1 - abar) eps
    v = sqrt(abar) eps - sqrt(1 - abar) z0
    loss = mean (v_hat - v)^2          in float32

This equals the published scripts' mean 1 / (1 - abar) (x0_hat - z0)^2 exactly, without its rounding (in bfloat16 that
form loses the loss at small t). docs/training.md derives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from shared.errors import ModelError
from shared.models import Facts
from train.config import TrainConfig
from train.draws import TIMESTEPS

LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution clamps it
OFS = 2.0  # what the pipeline gives a transformer that takes an `ofs`


@dataclass(frozen=True)
class Batch:
    """A micro-batch, on the device.

    Attributes:
        moments: [B, 2C, T, H, W] mean and log-variance, unscaled.
        posterior_noise: [B, C, T, H, W] for the draw from the moments.
        noise: [B, C, T', H, W] that is added; T' is T padded to whole temporal patches.
        timesteps: [B] 0..999.
        prompt_embeds: [B, L, D].
        weights: [B] 1, or 0 for a place that no sample fills.
        places: in the global batch.
        image_moments: [B, 2C, 1, H, W] mean and log-variance of the first frame with its noise, unscaled; None, as the
            two that follow: text-to-video.
        image_posterior_noise: [B, C, 1, H, W] for the draw from them.
        image_factors: [B] what the draw is multiplied by; 0 where the image is dropped.
        skipped: what was wrong with each sample that could not be read; its place weighs 0.
    """

    moments: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    weights: torch.Tensor
    places: list[int]
    image_moments: torch.Tensor | None = None
    image_posterior_noise: torch.Tensor | None = None
    image_factors: torch.Tensor | None = None
    skipped: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from pinned memory the copies do not wait."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in pinned memory."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def alphas_cumprod(config: dict[str, Any]) -> torch.Tensor:
    """abar [1000] of the training schedule, float32, computed in float64.

    Args:
        config: scheduler_config.json. Source: diffusers' CogVideoXDDIMScheduler.

    Raises:
        ModelError: another schedule than CogVideoX's.
    """
    for key, value in (
        ("beta_schedule", "scaled_linear"),
        ("prediction_type", "v_prediction"),
        ("trained_betas", None),
    ):
        if config.get(key) != value:
            raise ModelError(
                f"scheduler_config.json: {key} = {config.get(key)!r}; must be {value!r}, as CogVideoX's is"
            )
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, TIMESTEPS, dtype=np.float64) ** 2
    abar = np.cumprod(1 - betas)
    shift = config["snr_shift_scale"]
    abar = abar / (shift + (1 - shift) * abar)
    if config["rescale_betas_zero_snr"]:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return torch.from_numpy(abar).float()


def sample_latents(
    moments: torch.Tensor, posterior_noise: torch.Tensor, scaling_factor: float | torch.Tensor
) -> torch.Tensor:
    """z0 [B, C, T, H, W] float32: a draw from the posterior, scaled."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
    return scaling_factor * (mean + std * posterior_noise)


def padding(latent_frames: int, patch_size_t: int | None) -> int:
    """Latent frames to put before the first one, so that temporal patches are whole: (-T) mod patch_size_t."""
    return -latent_frames % (patch_size_t or 1)


def pad_front(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Copies of the first latent frame before it, as the pipeline drops slots from the front after sampling."""
    missing = padding(latents.shape[2], patch_size_t)
    return torch.cat([latents[:, :, :1].expand(-1, -1, missing, -1, -1), latents], dim=2) if missing else latents


def add_noise(latents: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """z_t. `abar` [B] broadcasts over all but the batch."""
    abar = abar.view(-1, *[1] * (latents.dim() - 1))
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """v, what the transformer predicts."""
    abar = abar.view(-1, *[1] * (latents.dim() - 1))
    return abar.sqrt() * noise - (1 - abar).sqrt() * latents


@lru_cache(maxsize=64)
def rotary_embedding(
    facts: Facts, latent_frames: int, height: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines [tokens, head] bit-equal to the pipeline's own; None where the checkpoint has no RoPE.

    Args:
        latent_frames: padded to whole temporal patches.
        height, width: in latents.
    """
    if not facts.rotary:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    grid = (height // facts.patch_size, width // facts.patch_size)
    base = (facts.sample_height // facts.patch_size, facts.sample_width // facts.patch_size)
    if facts.patch_size_t is None:
        return get_3d_rotary_pos_embed(
            facts.attention_head_dim, _crop_region(grid, base), grid, temporal_size=latent_frames, device=device
        )
    return get_3d_rotary_pos_embed(
        facts.attention_head_dim,
        None,
        grid,
        temporal_size=-(-latent_frames // facts.patch_size_t),
        grid_type="slice",
        max_size=base,
        device=device,
    )


def _crop_region(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a grid lies, aspect kept, in the grid that the checkpoint was trained at: (top, left), (bottom, right).

    Source: `get_resize_crop_region_for_grid` of diffusers' CogVideoX pipeline, which costs seconds to import.
    """
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        resized = (base_height, round(base_height / height * width))
    else:
        resized = (round(base_width / width * height), base_width)
    top, left = round((base_height - resized[0]) / 2.0), round((base_width - resized[1]) / 2.0)
    return (top, left), (top + resized[0], left + resized[1])


def noisy_input(batch: Batch, facts: Facts, schedule: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer is given and what it should say: z_t and v, both [B, T', C, H, W] float32.

    Args:
        schedule: abar [1000] on the batch's device.
    """
    latents = sample_latents(batch.moments, batch.posterior_noise, facts.scaling_factor)
    latents = pad_front(latents, facts.patch_size_t)
    abar = schedule[batch.timesteps]
    noisy, target = add_noise(latents, batch.noise, abar), velocity(latents, batch.noise, abar)
    return noisy.transpose(1, 2), target.transpose(1, 2)


def image_condition(batch: Batch, frames: int) -> torch.Tensor | None:
    """What stands beside z_t on the channels, [B, T', C, H, W] float32; None: text-to-video.

        [f E, 0, ..., 0]               f the image factor, E a draw from the encoding of the noised first frame

    over the T' latent frames that the transformer is given: the pipeline pads its frames before it places the image,
    so that where 1.5 pads in front, the image is beside the pad and not beside the first frame.

    Args:
        frames: T'.
    """
    if batch.image_moments is None:
        return None
    assert batch.image_posterior_noise is not None
    assert batch.image_factors is not None
    image = sample_latents(batch.image_moments, batch.image_posterior_noise, batch.image_factors.view(-1, 1, 1, 1, 1))
    image = image.transpose(1, 2)
    return torch.cat([image, image.new_zeros(image.shape[0], frames - 1, *image.shape[2:])], dim=1)


def velocity_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample [B], in float32."""
    return (predicted.float() - target).pow(2).flatten(1).mean(dim=1)


def loss_weights(timesteps: torch.Tensor, schedule: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """What the loss at each timestep [B] weighs in the gradient, float32: 1, or by `--loss_weighting min_snr`

        max(floor, min(SNR, gamma) / (SNR + 1))      SNR = abar / (1 - abar)

    written without the division, which has no value at t = 0 of a schedule whose abar rounds to 1.

    Args:
        schedule: abar [1000] on the timesteps' device.
    """
    if config.loss_weighting == "none":
        return torch.ones(timesteps.shape, device=timesteps.device)
    abar = schedule[timesteps]
    return torch.minimum(abar, config.min_snr_gamma * (1 - abar)).clamp(min=config.min_snr_floor)


def batch_loss(
    transformer: Any, batch: Batch, facts: Facts, schedule: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The loss of each place [B] of a micro-batch, unweighted: `loss_weights` and empty places are the caller's.

    Args:
        dtype: of the frozen base, that its inputs are given in.
    """
    noisy, target = noisy_input(batch, facts, schedule)
    _, frames, _, height, width = noisy.shape
    given: dict[str, torch.Tensor | None] = {}
    condition = image_condition(batch, frames)
    if condition is not None:
        noisy = torch.cat([noisy, condition], dim=2)
        given["ofs"] = None if facts.ofs_embed_dim is None else noisy.new_full((1,), OFS, dtype=dtype)
    predicted = transformer(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=batch.prompt_embeds.to(dtype),
        timestep=batch.timesteps,
        image_rotary_emb=rotary_embedding(facts, frames, height, width, noisy.device),
        return_dict=False,
        **given,
    )[0]
    return velocity_loss(predicted, target)
