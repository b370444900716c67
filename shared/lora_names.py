"""What ComfyUI calls the layers of diffusers' CogVideoX: stage 2 writes LoRAs for it, stage 3 reads them back."""

from __future__ import annotations

import re

COMFYUI_PREFIX = "diffusion_model."
# ComfyUI's own CogVideoX names the layers of diffusers' in its own way (comfy/ldm/cogvideo/model.py).
_TO_COMFYUI = (
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_([qkv])$", r".\1"),
    (r"\.attn1\.to_out\.0$", ".attn_out"),
    (r"\.ff\.net\.0\.proj$", ".ff_proj"),
    (r"\.ff\.net\.2$", ".ff_out"),
    (r"^(time|ofs)_embedding\.linear_", r"\1_embedding_linear_"),
)
_FROM_COMFYUI = (
    (r"^(blocks\.\d+)\.([qkv])$", r"\1.attn1.to_\2"),
    (r"^(blocks\.\d+)\.attn_out$", r"\1.attn1.to_out.0"),
    (r"^(blocks\.\d+)\.ff_proj$", r"\1.ff.net.0.proj"),
    (r"^(blocks\.\d+)\.ff_out$", r"\1.ff.net.2"),
    (r"^(time|ofs)_embedding_linear_", r"\1_embedding.linear_"),
    (r"^blocks\.", "transformer_blocks."),
)


def comfyui_name(module: str) -> str:
    """ComfyUI's name of a layer of diffusers' CogVideoX."""
    return _renamed(module, _TO_COMFYUI)


def diffusers_name(module: str) -> str:
    """diffusers' name of a layer of ComfyUI's CogVideoX."""
    return _renamed(module, _FROM_COMFYUI)


def _renamed(module: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        module = re.sub(pattern, replacement, module)
    return module
