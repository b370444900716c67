"""LoRAs inside a pipeline: loaded once, each at whatever strength a video wants.

Letters: s the strength of a LoRA; W a layer's frozen weights; m DoRA's magnitudes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from infer.lora import Lora
from infer.pipelines import Pipeline
from shared.errors import LoraError


class Adapters:
    """The LoRAs of a pipeline, at the strength that they were trained at until `scale` says otherwise.

    Alpha / rank is applied by the files' own metadata.

    Args:
        loras: not one of them twice.

    Raises:
        LoraError: none of a file's matrices is for the transformer.
    """

    def __init__(self, pipeline: Pipeline, loras: Sequence[Lora]) -> None:
        self._pipeline = pipeline
        self.names = [f"lora-{number}" for number in range(len(loras))]
        self._weights = [lora.weight for lora in loras]
        for name, lora in zip(self.names, loras, strict=True):
            with warnings.catch_warnings():  # PEFT's, of a second LoRA in a model: it is meant to be there
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                pipeline.load_lora_weights(lora.weights(), adapter_name=name, use_safetensors=True)
            if name not in pipeline.get_list_adapters().get("transformer", []):
                raise LoraError(f"{lora.path}: none of its matrices is for the transformer; give a LoRA of CogVideoX")
        pipeline.transformer.eval()  # PEFT's new layers are in training mode: they would drop inputs where it says so
        self._magnitudes = [
            (module, name, module.lora_magnitude_vector[name].weight.data.clone())
            for module in pipeline.transformer.modules()
            for name in self.names
            if name in getattr(module, "lora_magnitude_vector", ())
        ]
        self.scale(1.0)

    @torch.no_grad()
    def scale(self, scale: float) -> None:
        """Set the strength of all LoRAs: s is `scale` times a LoRA's weight, 1 as it was trained, 0 not there at all.

        diffusers scales what is added to the weights, and leaves DoRA's magnitudes as they are. Here they lie at s
        between |W| and m, so that 0 is the base model and 1 the LoRA.
        """
        if not self.names:
            return
        scales = [scale * weight for weight in self._weights]
        self._pipeline.set_adapters(self.names, scales)
        strengths = dict(zip(self.names, scales, strict=True))
        for module, name, trained in self._magnitudes:
            magnitude: Any = module.lora_magnitude_vector[name].weight
            norm = torch.linalg.norm(module.get_base_layer().weight.to(trained.dtype), dim=1)
            magnitude.data = torch.lerp(norm.to(trained.device), trained, strengths[name]).to(magnitude.device)
