"""`--recipe`: what a recipe names, found again, and refused where its bytes are others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from infer.config import InferConfig
from infer.image import find_image
from infer.lora import Lora, split_weight
from infer.recipe import Recipe
from shared.errors import ConfigError, LoraError, ModelError
from shared.models import Checkpoint, choose_device, open_checkpoint


def replay_recipe(recipe: Recipe) -> Recipe:
    """The recipe as it is run on this machine."""
    return replace(recipe, device=choose_device())


def find_loras(recipe: Recipe, config: InferConfig) -> list[Lora]:
    """The recipe's LoRAs, in order: where `--lora` says they have moved to, else where they were.

    Raises:
        ConfigError: `--lora` names more or fewer, or a weight.
        LoraError: one is not there, or has changed.
    """
    if config.lora and len(config.lora) != len(recipe.loras):
        raise ConfigError(f"--lora: {len(config.lora)} with a --recipe of {len(recipe.loras)}; give all, in its order")
    found = []
    for number, told in enumerate(recipe.loras):
        there = told["path"] if told["hub"] is None or Path(told["path"]).exists() else told["hub"]
        if config.lora:
            there = config.lora[number]
            if split_weight(there)[0] != there:
                raise ConfigError(f"--lora {there} with --recipe, which says the weight; give the path alone")
        lora = Lora.read(there, config.cache_dir)
        if (digest := lora.describe()["sha256"]) != told["sha256"]:
            raise LoraError(
                f"{lora.path}: its sha256 is {digest[:12]}..., the recipe's is {told['sha256'][:12]}...: the LoRA has "
                "changed; give the file that it was, with --lora"
            )
        found.append(replace(lora, weight=told["weight"]))
    return found


def check_image(recipe: Recipe, config: InferConfig) -> Recipe:
    """The recipe with its image where it lies now.

    Raises:
        ConfigError: it is not there, or has changed, or there is none in the recipe.
    """
    if recipe.image is None:
        if config.image is not None:
            raise ConfigError(f"--image {config.image}: the recipe has none; leave it out")
        return recipe
    image = find_image(config.image or recipe.image["path"])
    if image["sha256"] != recipe.image["sha256"]:
        raise ConfigError(
            f"--image {image['path']}: its sha256 is {image['sha256'][:12]}..., the recipe's is "
            f"{recipe.image['sha256'][:12]}...: the picture has changed; give the file that it was"
        )
    return replace(recipe, image=image)


def find_base(recipe: Recipe, config: InferConfig, weights: tuple[str, ...]) -> Checkpoint:
    """The recipe's checkpoint: where a flag says it has moved to, else where it was.

    Raises:
        ModelError: it is not there, or of another kind.
    """
    model, moved = recipe.model, config.pretrained_model_name_or_path
    checkpoint = open_checkpoint(
        moved or model["name"], revision=model["revision"], variant=model["variant"], cache_dir=config.cache_dir,
        weights=weights,
    )  # fmt: skip
    if checkpoint.facts.kind != model["kind"]:
        raise ModelError(f"{checkpoint.name}: is {checkpoint.facts.kind}, the recipe's model is {model['kind']}")
    return checkpoint
