"""Prompts to videos: T5 alone makes the embeddings and is freed, then transformer and VAE make the frames.

    recipes -> T5: embeddings -> transformer and VAE: frames -> mp4 and JSON

Shapes: F frames, H and W height and width in pixels, L tokens, D features.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from infer.recipe import Recipe
from infer.request import Request, warn
from infer.video import write_mp4
from shared.errors import LoraError, ModelError
from shared.models import Checkpoint, choose_device, load_text_encoder, load_transformer, load_vae
from shared.storage import write_atomically

ADAPTER = "lora"  # the LoRA's name inside the pipeline
MOST_DENOMINATOR = 1001  # of a frame rate: 29.97 stands for 30000/1001


@dataclass(frozen=True)
class Video:
    """A video that was made, and how long it took."""

    path: Path
    prompt: str
    seconds: float


def generate(request: Request) -> Iterator[Video]:
    """Make a video for each recipe, and the recipe beside it; each is yielded when both are on the disk."""
    checkpoint, lora, recipes = request.checkpoint, request.lora, request.recipes
    first = recipes[0]  # what is not the prompt's is the same in all
    texts = [first.negative_prompt, *(recipe.effective_prompt for recipe in recipes)]
    embeds = encode_prompts(checkpoint, texts, first.text_dtype, first.cache_dtype)
    pipeline = load_pipeline(checkpoint, first.scheduler, first.dtype)
    if lora:
        apply_lora(pipeline, lora.path, first.lora_scale)

    for recipe in recipes:
        start = time.monotonic()
        frames = make_frames(pipeline, recipe, embeds)
        path = request.folder / f"{recipe.name}.mp4"
        path.with_suffix(".json").unlink(missing_ok=True)  # where a recipe stands, its video stands too
        write_mp4(path, frames, Fraction(recipe.fps).limit_denominator(MOST_DENOMINATOR))
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        write_atomically(path.with_suffix(".json"), recipe.to_json(digest))
        yield Video(path, recipe.prompt, time.monotonic() - start)


@torch.no_grad()
def encode_prompts(checkpoint: Checkpoint, prompts: list[str], dtype: str, cache_dtype: str) -> dict[str, torch.Tensor]:
    """T5's embedding of each prompt, as the pipeline makes it: padded to the full length, no attention mask.

    Args:
        dtype: that T5 runs in.
        cache_dtype: that the embeddings are rounded to, as those that the LoRA was trained on were.

    Returns:
        [1, L, D] in `cache_dtype`, on the CPU. T5 is freed.

    Raises:
        ModelError: an embedding is not finite, as T5's are in float16 now and then.
    """
    tokenizer, encoder = load_text_encoder(checkpoint, getattr(torch, dtype))
    device = choose_device()
    encoder.to(device)
    length = checkpoint.facts.max_text_seq_length
    embeds: dict[str, torch.Tensor] = {}
    for prompt in prompts:  # one at a time: a prompt's video does not depend, in its last bits, on the others
        tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if (count := len(tokenizer(prompt).input_ids)) > length:
            warn(f"of the prompt's {count} tokens {length} are read: {prompt:.60}...")
        embeds[prompt] = encoder(tokens.input_ids.to(device))[0].cpu().to(getattr(torch, cache_dtype))
        if not embeds[prompt].isfinite().all():
            raise ModelError(f"T5's embedding of {prompt!r:.80} is not finite; give --dtype bfloat16 or float32")
    del encoder
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return embeds


class TextToVideo(diffusers.CogVideoXPipeline):
    """diffusers' pipeline, with as many frames as were asked for."""

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames [B, 3, 4 T - 3, H, W] of latents [B, T, C, h, w].

        The VAE lets the first latent stand for one frame only where T is odd; of an even T it makes 4 T frames, on
        another temporal grid than the one it encodes to. So an even T is decoded with its last latent twice, and the
        frames beyond the end are dropped.
        """
        frames = 1 + (latents.shape[1] - 1) * self.vae_scale_factor_temporal
        if latents.shape[1] % 2 == 0:
            latents = torch.cat([latents, latents[:, -1:]], dim=1)
        return super().decode_latents(latents)[:, :, :frames]


def load_pipeline(checkpoint: Checkpoint, scheduler: dict[str, Any], dtype: str) -> TextToVideo:
    """The pipeline without T5, in `dtype`, with the scheduler of a recipe."""
    pipeline = TextToVideo(
        tokenizer=None,
        text_encoder=None,
        vae=load_vae(checkpoint, getattr(torch, dtype)),
        transformer=load_transformer(checkpoint, getattr(torch, dtype)),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
    )
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    if choose_device() == "cuda":  # not run by the tests, which have no GPU
        # Tiles blend at their seams, which changes the frames; decoding a native clip whole takes tens of gigabytes.
        # On the CPU it is decoded whole and exact. Slicing would do nothing: it cuts batches, and ours is one video.
        pipeline.vae.enable_tiling()
        pipeline.enable_model_cpu_offload()
    return pipeline


def apply_lora(pipeline: TextToVideo, path: Path, scale: float) -> None:
    """Load a LoRA at `scale` times its trained strength: alpha / rank is applied by the file's own metadata.

    Raises:
        LoraError: none of its matrices is for the transformer.
    """
    pipeline.load_lora_weights(str(path), adapter_name=ADAPTER, use_safetensors=True)
    if ADAPTER not in pipeline.get_list_adapters().get("transformer", []):
        raise LoraError(f"{path}: none of its matrices is for the transformer; give a LoRA of CogVideoX")
    pipeline.set_adapters(ADAPTER, scale)


def make_frames(pipeline: TextToVideo, recipe: Recipe, embeds: dict[str, torch.Tensor]) -> np.ndarray:
    """The frames of a video, uint8 [F, H, W, 3] in RGB.

    Args:
        embeds: of the recipe's effective and negative prompt [1, L, D].

    Raises:
        ModelError: the frames are not finite.
    """
    dtype = pipeline.transformer.dtype
    video = pipeline(
        prompt_embeds=embeds[recipe.effective_prompt].to(dtype),
        negative_prompt_embeds=embeds[recipe.negative_prompt].to(dtype),
        height=recipe.height,
        width=recipe.width,
        num_frames=recipe.frames,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
        use_dynamic_cfg=recipe.use_dynamic_cfg,
        generator=torch.Generator("cpu").manual_seed(recipe.seed),  # the same noise on every device
        output_type="np",
    ).frames[0]
    if not np.isfinite(video).all():
        raise ModelError(f"{recipe.name}: its frames are not finite; give --dtype bfloat16 or float32")
    return (video * 255).round().astype(np.uint8)
