"""Before step 1: does the data set fit the checkpoint, and does a LoRA survive its file?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from shared.dataset import DataSet
from shared.digests import known_digest
from shared.errors import CacheError, ConfigError, LoraError, ModelError
from shared.geometry import Bucket
from shared.lora import LoraFacts, adapter_metadata, load_lora_state, lora_state, read_metadata, save_lora
from shared.models import Checkpoint
from shared.sizes import check_bucket, check_learned_positions
from train.config import TrainConfig


def check_flags(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Refuse flags that the checkpoint has no use for.

    Raises:
        ConfigError: names the flag.
    """
    facts, name = checkpoint.facts, checkpoint.name
    check_learned_positions(facts, name, drop_learned_positions=config.drop_learned_positions)
    for flag in () if facts.image_to_video else ("image_factor", "noised_image_dropout"):
        if (value := getattr(config, flag)) != getattr(TrainConfig, flag):
            raise ConfigError(f"--{flag} {value}: {name} is {facts.kind}, without images; leave it out")


def check_dataset(
    dataset: DataSet, checkpoint: Checkpoint, buckets: list[str], *, drop_learned_positions: bool = False
) -> None:
    """Refuse a data set that another kind of checkpoint was given to encode. Hashes nothing large.

    Args:
        buckets: of the data set, each once.
        drop_learned_positions: whether 5B-I2V is trained without its table.

    Raises:
        CacheError: names the field that differs, with both values; or what the data set lacks.
    """
    facts, told = checkpoint.facts, dataset.info["facts"]
    where = f"data set {dataset.name} in {dataset.cache.url}"
    again = f"run stage 1 with --pretrained_model_name_or_path {checkpoint.name}"
    if facts.image_to_video and told["images"] is None:
        raise CacheError(
            f"{where}: has no encodings of first frames, and {checkpoint.name} is {facts.kind}; make them with `python "
            f"-m preprocess --cache {dataset.cache.url} --dataset {dataset.name} --pretrained_model_name_or_path "
            f"{checkpoint.name}` and the manifest: what is cached is not encoded again"
        )
    vae, text = told["latents"]["vae"], told["embeddings"]["text_encoder"]
    compared: list[tuple[str, Any, Any]] = [
        ("vae latent_channels", vae["config"]["latent_channels"], facts.latent_channels),
        ("text encoder d_model", text["config"]["d_model"], facts.text_embed_dim),
        ("max_text_seq_length", told["embeddings"]["max_length"], facts.max_text_seq_length),
        *_differences("vae config", vae["config"], checkpoint.encoding_config()),
    ]
    for part, digests in (("vae", vae["weights"]), ("text_encoder", text["weights"])):
        known = _known_digests(checkpoint, part)
        if known is not None:
            compared.append((f"{part} weights", digests, known))
    for name, cached, own in compared:
        if cached != own:
            raise CacheError(f"{where}: {name} is {cached!r}, {checkpoint.name} has {own!r}; {again}")
    for bucket in map(Bucket.parse, buckets):
        try:
            check_bucket(bucket, facts, checkpoint.name, drop_learned_positions=drop_learned_positions)
        except ConfigError as error:
            raise CacheError(f"{where}: {error}; {again}") from error


def _differences(name: str, cached: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(f"{name} {key}", cached.get(key), own.get(key)) for key in sorted(cached.keys() | own.keys())]


def _known_digests(checkpoint: Checkpoint, part: str) -> list[str] | None:
    """The digests of a part's weight files where they cost nothing; None where the files are not here or not hashed."""
    try:
        digests = [known_digest(path) for path in checkpoint.weight_files(part)]
    except ModelError:  # only the transformer's weights need be on this machine
        return None
    return [digest for digest in digests if digest is not None] if None not in digests else None


def check_lora_file(transformer: Any, lora: LoraFacts, folder: Path) -> None:
    """Save the LoRA and load it back once, so that a run cannot end with a file that does not load.

    Raises:
        LoraError: what came back differs from what was saved.
    """
    before = lora_state(transformer)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-check-") as temporary:
        path = save_lora(transformer, Path(temporary), lora)
        adapter, facts = read_metadata(path)
        load_lora_state(transformer, path)
    after = lora_state(transformer)
    same = facts == lora and adapter == adapter_metadata(transformer)  # rank, alpha, targets, rsLoRA, DoRA
    if not same or any(not torch.equal(before[name], after[name]) for name in before):
        raise LoraError(f"{folder}: a LoRA that was saved there came back changed; check the disk")
