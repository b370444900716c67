"""Prompts to videos: T5 alone makes the embeddings and is freed, then transformer and VAE make the frames.

    recipes -> T5: embeddings -> transformer and VAE: frames -> mp4 and JSON

Shapes: F frames, H and W height and width in pixels, L tokens, D features.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch

from infer.adapters import Adapters
from infer.embeddings import encode_prompts, read_embeddings
from infer.image import fit_image, open_image
from infer.memory import install
from infer.pipelines import ImageToVideo, Pipeline, TextToVideo
from infer.recipe import Recipe
from infer.request import Request, warn
from infer.split import take_own_gpu
from infer.video import write_mp4
from shared.errors import ConfigError, ModelError
from shared.models import Checkpoint, choose_device, load_transformer, load_vae
from shared.storage import canonical_json, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
MOST_DENOMINATOR = 1001  # of a frame rate: 29.97 stands for 30000/1001


@dataclass(frozen=True)
class Video:
    """A video of a request, and how long it took.

    Attributes:
        made: now; False: it was there already, complete and of the same recipe.
        matches: whether its frames are those of `--recipe`, where there is one.
    """

    path: Path
    prompt: str
    seconds: float
    made: bool = True
    matches: bool | None = None


def generate(request: Request) -> Iterator[Video]:
    """Make a video for each recipe that has none, and the recipe beside it; it is yielded when both are on the disk.

    Raises:
        ConfigError: the GPU's memory runs out, or the folder cannot be written any more; what is made stays.
    """
    with _told_in_one_line(request):
        yield from _videos(request)


def _videos(request: Request) -> Iterator[Video]:
    again = request.frames_sha256 is not None  # to make a video again is to make it, wherever it is
    missing = [recipe for recipe in request.recipes if again or not recipe.is_made(request.folder)]
    names = {recipe.name for recipe in missing}
    for recipe in request.recipes:
        if recipe.name not in names:
            yield Video(request.folder / f"{recipe.name}.mp4", recipe.prompt, 0.0, made=False)
    if missing:
        yield from make_videos(request, missing)
    for comparison in request.comparisons:
        start, made = time.monotonic(), not comparison.is_made(request.folder)
        if made:
            comparison.make(request.folder, frame_rate(comparison.recipes[0]))
        path, prompt = request.folder / f"{comparison.name}.mp4", comparison.recipes[0].prompt
        yield Video(path, prompt, time.monotonic() - start, made)


@contextmanager
def _told_in_one_line(request: Request) -> Iterator[None]:
    """Inside, a GPU's memory that runs out and a folder that can no longer be written are a user's to mend."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        levers = request.levers
        if levers.offload in ("group", "sequential") and levers.vae_tiling:
            way = "give a smaller --height, --width or --num_frames"
        else:
            way = "give --preset low or lowest; python -m infer.plan tells what each holds"
        raise ConfigError(f"the GPU's memory ran out; what is made stays; {way}") from error
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise ConfigError(
            f"--output_dir {request.folder}: cannot be written ({error.strerror}); make room, or give another folder: "
            "the same command goes on with what is not there yet"
        ) from error


def make_videos(request: Request, recipes: list[Recipe]) -> Iterator[Video]:
    """Make videos: T5 once for all prompts, then everything else once for all videos."""
    device = choose_device()
    if device == "cuda":
        take_own_gpu()
    first = recipes[0]  # what no row may say is the same in all
    texts = [first.negative_prompt, *(recipe.effective_prompt for recipe in recipes)]
    if request.cache is None:
        embeds = encode_prompts(request.checkpoint, texts, first.text_dtype, first.cache_dtype, request.levers)
    else:
        embeds = read_embeddings(request.cache, request.dataset, texts, first)
    pipeline = load_pipeline(
        request.checkpoint,
        first.scheduler,
        first.dtype,
        image_factor=first.image_factor,
        drop_learned_positions=first.drop_learned_positions,
    )
    adapters = Adapters(pipeline, request.loras)
    install(pipeline, request.levers, device)
    for batch in batches(recipes, request.batch_size):
        start = time.monotonic()
        adapters.scale(batch[0].lora_scale)
        for recipe, frames, size in make_batch(pipeline, batch, embeds):
            path = request.folder / f"{recipe.name}.mp4"
            path.with_suffix(".json").unlink(missing_ok=True)  # where a recipe stands, its video stands too
            write_mp4(path, frames, frame_rate(recipe))
            digest = hashlib.sha256(frames.tobytes()).hexdigest()
            write_atomically(path.with_suffix(".json"), recipe.to_json(digest, size))
            seconds, start = time.monotonic() - start, time.monotonic()
            matches = None if request.frames_sha256 is None else digest == request.frames_sha256
            yield Video(path, recipe.prompt, seconds, matches=matches)


