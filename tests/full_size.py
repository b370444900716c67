"""The configs of the real checkpoints, as far as they shape a step: sizes of the hub's, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.models import Checkpoint
from tests.tiny_model import KINDS

NAMES = {
    "2b": "THUDM/CogVideoX-2b",
    "5b": "THUDM/CogVideoX-5b",
    "5b-i2v": "THUDM/CogVideoX-5b-I2V",
    "1.5-5b": "THUDM/CogVideoX1.5-5B",
    "1.5-5b-i2v": "THUDM/CogVideoX1.5-5B-I2V",
}
NATIVE = {kind: "81x768x1360" if kind.startswith("1.5") else "49x480x720" for kind in NAMES}


def transformer_config(kind: str) -> dict[str, Any]:
    """The transformer's config.json of a kind, at its real size."""
    return {
        "num_attention_heads": 30 if kind == "2b" else 48,
        "num_layers": 30 if kind == "2b" else 42,
        "attention_head_dim": 64,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "sample_height": 60,
        "sample_width": 90,
        "sample_frames": 49,
        "max_text_seq_length": 226,
        "use_rotary_positional_embeddings": False,
        **KINDS[kind]["transformer"],
    }


def configs_of(folder: Path, kind: str, **changed: Any) -> Checkpoint:
    """Write the config files of a kind, with some keys of the transformer's changed; no weights."""
    vae = {
        "latent_channels": 16,
        "block_out_channels": [128, 256, 256, 512],
        "temporal_compression_ratio": 4,
        **KINDS[kind]["vae"],
    }
    for part, config in (("transformer", transformer_config(kind) | changed), ("vae", vae)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    return Checkpoint(str(folder), None, None, folder)
