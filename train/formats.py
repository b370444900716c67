"""A trained LoRA as others read it: ComfyUI's files, PEFT's folder, or merged into the transformer.

Letters: R rank, I and O inputs and outputs of a linear layer with weights W [O, I]. A [R, I] and B [O, R] are in the
file; what was trained is W + scale * B @ A, with scale = alpha / R, or rsLoRA's alpha / sqrt(R).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import LoraError
from shared.lora import PREFIX, LoraFacts, describe_lora, find_lora, pack_lora, read_metadata
from shared.lora_names import COMFYUI_PREFIX, comfyui_name
from shared.models import Checkpoint, load_transformer
from shared.storage import canonical_json, write_atomically

if TYPE_CHECKING:
    import torch

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Layer:
    """What a LoRA holds of one linear layer, in float32.

    Attributes:
        module: its name in diffusers' transformer.
        magnitude: DoRA's, [O]; None: it is none.
    """

    module: str
    down: torch.Tensor  # A
    up: torch.Tensor  # B
    magnitude: torch.Tensor | None


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA file of LatentReel.

    Attributes:
        adapter: PEFT's configuration, under PEFT's names.
    """

    path: Path
    adapter: dict[str, Any]
    facts: LoraFacts

    @classmethod
    def read(cls, run: str) -> TrainedLora:
        """The LoRA that `run` (a run, a checkpoint, a file) names.

        Raises:
            LoraError: there is none, or its file does not say what strength it was trained at.
        """
        path = find_lora(run, "RUN")
        adapter, facts = read_metadata(path)
        if adapter is None or facts is None:
            raise LoraError(f"{path}: its metadata do not say its alpha and base model; give a LoRA of LatentReel")
        return cls(path, {name.removeprefix(PREFIX): value for name, value in adapter.items()}, facts)

    @property
    def is_dora(self) -> bool:
        """Whether outputs have magnitudes."""
        return bool(self.adapter["use_dora"])

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        rank, alpha = self.adapter["r"], self.adapter["lora_alpha"]
        return float(alpha / (math.sqrt(rank) if self.adapter["use_rslora"] else rank))

    def layers(self) -> Iterator[Layer]:
        """Its layers, in the order of their names."""
        from safetensors.torch import load_file

        state = load_file(self.path)
        for name in sorted(state):
            if not name.endswith(".lora_A.weight"):
                continue
            stem = name.removesuffix(".lora_A.weight")
            magnitude = state.get(f"{stem}.{MAGNITUDE}")
            yield Layer(stem.removeprefix(PREFIX), state[name], state[f"{stem}.lora_B.weight"], magnitude)


def write_comfyui(lora: TrainedLora, folder: Path) -> None:
    """Write `comfyui.safetensors`, for ComfyUI's own LoRA loader, and `cogvideox_wrapper.safetensors`, for the nodes of
    ComfyUI-CogVideoXWrapper. Both are right at strength 1.0.

    The loaders differ in their names, and in alpha: ComfyUI's takes the file's or 1 as alpha / rank, the wrapper's
    takes 1 and refuses a file that holds an alpha. So the scale is in B, and alpha is the rank wherever it is read.

    Raises:
        LoraError: a DoRA; the wrapper has no place for magnitudes.
    """
    import torch

    if lora.is_dora:
        raise LoraError(
            f"{lora.path}: is a DoRA, whose magnitudes --format comfyui cannot hold; give --format fused or peft"
        )
    rank = lora.adapter["r"]
    own: dict[str, torch.Tensor] = {}
    wrapper: dict[str, torch.Tensor] = {}
    for layer in lora.layers():
        up = (layer.up * lora.scale).contiguous()
        name = f"{COMFYUI_PREFIX}{comfyui_name(layer.module)}"
        own |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": up}
        own[f"{name}.alpha"] = torch.tensor(float(rank))
        wrapper |= {f"{PREFIX}{layer.module}.lora_A.weight": layer.down, f"{PREFIX}{layer.module}.lora_B.weight": up}
    facts = replace(lora.facts, alpha=float(rank))
    adapter = {**lora.adapter, "lora_alpha": rank, "use_rslora": False}
    told = describe_lora({f"{PREFIX}{name}": value for name, value in adapter.items()}, facts)
    write_atomically(folder / "cogvideox_wrapper.safetensors", pack_lora(wrapper, told))
    metadata = {"format": "pt", "latentreel": canonical_json(asdict(facts)).decode()}
    write_atomically(folder / "comfyui.safetensors", pack_lora(own, metadata))


def write_peft(lora: TrainedLora, folder: Path) -> None:
    """Write what `peft.PeftModel.from_pretrained(transformer, folder)` reads."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig(**{**lora.adapter, "base_model_name_or_path": lora.facts.base_model, "inference_mode": True})
    config.save_pretrained(str(folder))
    state = {f"base_model.model.{name.removeprefix(PREFIX)}": value for name, value in load_file(lora.path).items()}
    write_atomically(folder / "adapter_model.safetensors", pack_lora(state, {"format": "pt"}))


def write_fused(lora: TrainedLora, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's transformer with the LoRA merged into its weights, in the dtype that they are stored in.

    It has no learned positions where the LoRA was trained without them.

    Raises:
        LoraError: the LoRA has a matrix that the transformer has no place for, or its dtype cannot hold a sum.
    """
    import torch

    transformer = load_transformer(
        checkpoint,
        getattr(torch, checkpoint.stored_dtype("transformer")),
        drop_learned_positions=lora.facts.drop_learned_positions,
    )
    modules = dict(transformer.named_modules())
    for layer in lora.layers():
        weight = getattr(modules.get(layer.module), "weight", None)
        shape = (layer.up.shape[0], layer.down.shape[1])
        if weight is None or tuple(weight.shape) != shape:
            found = "none" if weight is None else str(tuple(weight.shape))
            raise LoraError(
                f"{lora.path}: {layer.module} is {shape}, in {checkpoint.name} it is {found}; the LoRA was trained on "
                f"{lora.facts.base_model}: give that, or a checkpoint of its size"
            )
        weight.data.copy_(merge(weight.float(), layer, lora.scale))  # rounded once, from float32
        if not weight.isfinite().all():
            raise LoraError(
                f"{lora.path}: merged, {layer.module} is not finite in {weight.dtype}; give a checkpoint that is "
                "stored in another dtype"
            )
    transformer.save_pretrained(folder, safe_serialization=True)


def merge(weight: torch.Tensor, layer: Layer, scale: float) -> torch.Tensor:
    """Weights [O, I] in float32 with a LoRA in them: DoRA's rows have the length that their magnitude says."""
    import torch

    merged = weight + scale * layer.up @ layer.down
    if layer.magnitude is None:
        return merged
    return merged * (layer.magnitude / torch.linalg.norm(merged, dim=1))[:, None]