def frame_rate(recipe: Recipe) -> Fraction:
    """Frames per second, exact."""
    return Fraction(recipe.fps).limit_denominator(MOST_DENOMINATOR)


def batches(recipes: list[Recipe], size: int) -> Iterator[list[Recipe]]:
    """The recipes in lists of `size` at most, which differ in prompt, seed and image only, by the first of each."""
    groups: dict[bytes, list[Recipe]] = {}
    for recipe in recipes:
        own = {"prompt": None, "effective_prompt": None, "seed": None, "image": None}
        groups.setdefault(canonical_json({**recipe.identity(), **own}), []).append(recipe)
    cut = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
    place = {recipe.name: number for number, recipe in enumerate(recipes)}
    yield from sorted(cut, key=lambda batch: place[batch[0].name])


def make_batch(
    pipeline: Pipeline, recipes: list[Recipe], embeds: dict[str, torch.Tensor]
) -> Iterator[tuple[Recipe, np.ndarray, int]]:
    """Each recipe's frames, and how many were made at once; halves what does not fit into the device's memory."""
    try:
        frames = make_frames(pipeline, recipes, embeds)
    except torch.OutOfMemoryError:
        if len(recipes) == 1:
            raise
        frames = None
    if frames is not None:
        yield from zip(recipes, frames, [len(recipes)] * len(recipes), strict=True)
        return
    warn(f"{len(recipes)} videos at once do not fit into the device's memory: they are made in halves")
    half = len(recipes) // 2
    for part in (recipes[:half], recipes[half:]):
        yield from make_batch(pipeline, part, embeds)


def load_pipeline(
    checkpoint: Checkpoint,
    scheduler: dict[str, Any],
    dtype: str,
    *,
    image_factor: str | None = None,
    drop_learned_positions: bool = False,
) -> Pipeline:
    """The pipeline without T5, in `dtype`, with the scheduler of a recipe: the one for the kind of checkpoint.

    Args:
        image_factor: a choice of `Facts.image_factor`; None: as `pipeline`.
        drop_learned_positions: as the LoRA was trained.
    """
    facts = checkpoint.facts
    pipeline = (ImageToVideo if facts.image_to_video else TextToVideo)(
        tokenizer=None,
        text_encoder=None,
        vae=load_vae(checkpoint, getattr(torch, dtype)),
        transformer=load_transformer(checkpoint, getattr(torch, dtype), drop_learned_positions=drop_learned_positions),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
    )
    if isinstance(pipeline, ImageToVideo) and image_factor is not None:
        pipeline.image_gain = facts.image_factor(image_factor) / facts.image_factor("pipeline")
    return pipeline


def make_frames(pipeline: Pipeline, recipes: list[Recipe], embeds: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The frames of videos that are made at once, each uint8 [F, H, W, 3] in RGB.

    The noise of each comes from a generator of its own, so that it is the same in any batch.

    Args:
        recipes: that differ in prompt, seed and image only.
        embeds: of the recipes' effective and negative prompts [1, L, D].

    Raises:
        ModelError: the frames are not finite.
    """
    dtype, device = pipeline.transformer.dtype, pipeline._execution_device  # not where its weights wait
    first = recipes[0]
    given: dict[str, Any] = {}
    if first.image is not None:
        given["image"] = [_picture(recipe) for recipe in recipes]
    generators = [torch.Generator("cpu").manual_seed(recipe.seed) for recipe in recipes]  # the same on every device
    prompts = torch.cat([embeds[recipe.effective_prompt] for recipe in recipes])
    negative = torch.cat([embeds[recipe.negative_prompt] for recipe in recipes])
    videos = pipeline(
        prompt_embeds=prompts.to(device, dtype),
        negative_prompt_embeds=negative.to(device, dtype),
        height=first.height,
        width=first.width,
        num_frames=first.frames,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        use_dynamic_cfg=first.use_dynamic_cfg,
        generator=generators if len(generators) > 1 else generators[0],
        output_type="np",
        **given,
    ).frames
    for recipe, video in zip(recipes, videos, strict=True):
        if not np.isfinite(video).all():
            raise ModelError(f"{recipe.name}: its frames are not finite; give --dtype bfloat16 or float32")
    return [(video * 255).round().astype(np.uint8) for video in videos]


def _picture(recipe: Recipe) -> Image:
    """What a recipe's video starts from, at its size."""
    assert recipe.image is not None
    return fit_image(open_image(Path(recipe.image["path"])), recipe.height, recipe.width)
