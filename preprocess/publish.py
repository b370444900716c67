"""From samples whose members are all in the cache to a version of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.config import PreprocessConfig
from preprocess.plan import Rejected, Sample
from preprocess.report import Report
from shared.cache import Cache, Store, embedding_key
from shared.config import to_dict
from shared.dataset import location_row, publish_dataset
from shared.models import Checkpoint
from shared.prompts import user_prompt


@dataclass(frozen=True)
class Stores:
    """The stores that a run reads and fills, and the dtypes that it encodes in."""

    latents: Store
    images: Store | None  # image-to-video
    embeddings: Store
    vae_dtype: str
    text_dtype: str

    @property
    def tiling(self) -> dict[str, Any] | None:
        """The tiles that the VAE encodes in; None: untiled."""
        return self.latents.facts["tiling"]


def publish(
    cache: Cache,
    writer: Path,
    config: PreprocessConfig,
    checkpoint: Checkpoint,
    stores: Stores,
    samples: list[Sample],
    rejected: list[Rejected],
    report: Report,
) -> str:
    """Publish the samples, in manifest order, as a version of the data set. Returns its digest.

    Every key of every sample must be in the stores. Truncated prompts and captions that stand on several clips are
    counted in the report on the way.
    """
    latents, images, embeddings = stores.latents, stores.images, stores.embeddings
    plain = latents.find([sample.latent_key for sample in samples])
    mirrored = latents.find([sample.mirrored_key or sample.latent_key for sample in samples])
    prompts = embeddings.find([sample.embedding_key for sample in samples])
    first_frames = {}
    if images:
        keys = [sample.image_key for sample in samples if sample.image_key]
        first_frames = {key: images.location(row) for key, row in zip(keys, images.find(keys), strict=True)}
    limit = checkpoint.facts.max_text_seq_length
    rows = []
    for sample, latent_row, mirrored_row, prompt_row in zip(samples, plain, mirrored, prompts, strict=True):
        tokens = embeddings.tokens(prompt_row)
        rows.append(
            {
                **sample.row(),
                "tokens": tokens,
                "truncated": tokens > limit,
                **location_row("latent", latents.location(latent_row)),
                **location_row("mirrored", latents.location(mirrored_row) if sample.mirrored_key else None),
                **location_row("image", first_frames[sample.image_key] if sample.image_key else None),
                **location_row("embedding", embeddings.location(prompt_row)),
            }
        )
    report.count_captions(rows)
    info = {
        "fingerprints": {
            "latents": latents.fingerprint,
            "embeddings": embeddings.fingerprint,
            "images": images.fingerprint if images else None,
        },
        "facts": {
            "latents": latents.facts,
            "embeddings": embeddings.facts,
            "images": images.facts if images else None,
        },
        "model": {"name": checkpoint.name, "revision": checkpoint.revision, "variant": checkpoint.variant},
        "id_token": (config.id_token or "").strip() or None,
        "random_flip": config.random_flip,
        "empty_prompt": _prompt_entry(embeddings, "", ""),
        "validation_prompts": [
            _prompt_entry(embeddings, text, user_prompt(text, config.id_token)) for text in config.validation_prompts()
        ],
        "config": to_dict(config),
    }
    return publish_dataset(
        cache, writer, config.dataset, info, rows, [clip.row() for clip in rejected], report.to_dict()
    )


def _prompt_entry(store: Store, prompt: str, effective: str) -> dict[str, Any]:
    key = embedding_key(effective)
    row = int(store.find([key])[0])
    place = location_row("embedding", store.location(row))
    return {"prompt": prompt, "effective_prompt": effective, "embedding_key": key.hex(), **place}
