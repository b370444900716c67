"""What the two encoders make: prompt embeddings by T5, video moments by the VAE. Never both in memory.

Shapes: B batch, F frames, T latent frames, C latent channels, H and W height and width (pixels in, latents out), L
tokens, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shared.console import say
from shared.errors import ModelError
from shared.models import Checkpoint, choose_device, load_text_encoder, load_vae
from shared.offload import offload_in_groups

ROOM_BYTES = 1 << 30  # that T5's weights must leave free of a GPU: for what it makes of the prompts, and for kernels
IMAGE_BATCH = 3  # single frames encoded together: with what the VAE pads before each, no more than a clip's 8 take


class TextEncoder:
    """T5 as the pipeline runs it: padded to the full length, no attention mask. Where it is larger than what is free of
    the GPU's memory, its layers come from the host one by one.

    Args:
        dtype: that T5 runs in.
        cache_dtype: of the embeddings that come out.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, cache_dtype: str) -> None:
        self._device = choose_device()
        self._tokenizer, self._encoder = load_text_encoder(checkpoint, getattr(torch, dtype))
        if fits_whole(self._encoder, self._device):
            self._encoder.to(self._device)
        else:
            say("T5", "is larger than the GPU's free memory: its layers wait on the host; slower, the same numbers")
            offload_in_groups(self._encoder, torch.device(self._device), "leaf_level")
        self._length = checkpoint.facts.max_text_seq_length
        self._cache_dtype = np.dtype(cache_dtype)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt before truncation, the end token included."""
        return [len(ids) for ids in self._tokenizer(prompts).input_ids]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> np.ndarray:
        """Embeddings of all positions [B, L, D]; those of the pads are part of the transformer's input.

        Raises:
            ModelError: an embedding is not finite, as T5's are in float16 now and then.
        """
        tokens = self._tokenizer(
            prompts, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        embeds = self._encoder(tokens.input_ids.to(self._device))[0]
        array = embeds.float().cpu().numpy().astype(self._cache_dtype)
        for prompt, one in zip(prompts, array, strict=True):
            if not np.isfinite(one).all():
                raise ModelError(f"T5's embedding of {prompt!r:.80} is not finite; give --dtype bfloat16 or float32")
        return array


def fits_whole(module: Any, device: str) -> bool:
    """Whether a model's weights fit into what is free of the device's memory, with ROOM_BYTES beside them."""
    free = free_bytes(device)
    return free is None or sum(parameter.nbytes for parameter in module.parameters()) + ROOM_BYTES <= free


def free_bytes(device: str) -> int | None:
    """Bytes of this process's GPU that are free; None on a CPU, whose memory the weights are in already."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else None


class Pending:
    """Values that are on their way from the device; on a CPU they are there.

    Args:
        values: float32, on the device.
        dtype: of the array that comes out.
    """

    def __init__(self, values: torch.Tensor, dtype: np.dtype) -> None:
        self._dtype, self._copied = dtype, None
        self._values = values
        if values.device.type == "cuda":  # not run where this was written: no GPU
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def array(self) -> np.ndarray:
        """The values, once they have come; from whatever thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.numpy().astype(self._dtype)


class VideoEncoder:
    """The VAE's encoder, untiled or in tiles.

    Args:
        dtype: that the VAE runs in.
        cache_dtype: of the moments that come out.
        tiling: the tiles' geometry, as in the fingerprint; None: untiled.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, cache_dtype: str, *, slicing: bool, tiling: dict[str, Any] | None
    ) -> None:
        self._device, self._dtype = choose_device(), getattr(torch, dtype)
        self._vae = load_vae(checkpoint, self._dtype).to(self._device)
        self._cache_dtype = np.dtype(cache_dtype)
        if slicing:
            self._vae.enable_slicing()
        self.set_tiling(tiling)

    def set_tiling(self, tiling: dict[str, Any] | None) -> None:
        """Encode in these tiles from now on; None: untiled."""
        if tiling is None:
            self._vae.disable_tiling()
        else:
            self._vae.enable_tiling(
                tiling["height"], tiling["width"], tiling["overlap_height"], tiling["overlap_width"]
            )

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Mean and log-variance [B, 2C, T, H, W] of uint8 RGB frames [B, F, H, W, 3], neither drawn from nor scaled."""
        return self.encode_later(frames).array()

    @torch.no_grad()
    def encode_later(self, frames: np.ndarray) -> Pending:
        """As `encode`, without waiting for a GPU."""
        host = torch.from_numpy(frames)
        if self._device == "cuda":
            host = host.pin_memory()
        return Pending(moments_of(self._vae, host.to(self._device, non_blocking=True)), self._cache_dtype)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> np.ndarray:
        """Mean and log-variance [B, 2C, 1, H, W] of float32 pixels [B, 3, 1, H, W], neither drawn from nor scaled."""
        batches = pixels.chunk(-(-len(pixels) // IMAGE_BATCH))
        moments = (_moments(self._vae, batch.to(self._device)) for batch in batches)
        return np.concatenate([Pending(values, self._cache_dtype).array() for values in moments])


def moments_of(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance [B, 2C, T, H, W] float32 of uint8 RGB frames [B, F, H, W, 3], on their device."""
    return _moments(vae, frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)


def _moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float()
