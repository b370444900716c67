"""The five published CogVideoX checkpoints: what their config files say, as far as it shapes what is held.

Only for a plan of all of them, when no checkpoint is named: whatever is run takes its facts from its own files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.models import Checkpoint

_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
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
    "use_rotary_positional_embeddings": True,
}
_OF_1_5: dict[str, Any] = {
    "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300, "sample_frames": 81,
}  # fmt: skip
_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "layers_per_block": 3,
    "temporal_compression_ratio": 4,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 0.7,
}
_TEXT_ENCODER: dict[str, Any] = {  # T5 v1.1 XXL
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class Published(Checkpoint):
    """A checkpoint that is not on this machine; its configs are those above."""

    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtype: str = "bfloat16"

    def config(self, part: str) -> dict[str, Any]:
        """A part's config."""
        return self.configs[part]

    def stored_dtype(self, part: str) -> str:
        """The dtype that its weights are stored in."""
        return self.dtype


def _published(name: str, dtype: str = "bfloat16", vae: dict[str, Any] | None = None, **changed: Any) -> Published:
    configs = {"transformer": _TRANSFORMER | changed, "vae": _VAE | (vae or {}), "text_encoder": _TEXT_ENCODER}
    return Published(name, None, None, Path(name), configs, dtype)


PUBLISHED = (
    _published(
        "THUDM/CogVideoX-2b",
        "float16",
        {"scaling_factor": 1.15258426},
        num_attention_heads=30,
        num_layers=30,
        use_rotary_positional_embeddings=False,
    ),
    _published("THUDM/CogVideoX-5b"),
    _published("THUDM/CogVideoX-5b-I2V", in_channels=32, use_learned_positional_embeddings=True),
    _published("THUDM/CogVideoX1.5-5B", vae={"invert_scale_latents": True}, **_OF_1_5),
    _published(
        "THUDM/CogVideoX1.5-5B-I2V", vae={"invert_scale_latents": True}, **_OF_1_5, in_channels=32, ofs_embed_dim=512
    ),
)

# GB of one GPU's memory by the guide's table: the weights' own dtype, int8, and of each of several GPUs.
GUIDE = {
    "THUDM/CogVideoX-2b": {"native": 12.5, "int8": 7.8, "several": 10.0},
    "THUDM/CogVideoX-5b": {"native": 20.7, "int8": 11.4, "several": 15.0},
}
