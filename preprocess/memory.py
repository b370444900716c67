"""What the VAE and T5 hold at their peak, counted on tensors without storage: no weights, and no GPU, are needed.

The models are built from their config files under FakeTensorMode and run as stage 1 runs them; shared/ledger.py counts.
Not counted: the CUDA context, kernels' workspaces (convolutions take some hundred MB), the allocator's rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from preprocess.encode import moments_of
from shared.geometry import Bucket
from shared.ledger import Ledger
from shared.models import Checkpoint


def video_peak(
    checkpoint: Checkpoint, bucket: Bucket, *, dtype: str, batch: int, tiling: dict[str, Any] | None, slicing: bool
) -> int:
    """Bytes that encoding a batch of clips holds at its peak, the VAE's weights included.

    Args:
        dtype: that the VAE runs in.
        batch: clips that are encoded together.
        tiling: the tiles' geometry, as in the fingerprint; None: untiled.
    """
    from diffusers import AutoencoderKLCogVideoX

    with FakeTensorMode(), Ledger() as ledger, torch.no_grad():
        with _made_in(dtype):
            vae = AutoencoderKLCogVideoX.from_config(checkpoint.config("vae")).eval()
        if slicing:
            vae.enable_slicing()
        if tiling is not None:
            vae.enable_tiling(tiling["height"], tiling["width"], tiling["overlap_height"], tiling["overlap_width"])
        ledger.start_anew()
        frames = torch.empty(batch, bucket.frames, bucket.height, bucket.width, 3, dtype=torch.uint8)
        moments_of(vae, frames)
        return ledger.peaks["device"].total


def text_peak(checkpoint: Checkpoint, *, dtype: str, batch: int) -> int:
    """Bytes that encoding a batch of prompts holds at its peak, T5's weights included.

    Args:
        dtype: that T5 runs in.
        batch: prompts that are encoded together.
    """
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**checkpoint.config("text_encoder"))
    with FakeTensorMode(), Ledger() as ledger, torch.no_grad():
        with _made_in(dtype):
            encoder = T5EncoderModel(config).eval()
        ledger.start_anew()
        tokens = torch.zeros(batch, checkpoint.facts.max_text_seq_length, dtype=torch.long)
        encoder(tokens)[0].float()
        return ledger.peaks["device"].total


@contextmanager
def _made_in(dtype: str) -> Iterator[None]:
    """Within: parameters come into being in this dtype. Those without storage cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
