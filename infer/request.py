"""What was asked for, made definite: which LoRA, which checkpoint, which videos. Loads no weights and no torch.

    --lora -> its metadata -> checkpoint -> rows -> recipes

So whatever does not fit is refused at once, and before anything large is downloaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from infer.compare import Comparison
from infer.config import InferConfig
from infer.lora import Lora, check_together
from infer.memory import Levers, resolve_levers
from infer.recipe import Recipe, frames_digest_in
from infer.recipes import check_rows, first_facts, make_recipes
from infer.replay import check_image, find_base, find_loras, replay_recipe
from infer.split import own_share, world
from shared.cache import Cache
from shared.console import warn
from shared.dataset import open_dataset
from shared.errors import ConfigError, LoraError, ModelError
from shared.models import Checkpoint, choose_device, open_checkpoint
from shared.prompt_file import PromptRow
from shared.sizes import check_dtype

PARTS = ("text_encoder", "transformer", "vae")


@dataclass(frozen=True)
class Request:
    """Videos to make, and what with. The recipes differ in what a row may say.

    Attributes:
        cache, dataset: where the prompts' embeddings are; None: T5 makes them.
        comparisons: videos that are to stand side by side.
        batch_size: videos that are made at once, at most.
        frames_sha256: what the one video's frames are to be, of `--recipe`.
        levers: what makes them small; of the recipes, those that change frames.
    """

    loras: list[Lora]
    checkpoint: Checkpoint
    recipes: list[Recipe]
    folder: Path
    cache: str | None = None
    dataset: str = "default"
    comparisons: tuple[Comparison, ...] = ()
    batch_size: int = 1
    frames_sha256: str | None = None
    levers: Levers = field(default_factory=Levers)

    @property
    def count(self) -> int:
        """How many videos are asked for, comparisons included."""
        return len(self.recipes) + len(self.comparisons)


def resolve(config: InferConfig) -> Request:
    """What a configuration asks for; the output folder is made.

    Raises:
        UserError: something that was asked for does not fit, or would replace another video.
    """
    processes = world()[1]
    folder, digest = Path(config.output_dir).expanduser(), None
    check_folder(folder)
    if config.cache is not None:
        open_dataset(Cache(config.cache), config.dataset)  # a mistyped name must not cost a download
    if config.recipe is not None:
        file = Path(config.recipe).expanduser()
        recipe, digest = replay_recipe(Recipe.read(file)), frames_digest_in(file)
        levers = resolve_levers(config, choose_device(), processes=processes, recipe=recipe)
        recipes, loras = [check_image(recipe, config)], find_loras(recipe, config)
        checkpoint = find_base(recipe, config, weight_parts(config))
    else:
        rows = config.rows()
        levers = resolve_levers(config, choose_device(), processes=processes)
        loras = [Lora.read(told, config.cache_dir) for told in config.lora]
        check_together(loras, base_is_given=config.pretrained_model_name_or_path is not None)
        checkpoint = find_checkpoint(rows, config, loras)
        recipes = make_recipes(rows, config, checkpoint, loras, levers)
    for lora in loras:
        lora.check_fits(checkpoint)
        if not lora.says_alpha:
            warn(f"{lora.path} does not hold its alpha: it is taken to be its rank; else give the weight alpha/rank")
    for recipe in recipes:
        recipe.is_made(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be made ({error.strerror}); give a folder") from error
    groups = [list(group) for group in own_share(by_group(recipes))]  # what is compared, one process makes
    comparisons = tuple(Comparison(tuple(group)) for group in groups) if config.compare is not None else ()
    names = {recipe.name for group in groups for recipe in group}
    own = [recipe for recipe in recipes if recipe.name in names]
    told = (config.cache, config.dataset, comparisons, config.batch_size, digest, levers)
    return Request(loras, checkpoint, own, folder, *told)


def check_folder(folder: Path) -> None:
    """Refuse an output folder that cannot be written, before anything is fetched. Makes nothing.

    Raises:
        ConfigError: it, or what it would be made in, is no folder or may not be written.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError(f"--output_dir {folder}: {there} is no folder; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {folder}: {there} may not be written; give a folder of yours")


def by_group(recipes: list[Recipe]) -> list[list[Recipe]]:
    """The recipes by what they have in common, in order."""
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(recipe.group, []).append(recipe)
    return list(groups.values())


def weight_parts(config: InferConfig) -> tuple[str, ...]:
    """The parts of the checkpoint whose weights are needed: with a cache of embeddings, not T5's."""
    return PARTS if config.cache is None else tuple(part for part in PARTS if part != "text_encoder")


def find_checkpoint(rows: list[PromptRow], config: InferConfig, loras: list[Lora]) -> Checkpoint:
    """The checkpoint asked for, else the one that the LoRAs were trained on; its files are on this machine.

    Raises:
        LoraError: the LoRAs name none, or were trained on another kind.
        ModelError: there is no such checkpoint.
        ConfigError: it cannot make what a row asks for.
    """
    facts = first_facts(loras)
    name, revision, variant, hint = config.pretrained_model_name_or_path, config.revision, config.variant, ""
    if name is None:
        source = next((lora.path for lora in loras if lora.facts), loras[0].path)
        if facts is None:
            raise LoraError(f"{source}: does not say what it was trained on; give --pretrained_model_name_or_path")
        name, revision, variant = facts.base_model, revision or facts.revision, variant or facts.variant
        hint = f" (what {source} was trained on; where it has moved, give --pretrained_model_name_or_path)"

    def fetch(weights: tuple[str, ...]) -> Checkpoint:
        try:
            return open_checkpoint(
                name, revision=revision, variant=variant, cache_dir=config.cache_dir, weights=weights
            )
        except ModelError as error:
            raise ModelError(f"{error}{hint}") from error

    checkpoint = fetch(())  # configs first: a refusal must not cost a download of gigabytes
    kind = checkpoint.facts.kind
    for lora in loras:
        if lora.facts and lora.facts.kind != kind:
            raise LoraError(f"{lora.path}: was trained on {lora.facts.kind}, and {name} is {kind}; give the LoRA's own")
    check_rows(rows, config, checkpoint, facts)
    parts = weight_parts(config)
    checkpoint = fetch(parts)
    for part in parts:
        check_dtype(checkpoint, part, config.dtype, f"--dtype {config.dtype}", allowed=config.allow_dtype)
    return checkpoint
