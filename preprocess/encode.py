"""What the two encoders make: prompt embeddings by T5, video moments by the VAE. Never both in memory.

Shapes: B batch, F frames, T latent frames, C latent channels, H and W height and width (pixels in, latents out), L
tokens, D features.
"""

from __future__ import annotations

import numpy as np
import torch

from shared.errors import ModelError
from shared.models import Checkpoint, choose_device, load_text_encoder, load_vae


class TextEncoder:
    """T5 as the pipeline runs it: padded to the full length, no attention mask.

    Args:
        dtype: that T5 runs in.
        cache_dtype: of the embeddings that come out.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, cache_dtype: str) -> None:
        self._device = choose_device()
        tokenizer, encoder = load_text_encoder(checkpoint, getattr(torch, dtype))
        self._tokenizer, self._encoder = tokenizer, encoder.to(self._device)
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


class VideoEncoder:
    """The VAE's encoder, untiled or with its own default tiles.

    Args:
        dtype: that the VAE runs in.
        cache_dtype: of the moments that come out.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, cache_dtype: str, *, slicing: bool, tiling: bool) -> None:
        self._device, self._dtype = choose_device(), getattr(torch, dtype)
        self._vae = load_vae(checkpoint, self._dtype).to(self._device)
        self._cache_dtype = np.dtype(cache_dtype)
        if slicing:
            self._vae.enable_slicing()
        if tiling:
            self._vae.enable_tiling()

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Mean and log-variance [B, 2C, T, H, W] of uint8 RGB frames [B, F, H, W, 3], neither drawn from nor scaled."""
        pixels = torch.from_numpy(frames).to(self._device).permute(0, 4, 1, 2, 3)
        pixels = (pixels.float() / 127.5 - 1).to(self._dtype)
        posterior = self._vae.encode(pixels).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        return moments.float().cpu().numpy().astype(self._cache_dtype)
