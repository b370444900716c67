"""diffusers' two CogVideoX pipelines, as stage 3 runs them.

Shapes: B batch, T latent frames, C latent channels, H and W height and width in pixels, h and w in latents.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from shared.console import Progress


def _whole_frames(decode: Any, latents: torch.Tensor, compression: int) -> torch.Tensor:
    """Frames [B, 3, 4 T - 3, H, W] of latents [B, T, C, h, w].

    The VAE lets the first latent stand for one frame only where T is odd; of an even T it makes 4 T frames, on another
    temporal grid than the one it encodes to. So an even T is decoded with its last latent twice, and the frames beyond
    the end are dropped.
    """
    frames = 1 + (latents.shape[1] - 1) * compression
    if latents.shape[1] % 2 == 0:
        latents = torch.cat([latents, latents[:, -1:]], dim=1)
    decoded: torch.Tensor = decode(latents)
    return decoded[:, :, :frames]


def _denoising(total: int | None) -> Progress[Any]:
    """What diffusers tells of each denoising step, as the other stages tell their progress."""
    return Progress(name="denoising", unit="step", total=total, leave=False)


class TextToVideo(diffusers.CogVideoXPipeline):
    """diffusers' pipeline, with as many frames as were asked for."""

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Progress[Any]:
        """A context that is told of each step."""
        return _denoising(total)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames [B, 3, 4 T - 3, H, W] of latents [B, T, C, h, w]."""
        return _whole_frames(super().decode_latents, latents, self.vae_scale_factor_temporal)


class ImageToVideo(diffusers.CogVideoXImageToVideoPipeline):
    """diffusers' pipeline, with as many frames as were asked for.

    Attributes:
        image_gain: what the image's latents are multiplied by beyond what the pipeline does.
    """

    image_gain = 1.0

    def prepare_latents(self, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise and the image condition, both [B, T, C, h, w]."""
        latents, condition = super().prepare_latents(*args, **options)
        return latents, condition if self.image_gain == 1 else self.image_gain * condition

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Progress[Any]:
        """A context that is told of each step."""
        return _denoising(total)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames [B, 3, 4 T - 3, H, W] of latents [B, T, C, h, w]."""
        return _whole_frames(super().decode_latents, latents, self.vae_scale_factor_temporal)


Pipeline = TextToVideo | ImageToVideo
