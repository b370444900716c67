"""Tiny random CogVideoX checkpoints: every real block type and config field, small widths, real folder layout.

`python -m tests.tiny_model FOLDER [--kind 2b]` writes one; the tests, the demo and the benchmarks use them.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

# What tells the five checkpoints apart, as in their config.json files on the hub.
KINDS: dict[str, dict[str, Any]] = {
    "2b": {"transformer": {}, "vae": {"scaling_factor": 1.15258426}, "snr_shift_scale": 3.0},
    "5b": {"transformer": {"use_rotary_positional_embeddings": True}, "vae": {"scaling_factor": 0.7}},
    "5b-i2v": {
        "transformer": {
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
            "in_channels": 32,
        },
        "vae": {"scaling_factor": 0.7},
    },
    "1.5-5b": {
        "transformer": {
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 300,
            "sample_width": 300,
            "sample_frames": 81,
        },
        "vae": {"scaling_factor": 0.7, "invert_scale_latents": True},
    },
    "1.5-5b-i2v": {
        "transformer": {
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 300,
            "sample_width": 300,
            "sample_frames": 81,
            "in_channels": 32,
            "ofs_embed_dim": 512,
            "time_embed_dim": 512,  # the two embeddings are added
        },
        "vae": {"scaling_factor": 0.7, "invert_scale_latents": True},
    },
}

TEXT = """a person walks along a mountain path in the morning light while clouds drift over the valley below
a red bicycle stands by the wall of an old house and the camera moves slowly from left to right
a white rabbit looks up at a butterfly in a green meadow full of flowers under a bright blue sky
a woman speaks on the telephone in a car and smiles as the trees go by outside the window
Colour bars, a square that rolls from one side to the other; numbers 0 1 2 3 4 5 6 7 8 9 and letters.
The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! How vexingly quick?"""


def build(
    folder: Path, kind: str = "2b", *, seed: int = 0, layers: int = 2, heads: int = 2, vae_width: int = 8,
    native: tuple[int, int, int] | None = None,
) -> Path:  # fmt: skip
    """Write a tiny random checkpoint of `kind` (a key of KINDS) to `folder`, in float32 safetensors.

    Weights are random but alive: attention, feed-forward and output differ from zero, so that a LoRA has something
    to move. Deterministic in (kind, seed, widths).

    Args:
        native: frames, height and width in pixels that its positions are for; default: as the real one's.
    """
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    facts = KINDS[kind]
    transformer = CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": heads,
            "attention_head_dim": 16,
            "num_layers": layers,
            "time_embed_dim": 32,
            "text_embed_dim": 32,
            "in_channels": 16,
            "out_channels": 16,
            "sample_height": 60,
            "sample_width": 90,
            "sample_frames": 49,
            **facts["transformer"],
            **_native(native),
        }
    )
    if facts["transformer"].get("use_learned_positional_embeddings"):  # diffusers makes a sin-cos table, as for 2B
        table = transformer.patch_embed.pos_embedding
        table.add_(torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)))
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(vae_width,) * 4, norm_num_groups=min(vae_width, 4), layers_per_block=1, **facts["vae"]
    )
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=facts.get("snr_shift_scale", 1.0),
        timestep_spacing="trailing",
    )
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    text_encoder.save_pretrained(folder / "text_encoder")
    _save_tokenizer(folder / "tokenizer")
    pipeline = "CogVideoXImageToVideoPipeline" if facts["transformer"].get("in_channels") == 32 else "CogVideoXPipeline"
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _native(size: tuple[int, int, int] | None) -> dict[str, int]:
    return (
        {} if size is None else {"sample_frames": size[0], "sample_height": size[1] // 8, "sample_width": size[2] // 8}
    )


def _save_tokenizer(folder: Path) -> None:
    """A sentencepiece model trained on the spot, with T5's special tokens and files."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=150,
        model_type="unigram",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    settings = {**special, "extra_ids": 100, "model_max_length": 226, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="2b")
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.kind))
