"""Prompt embeddings: of T5, which is loaded, run and freed; or of a cache that has them, and then T5 is not needed.

Shapes: L tokens, D features.
"""

from __future__ import annotations

import gc

import torch

from infer.memory import Levers
from infer.placement import place_text_encoder
from infer.quantise import quantise
from infer.recipe import Recipe
from shared.cache import Cache, embedding_key
from shared.console import warn
from shared.dataset import open_dataset
from shared.errors import CacheError, ModelError
from shared.models import Checkpoint, choose_device, load_text_encoder
from shared.shards import decode_array


@torch.no_grad()
def encode_prompts(
    checkpoint: Checkpoint, prompts: list[str], dtype: str, cache_dtype: str, levers: Levers | None = None
) -> dict[str, torch.Tensor]:
    """T5's embedding of each prompt, as the pipeline makes it: padded to the full length, no attention mask.

    Args:
        dtype: that T5 runs in.
        cache_dtype: that the embeddings are rounded to, as those that the LoRA was trained on were.
        levers: where T5's weights are, and in how many bits; None: on the device, whole.

    Returns:
        [1, L, D] in `cache_dtype`, on the CPU. T5 is freed.

    Raises:
        ModelError: an embedding is not finite, as T5's are in float16 now and then.
    """
    tokenizer, encoder = load_text_encoder(checkpoint, getattr(torch, dtype))
    device, levers = choose_device(), levers or Levers()
    quantise(encoder, levers.text_encoder_precision, levers.quantiser)
    place_text_encoder(encoder, levers, device)
    length = checkpoint.facts.max_text_seq_length
    embeds: dict[str, torch.Tensor] = {}
    for prompt in prompts:  # one at a time: a prompt's video does not depend, in its last bits, on the others
        tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if (count := len(tokenizer(prompt).input_ids)) > length:
            warn(f"of the prompt's {count} tokens {length} are read: {prompt:.60}...")
        embeds[prompt] = encoder(tokens.input_ids.to(device))[0].cpu().to(getattr(torch, cache_dtype))
        if not embeds[prompt].isfinite().all():
            raise ModelError(f"T5's embedding of {prompt!r:.80} is not finite; give --dtype bfloat16 or float32")
    del encoder
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return embeds


def read_embeddings(cache: str, dataset: str, prompts: list[str], recipe: Recipe) -> dict[str, torch.Tensor]:
    """The embeddings of prompts that a data set's cache holds.

    They are T5's to the last bit where stage 1 was told the prompts as --validation_prompt.

    Args:
        recipe: whose dtypes the embeddings must be of.

    Returns:
        [1, L, D], on the CPU.

    Raises:
        CacheError: one is not there, or they are of another dtype; names the command that makes it.
    """
    opened = open_dataset(Cache(cache), dataset)
    facts = opened.info["facts"]["embeddings"]
    for name, wanted in (("dtype", recipe.text_dtype), ("cache_dtype", recipe.cache_dtype)):
        if facts[name] != wanted:
            raise CacheError(
                f"--cache {cache}: its embeddings are of {name} {facts[name]}, and the LoRA wants {wanted}; leave "
                "--cache out, or give the cache that the LoRA was trained on"
            )
    store = opened.open_store("embedding")
    found = {}
    for prompt in prompts:
        key = embedding_key(prompt)
        if int(store.find([key])[0]) < 0:
            raise CacheError(
                f"--cache {cache}: holds no embedding of {prompt!r:.80}; leave --cache out, or run stage 1 with "
                "--validation_prompt"
            )
        found[prompt] = torch.from_numpy(decode_array(store.read(key), prompt).copy())[None]
    return found
