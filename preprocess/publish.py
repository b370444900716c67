"""From samples whose members are all in the cache to a version of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.config import PreprocessConfig
from preprocess.plan import Sample
from preprocess.preview import write_preview
from preprocess.report import Report
from preprocess.spool import batched
from preprocess.tally import Tally
from shared.cache import Cache, Store
from shared.config import to_dict
from shared.dataset import location_row, open_dataset, publish_dataset, sample_id
from shared.models import Checkpoint
from shared.storage import canonical_json

BATCH = 4096  # samples that are looked up together


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


def sample_rows(clips: Iterable[tuple[int, Sample]], stores: Stores, limit: int) -> Iterator[dict[str, Any]]:
    """The samples' rows of samples.parquet with `manifest_row`, but for sample_id.

    Every key of every sample must be in the stores.

    Args:
        clips: samples, each with its record's place in the manifest.
        limit: tokens that the text encoder reads.
    """
    latents, images, embeddings = stores.latents, stores.images, stores.embeddings
    for batch in batched(clips, BATCH):
        samples = [sample for _, sample in batch]
        plain = latents.find([sample.latent_key for sample in samples])
        mirrored = latents.find([sample.mirrored_key or sample.latent_key for sample in samples])
        prompts = embeddings.find([sample.embedding_key for sample in samples])
        first_frames = images.find([sample.image_key or b"" for sample in samples]) if images else plain
        for (manifest_row, sample), latent_row, mirrored_row, prompt_row, image_row in zip(
            batch, plain, mirrored, prompts, first_frames, strict=True
        ):
            tokens = embeddings.tokens(prompt_row)
            yield {
                "manifest_row": manifest_row,
                **sample.row(),
                "tokens": tokens,
                "truncated": tokens > limit,
                **location_row("latent", latents.location(latent_row)),
                **location_row("mirrored", latents.location(mirrored_row) if sample.mirrored_key else None),
                **location_row("image", images.location(image_row) if images and sample.image_key else None),
                **location_row("embedding", embeddings.location(prompt_row)),
            }


def dataset_info(config: PreprocessConfig, checkpoint: Checkpoint, stores: Stores) -> dict[str, Any]:
    """What dataset.json tells of all samples, but for the prompts (preprocess/validation.py)."""
    latents, images, embeddings = stores.latents, stores.images, stores.embeddings
    return {
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
        "config": to_dict(config),
    }


def publish(
    cache: Cache,
    writer: Path,
    name: str,
    info: dict[str, Any],
    samples: Iterable[dict[str, Any]],
    rejected: Iterable[dict[str, Any]],
    report: Report,
) -> str:
    """Publish a version of a data set, then put its page beside it. Returns its digest.

    Args:
        info: of `dataset_info` and `validation.prompt_entries`.
        samples: of `sample_rows`, in manifest order; counted in the report on the way.
        rejected: rows of rejected.parquet.
    """
    rows = report.counted(_with_ids(samples, mirrored=info["random_flip"] > 0))
    digest = publish_dataset(cache, writer, name, info, rows, rejected, report.to_dict)
    write_preview(cache, writer, open_dataset(cache, name, digest))
    return digest


def _with_ids(rows: Iterable[dict[str, Any]], *, mirrored: bool) -> Iterator[dict[str, Any]]:
    segments = Tally()
    for row in rows:
        segment = (row["source"], row["start_s"], row["end_s"])
        occurrence = segments.add(canonical_json(segment).decode())
        told = {name: value for name, value in row.items() if name != "manifest_row"}
        yield {**told, "sample_id": sample_id(*segment, mirrored, occurrence)}
