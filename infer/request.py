"""What was asked for, made definite: which LoRA, which checkpoint, which videos. Loads no weights and no torch.

    --lora -> its metadata -> checkpoint -> a recipe for each prompt

So whatever does not fit is refused at once, and before anything large is downloaded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.config import InferConfig
from infer.lora import Lora
from infer.recipe import Recipe
from shared.errors import ConfigError, LoraError, ModelError
from shared.geometry import SIDE_MULTIPLE, Bucket
from shared.lora import LoraFacts
from shared.models import Checkpoint, choose_device, choose_dtype, open_checkpoint
from shared.prompts import user_prompt

PARTS = ("text_encoder", "transformer", "vae")
SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # what CogVideoX's checkpoints name


@dataclass(frozen=True)
class Request:
    """Videos to make, and what with. The recipes differ in their prompts only."""

    lora: Lora | None
    checkpoint: Checkpoint
    recipes: list[Recipe]
    folder: Path


def resolve(config: InferConfig) -> Request:
    """What a configuration asks for; the output folder is made.

    Raises:
        UserError: something that was asked for does not fit, or would replace another video.
    """
    texts = config.texts()
    lora = Lora.read(config.lora) if config.lora is not None else None
    checkpoint = find_checkpoint(config, lora)
    if lora is not None:
        lora.check_fits(checkpoint)
        if lora.adapter is None:
            warn(f"{lora.path} does not hold its alpha: it is taken to be its rank; else --lora_scale alpha/rank")
    recipes = make_recipes(texts, config, checkpoint, lora)
    folder = Path(config.output_dir).expanduser()
    for recipe in recipes:
        recipe.check_free(folder / f"{recipe.name}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be made ({error.strerror}); give a folder") from error
    return Request(lora, checkpoint, recipes, folder)


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


def choose_bucket(config: InferConfig, checkpoint: Checkpoint, facts: LoraFacts | None) -> Bucket:
    """The shape to make: what was asked for, else what the LoRA was trained at, else the checkpoint's own.

    Raises:
        ConfigError: the checkpoint cannot make it.
    """
    model = checkpoint.facts
    frames, height, width = model.sample_frames, *model.native_size
    if facts is not None:
        frames, height, width = facts.frames, facts.height, facts.width
    bucket = Bucket(
        frames=frames if config.num_frames is None else config.num_frames,
        height=height if config.height is None else config.height,
        width=width if config.width is None else config.width,
    )
    if model.patch_size_t is not None:  # 1.5 has a table of positions, and none beyond its end
        for name, side, sample in (
            ("height", bucket.height, model.sample_height),
            ("width", bucket.width, model.sample_width),
        ):
            most = sample // model.patch_size * SIDE_MULTIPLE
            if side > most:
                raise ConfigError(f"--{name} {side}: {checkpoint.name} has positions up to {most} pixels; use less")
    return bucket


def make_recipes(texts: list[str], config: InferConfig, checkpoint: Checkpoint, lora: Lora | None) -> list[Recipe]:
    """A recipe for each prompt, in order; a prompt that is given twice has one.

    Precision is what the LoRA met in training, so that it meets the same embeddings and the same base again.
    """
    facts = lora.facts if lora else None
    if facts:
        fps, token = facts.fps, facts.id_token
        dtype, text_dtype, cache_dtype = facts.dtype, facts.text_dtype, facts.cache_dtype
    else:
        fps, token = float(checkpoint.facts.native_fps), None
        dtype, text_dtype = checkpoint.stored_dtype("transformer"), checkpoint.stored_dtype("text_encoder")
        cache_dtype = "float16"
    bucket, device = choose_bucket(config, checkpoint, facts), choose_device()
    model = {name: getattr(checkpoint, name) for name in ("name", "revision", "variant")}
    scheduler = _scheduler(checkpoint)
    recipes: dict[str, Recipe] = {}
    for prompt in texts:
        text = user_prompt(prompt, token if config.id_token else None)
        recipe = Recipe(
            prompt=prompt,
            effective_prompt=text,
            negative_prompt="",
            seed=config.seed,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            fps=fps if config.fps is None else config.fps,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            use_dynamic_cfg=config.use_dynamic_cfg,
            lora_scale=config.lora_scale,
            lora=lora.describe() if lora else None,
            model={**model, "kind": checkpoint.facts.kind},
            scheduler=scheduler,
            dtype=choose_dtype(config.dtype, dtype),
            text_dtype=choose_dtype(config.dtype, text_dtype),
            cache_dtype=cache_dtype,
            device=device,
            vae_tiling=device == "cuda",
        )
        recipes.setdefault(text, recipe)
    return list(recipes.values())


def _scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scheduler's config; its `_class_name` is the index's, which is what diffusers goes by."""
    index = json.loads((checkpoint.folder / "model_index.json").read_text(encoding="utf-8"))
    name = index["scheduler"][1]
    if name not in SCHEDULERS:
        raise ModelError(f"{checkpoint.name}: its scheduler is {name}; must be one of {', '.join(SCHEDULERS)}")
    return {**checkpoint.config("scheduler"), "_class_name": name}


def warn(message: str) -> None:
    """Print a line that the user should see, and go on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
