"""What the cache lacks of the clips and prompts of a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from preprocess.config import PreprocessConfig
from preprocess.plan import Sample
from preprocess.publish import Stores
from preprocess.spool import Spool, batched
from shared.cache import embedding_key
from shared.errors import VideoError
from shared.prompts import user_prompt

BATCH = 4096  # clips that are looked up together


def find_missing(spool: Spool, stores: Stores, config: PreprocessConfig) -> None:
    """Give the spool the clips to read and the prompts to encode; refuse the clips whose reading is known to fail."""
    for batch in batched(spool.samples(), BATCH):
        _find_clips([(row, sample) for row, _, sample in batch], spool, stores)
    for prompts in batched(wanted_prompts(spool, config), BATCH):
        keys = [embedding_key(prompt) for prompt in prompts]
        for key, prompt, row in zip(keys, prompts, stores.embeddings.find(keys), strict=True):
            spool.add_prompt(key, prompt, missing=bool(row < 0))


def wanted_prompts(spool: Spool, config: PreprocessConfig) -> Iterator[str]:
    """The prompts to have: the empty one, the samples', the validation videos'; some more than once."""
    if config.worker_index == 0:  # one worker is enough for those that no clip has
        yield ""
        yield from (user_prompt(row.prompt, config.id_token) for row in config.validation_rows)
    yield from (sample.prompt for _, _, sample in spool.samples())


def _find_clips(batch: list[tuple[int, Sample]], spool: Spool, stores: Stores) -> None:
    samples = [sample for _, sample in batch]
    plain = stores.latents.find([sample.latent_key for sample in samples])
    mirrored = stores.latents.find([sample.mirrored_key or sample.latent_key for sample in samples])
    images = np.zeros(len(samples), int)
    if stores.images:
        images = stores.images.find([sample.image_key or b"" for sample in samples])
    for (row, sample), *found in zip(batch, plain, mirrored, images, strict=True):
        # Nothing is missing that is in its store, whatever the verdict on its video: it was read once.
        lacks = [bool(place < 0) for place in found]  # numpy.bool would go into the spool as bytes
        if not any(lacks):
            continue
        source = spool.source(sample.record.path)
        assert source is not None
        verdict = source.verdicts.get(sample.latent_key.hex())
        if verdict:
            spool.refuse(sample.latent_key, VideoError(*verdict))
        else:
            spool.add_job(row, sample, plain=lacks[0], mirrored=lacks[1] and bool(sample.mirrored_key), image=lacks[2])
