"""The recipes of what was asked for: a row, else the flags, else the LoRA, else the checkpoint says each thing.

rows -> what a row says otherwise than the flags -> a recipe for each video
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from infer.config import InferConfig
from infer.image import find_image
from infer.lora import Lora
from infer.memory import Levers
from infer.recipe import Recipe
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import ConfigError, ModelError
from shared.geometry import Bucket
from shared.lora import LoraFacts
from shared.models import Checkpoint, choose_device, choose_dtype
from shared.prompt_file import PromptRow
from shared.prompts import caption_prompt
from shared.sizes import check_bucket

SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # what CogVideoX's checkpoints name


def check_rows(rows: list[PromptRow], config: InferConfig, checkpoint: Checkpoint, facts: LoraFacts | None) -> None:
    """Refuse what the checkpoint cannot make, by the row that asks for it. Reads no weights.

    Raises:
        ConfigError: a size that it does not take; an image that is missing, or of no use; a scale without a LoRA.
    """
    name, kind = checkpoint.name, checkpoint.facts.kind
    for row in rows:
        with _named(row):
            image = row.image or config.image
            if checkpoint.facts.image_to_video and image is None:
                raise ConfigError(
                    f"--image is missing: {name} is {kind}; give the picture that the videos start from, or a column "
                    "image in the file of --prompts"
                )
            if not checkpoint.facts.image_to_video and image is not None:
                raise ConfigError(f"--image {image}: {name} is {kind}, which starts from none; leave it out")
            if row.lora_scale is not None and not config.lora:
                raise ConfigError(f"lora_scale {row.lora_scale:g}: there is no LoRA to scale; give --lora")
            if row.lora_scale is not None and config.compare is not None:
                raise ConfigError(f"lora_scale {row.lora_scale:g} with --compare {config.compare}; give one of them")
            if _first(row.seed, config.seed) + config.num_videos > 2**63:
                raise ConfigError(
                    f"--num_videos {config.num_videos}: the last seed must be below 2^63; give a lower one"
                )
            choose_bucket(row, config, checkpoint, facts)


def choose_bucket(row: PromptRow, config: InferConfig, checkpoint: Checkpoint, facts: LoraFacts | None) -> Bucket:
    """The shape to make: what was asked for, else what the LoRA was trained at, else the checkpoint's own.

    Raises:
        ConfigError: the checkpoint cannot make it.
    """
    model = checkpoint.facts
    frames, height, width = model.sample_frames, *model.native_size
    if facts is not None:
        frames, height, width = facts.frames, facts.height, facts.width
    bucket = Bucket(
        frames=_first(row.num_frames, config.num_frames, frames),
        height=_first(row.height, config.height, height),
        width=_first(row.width, config.width, width),
    )
    check_bucket(bucket, model, checkpoint.name, drop_learned_positions=bool(facts and facts.drop_learned_positions))
    return bucket


def make_recipes(
    rows: list[PromptRow], config: InferConfig, checkpoint: Checkpoint, loras: list[Lora], levers: Levers
) -> list[Recipe]:
    """A recipe for each video, in order: a row's seeds, of each seed the strengths; what is asked for twice has one.

    Precision is what the first LoRA met in training, so that it meets the same embeddings and the same base again.
    """
    facts = first_facts(loras)
    shared = _shared(config, checkpoint, loras, levers)
    tokens = [lora.facts.id_token for lora in loras if lora.facts and lora.facts.id_token and config.id_token]
    recipes: dict[str, Recipe] = {}
    for row in rows:
        with _named(row):
            image = row.image or config.image
            bucket = choose_bucket(row, config, checkpoint, facts)
            recipe = Recipe(
                prompt=row.prompt,
                effective_prompt=with_tokens(row.prompt, tokens),
                seed=_first(row.seed, config.seed),
                frames=bucket.frames,
                height=bucket.height,
                width=bucket.width,
                num_inference_steps=_first(row.num_inference_steps, config.num_inference_steps),
                guidance_scale=_first(row.guidance_scale, config.guidance_scale),
                use_dynamic_cfg=_first(row.use_dynamic_cfg, config.use_dynamic_cfg),
                lora_scale=_first(row.lora_scale, config.lora_scale),
                image=None if image is None else find_image(image),
                **shared,
            )
        scales = [recipe.lora_scale] if config.compare is None else config.scales()
        for number in range(config.num_videos):
            for scale in scales:
                one = replace(recipe, seed=recipe.seed + number, lora_scale=scale)
                recipes.setdefault(one.name, one)
    return list(recipes.values())


def first_facts(loras: list[Lora]) -> LoraFacts | None:
    """What the first LoRA that says it was trained on: size, rate and precision are taken from it."""
    return next((lora.facts for lora in loras if lora.facts), None)


def with_tokens(prompt: str, tokens: list[str]) -> str:
    """The effective prompt of a user's: the id tokens that it does not begin with are put before it, in their order."""
    missing, words = list(dict.fromkeys(tokens)), prompt.split()
    while leading := next((token for token in missing if words[: len(token.split())] == token.split()), None):
        missing.remove(leading)
        words = words[len(leading.split()) :]
    for token in reversed(missing):
        prompt = caption_prompt(prompt, token)
    return prompt


def _shared(config: InferConfig, checkpoint: Checkpoint, loras: list[Lora], levers: Levers) -> dict[str, Any]:
    """The fields of a recipe that are the same in all of a request."""
    facts, device = first_facts(loras), choose_device()
    if facts:
        fps, dtype, text_dtype, cache_dtype = facts.fps, facts.dtype, facts.text_dtype, facts.cache_dtype
    else:
        fps, dtype = float(checkpoint.facts.native_fps), checkpoint.stored_dtype("transformer")
        if config.cache is None:
            text_dtype, cache_dtype = checkpoint.stored_dtype("text_encoder"), "float16"
        else:
            told = open_dataset(Cache(config.cache), config.dataset).info["facts"]["embeddings"]
            text_dtype, cache_dtype = told["dtype"], told["cache_dtype"]
    return {
        "negative_prompt": "",
        "fps": fps if config.fps is None else config.fps,
        "loras": [lora.describe() for lora in loras],
        "model": {
            **{name: getattr(checkpoint, name) for name in ("name", "revision", "variant")},
            "kind": checkpoint.facts.kind,
        },
        "scheduler": _scheduler(checkpoint),
        "dtype": choose_dtype(config.dtype, dtype),
        "text_dtype": choose_dtype(config.dtype, text_dtype),
        "cache_dtype": cache_dtype,
        "device": device,
        "vae_tiling": levers.vae_tiling,
        "levers": levers.changing_numbers(),
        "image_factor": facts.image_factor if facts else None,
        "drop_learned_positions": bool(facts and facts.drop_learned_positions),
    }


def _scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scheduler's config; its `_class_name` is the index's, which is what diffusers goes by."""
    index = json.loads((checkpoint.folder / "model_index.json").read_text(encoding="utf-8"))
    name = index["scheduler"][1]
    if name not in SCHEDULERS:
        raise ModelError(f"{checkpoint.name}: its scheduler is {name}; must be one of {', '.join(SCHEDULERS)}")
    return {**checkpoint.config("scheduler"), "_class_name": name}


@contextmanager
def _named(row: PromptRow) -> Iterator[None]:
    """Inside, what is wrong with a row of a file is said with the file's name and the line."""
    try:
        yield
    except ConfigError as error:
        if row.origin == PromptRow.origin:
            raise
        raise ConfigError(f"{row.origin}: {error}") from error


def _first(*values: Any) -> Any:
    """The first value that is there."""
    return next(value for value in values if value is not None)
