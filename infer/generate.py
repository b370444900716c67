"""Prompts to videos: T5 alone makes the embeddings and is freed, then transformer and VAE make the frames.

    LoRA's metadata -> checkpoint -> recipes -> T5: embeddings -> transformer and VAE: frames -> mp4 and JSON

Shapes: F frames, H and W height and width in pixels, L tokens, D features.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infer.config import InferConfig
from infer.lora import Lora
from infer.recipe import Recipe, choose_bucket, make_recipes
from infer.video import write_mp4
from shared.errors import LoraError, ModelError
from shared.models import Checkpoint, choose_device, load_text_encoder, load_transformer, load_vae, open_checkpoint
from shared.storage import write_atomically

PARTS = ("text_encoder", "transformer", "vae")
SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # what CogVideoX's checkpoints name
ADAPTER = "lora"  # the LoRA's name inside the pipeline
MOST_DENOMINATOR = 1001  # of a frame rate: 29.97 stands for 30000/1001


@dataclass(frozen=True)
class Video:
    """A video that was made, and how long it took."""

    path: Path
    prompt: str
    seconds: float


def generate(config: InferConfig) -> Iterator[Video]:
    """Make a video for each prompt, and a recipe beside it; each is yielded when both are on the disk.

    Raises:
        UserError: before any weights are loaded, where something asked for does not fit.
    """
    lora = Lora.read(config.lora) if config.lora is not None else None
    checkpoint = find_checkpoint(config, lora)
    if lora:
        lora.check_fits(checkpoint)
        if lora.adapter is None:
            _warn(f"{lora.path} does not hold its alpha: it is taken to be its rank; else --lora_scale alpha/rank")
    recipes = make_recipes(config, checkpoint, lora)
    folder = Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in recipes:
        recipe.check_free(folder / f"{recipe.name}.json")

    first = recipes[0]  # what is not the prompt's is the same in all
    texts = [first.negative_prompt, *(recipe.effective_prompt for recipe in recipes)]
    embeds = encode_prompts(checkpoint, texts, first.text_dtype, first.cache_dtype)
    pipeline = load_pipeline(checkpoint, first.dtype)
    if lora:
        apply_lora(pipeline, lora.path, first.lora_scale)

    for recipe in recipes:
        start = time.monotonic()
        frames = make_frames(pipeline, recipe, embeds)
        path = folder / f"{recipe.name}.mp4"
        path.with_suffix(".json").unlink(missing_ok=True)  # where a recipe stands, its video stands too
        write_mp4(path, frames, Fraction(recipe.fps).limit_denominator(MOST_DENOMINATOR))
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        write_atomically(path.with_suffix(".json"), recipe.to_json(digest))
        yield Video(path, recipe.prompt, time.monotonic() - start)


def find_checkpoint(config: InferConfig, lora: Lora | None) -> Checkpoint:
    """The checkpoint asked for, else the one that the LoRA was trained on; its files are on this machine.

    Raises:
        LoraError: the LoRA names none, or was trained on another kind.
        ModelError: there is no such checkpoint, or it makes no video from text alone.
        ConfigError: it cannot make the size asked for.
    """
    facts = lora.facts if lora else None
    name, revision, variant, hint = config.pretrained_model_name_or_path, config.revision, config.variant, ""
    if name is None:
        assert lora is not None
        if facts is None:
            raise LoraError(f"{lora.path}: does not say what it was trained on; give --pretrained_model_name_or_path")
        name, revision, variant = facts.base_model, revision or facts.revision, variant or facts.variant
        hint = f" (what {lora.path} was trained on; where it has moved, give --pretrained_model_name_or_path)"

    def fetch(weights: tuple[str, ...]) -> Checkpoint:
        try:
            return open_checkpoint(
                name, revision=revision, variant=variant, cache_dir=config.cache_dir, weights=weights
            )
        except ModelError as error:
            raise ModelError(f"{error}{hint}") from error

    checkpoint = fetch(())  # configs first: a refusal must not cost a download of gigabytes
    kind = checkpoint.facts.kind
    if lora and facts and facts.kind != kind:
        raise LoraError(f"{lora.path}: was trained on {facts.kind}, and {name} is {kind}; give the LoRA's own")
    if checkpoint.facts.image_to_video:
        raise ModelError(f"{name}: is {kind}, which stage 3 does not run yet; give a text-to-video checkpoint")
    choose_bucket(config, checkpoint, facts)
    return fetch(PARTS)


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
            _warn(f"of the prompt's {count} tokens {length} are read: {prompt:.60}...")
        embeds[prompt] = encoder(tokens.input_ids.to(device))[0].cpu().to(getattr(torch, cache_dtype))
        if not embeds[prompt].isfinite().all():
            raise ModelError(f"T5's embedding of {prompt!r:.80} is not finite; give --dtype bfloat16 or float32")
    del encoder
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return embeds


def load_pipeline(checkpoint: Checkpoint, dtype: str) -> Any:
    """diffusers' `CogVideoXPipeline` without T5, in `dtype`."""
    import diffusers

    index = json.loads((checkpoint.folder / "model_index.json").read_text(encoding="utf-8"))
    name = index["scheduler"][1]
    if name not in SCHEDULERS:
        raise ModelError(f"{checkpoint.name}: its scheduler is {name}; must be one of {', '.join(SCHEDULERS)}")
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=load_vae(checkpoint, getattr(torch, dtype)),
        transformer=load_transformer(checkpoint, getattr(torch, dtype)),
        scheduler=getattr(diffusers, name).from_pretrained(checkpoint.folder, subfolder="scheduler"),
    )
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    if choose_device() == "cuda":  # not run by the tests, which have no GPU
        # Tiles blend at their seams, which changes the frames; decoding a native clip whole takes tens of gigabytes.
        # On the CPU it is decoded whole and exact. Slicing would do nothing: it cuts batches, and ours is one video.
        pipeline.vae.enable_tiling()
        pipeline.enable_model_cpu_offload()
    return pipeline


def apply_lora(pipeline: Any, path: Path, scale: float) -> None:
    """Load a LoRA at `scale` times its trained strength: alpha / rank is applied by the file's own metadata.

    Raises:
        LoraError: none of its matrices is for the transformer.
    """
    pipeline.load_lora_weights(str(path), adapter_name=ADAPTER, use_safetensors=True)
    if ADAPTER not in pipeline.get_list_adapters().get("transformer", []):
        raise LoraError(f"{path}: none of its matrices is for the transformer; give a LoRA of CogVideoX")
    pipeline.set_adapters(ADAPTER, scale)


def make_frames(pipeline: Any, recipe: Recipe, embeds: dict[str, torch.Tensor]) -> np.ndarray:
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


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
