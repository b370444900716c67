"""Before step 1: does the data set fit the checkpoint, and does a LoRA survive its file?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from shared.dataset import DataSet
from shared.digests import known_digest
from shared.errors import CacheError, LoraError, ModelError
from shared.geometry import Bucket
from shared.lora import LoraFacts, load_lora_state, lora_state, read_metadata, save_lora
from shared.models import Checkpoint


def check_dataset(dataset: DataSet, checkpoint: Checkpoint, buckets: list[str]) -> None:
    """Refuse a data set that another kind of checkpoint was given to encode. Hashes nothing large.

    Args:
        buckets: of the data set, each once.

    Raises:
        CacheError: names the field that differs, with both values.
        ModelError: a kind of checkpoint that the trainer does not take.
    """
    facts, told = checkpoint.facts, dataset.info["facts"]
    where = f"data set {dataset.name} in {dataset.cache.url}"
    again = f"run stage 1 with --pretrained_model_name_or_path {checkpoint.name}"
    if facts.image_to_video:
        raise ModelError(f"{checkpoint.name}: is {facts.kind}; image-to-video is not trained by this version")
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
        _, height, width = bucket.latent_shape
        if facts.patch_size_t is not None and max(height / facts.sample_height, width / facts.sample_width) > 1:
            raise CacheError(f"{where}: bucket {bucket} is larger than the positions of {checkpoint.name}; {again}")


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
    alpha = None if adapter is None else adapter["transformer.lora_alpha"]
    if facts != lora or alpha != lora.alpha or any(not torch.equal(before[name], after[name]) for name in before):
        raise LoraError(f"{folder}: a LoRA that was saved there came back changed; check the disk")
