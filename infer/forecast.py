"""What inference will hold at its peak, counted before there is a GPU: the real modules on tensors without storage.

    text      T5 on one prompt, alone: it is freed before anything else is loaded
    denoise   the transformer on both halves of the guidance
    decode    the VAE on the whole clip, and the frames that leave the device

shared/ledger.py counts, under fake tensors. Weights that wait on the host are counted there; those of a block or a
layer that comes for its turn are copied to the device before its forward pass and dropped after it, and the next one's
with them where copies run ahead: what the hooks do that infer/placement.py sets. With `--device_map` the first device
is counted, which has the latents and the VAE beside its share.

Shapes: B batch, T latent frames, C latent channels, h and w height and width in latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infer.memory import Levers
from infer.pipelines import TextToVideo
from infer.placement import deal
from infer.quantise import quantise
from shared.geometry import Bucket
from shared.gpu_paths import gpu_paths
from shared.ledger import Ledger, make_fake
from shared.lora import TARGET_MODULES, add_lora
from shared.models import Checkpoint, Facts

PHASES = ("text", "denoise", "decode")
BOTH = 2  # halves of classifier-free guidance, in one batch
DEVICES = 2  # GPUs that `--device_map` is counted for


@dataclass(frozen=True)
class Work:
    """What is counted.

    Attributes:
        dtype, text_dtype: of transformer and VAE, and of T5.
        guided: with classifier-free guidance.
        rank: of a LoRA; 0: none.
        videos: that are made at once.
        encodes_text: by T5; else embeddings are there, and T5 is not loaded.
    """

    bucket: Bucket
    dtype: str
    text_dtype: str
    guided: bool = True
    rank: int = 0
    videos: int = 1
    encodes_text: bool = True


def forecast(checkpoint: Checkpoint, work: Work, levers: Levers) -> dict[str, int]:
    """The most bytes that the device holds in each of PHASES. Nothing is allocated, and no weights are read.

    fp8 is counted as int8 and quanto as torchao, whose weights are as many bytes but for scales.
    """
    configs = {part: json.dumps(checkpoint.config(part)) for part in ("transformer", "vae", "text_encoder")}
    peaks = {"text": 0}
    if work.encodes_text:
        peaks["text"] = _text(configs["text_encoder"], checkpoint.facts.max_text_seq_length, work.text_dtype,
                              levers.offload, levers.text_encoder_precision, levers.device_map is not None)  # fmt: skip
    idle, denoise = _denoise(checkpoint.facts, configs["transformer"], work, levers)
    vae, decode = _decode(configs["vae"], work, levers.offload, levers.vae_precision, levers.vae_tiling,
                          levers.vae_slicing)  # fmt: skip
    # an image is encoded before, after which model offload leaves the VAE where it is
    stays = levers.offload in ("none", "group") or (levers.offload == "model" and checkpoint.facts.image_to_video)
    peaks["denoise"] = denoise + (vae if stays else 0)
    peaks["decode"] = decode + (idle if levers.offload == "none" else 0)
    return peaks


@lru_cache
def _text(config: str, length: int, dtype: str, offload: str, precision: str, mapped: bool) -> int:
    """T5's peak on one prompt of `length` tokens."""
    from transformers import T5Config, T5EncoderModel

    with _counting(dtype) as (ledger, host):
        encoder = T5EncoderModel(T5Config(**json.loads(config))).eval()
        _quantise(encoder, precision)
        groups = {"sequential": _layers(encoder), "group": _layers(encoder)}.get(offload)
        _settle(encoder, groups, ahead=offload == "group", ledger=ledger, host=host)
        away = _away(encoder, "encoder.block") if mapped else 0
        ledger.start_anew()
        encoder(torch.zeros(1, length, dtype=torch.long))
        return ledger.peaks["device"].total - away


@lru_cache
def _denoise(facts: Facts, config: str, work: Work, levers: Levers) -> tuple[int, int]:
    """Bytes of the transformer that stay on the device when it is idle, and the peak of a step."""
    from diffusers import CogVideoXTransformer3DModel

    dtype = getattr(torch, work.dtype)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(json.loads(config))
    torch.nn.Module.to(transformer, dtype).requires_grad_(False).eval()  # diffusers' own warns where weights are cast
    if work.rank:
        add_lora(transformer, rank=work.rank, alpha=work.rank, target_modules=TARGET_MODULES, seed=0)
        transformer.requires_grad_(False).eval()
        for name, parameter in transformer.named_parameters():
            parameter.data = parameter.data.to(dtype) if "lora_" in name else parameter.data  # as diffusers loads it
    with _counting(work.dtype) as (ledger, host):
        make_fake(transformer)
        _quantise(transformer, levers.transformer_precision)
        cast = _lower(transformer) if levers.layerwise_casting else []
        groups = {"sequential": _layers(transformer), "group": list(transformer.transformer_blocks)}.get(levers.offload)
        _settle(transformer, groups, ahead=levers.offload == "group", ledger=ledger, host=host)
        for layer in cast:
            _Cast(layer, dtype)
        away = _away(transformer, "transformer_blocks") if levers.device_map else 0
        idle = ledger.held("device")
        given = _inputs(facts, work)
        ledger.start_anew()
        transformer(**given, return_dict=False)
        return idle - away, ledger.peaks["device"].total - away


def _inputs(facts: Facts, work: Work) -> dict[str, Any]:
    """What the pipeline gives to the transformer at a step."""
    frames, height, width = work.bucket.latent_shape
    frames += -frames % (facts.patch_size_t or 1)
    dtype, batch = getattr(torch, work.dtype), work.videos * (BOTH if work.guided else 1)
    given: dict[str, Any] = {
        "hidden_states": torch.zeros(batch, frames, facts.in_channels, height, width, dtype=dtype),
        "encoder_hidden_states": torch.zeros(batch, facts.max_text_seq_length, facts.text_embed_dim, dtype=dtype),
        "timestep": torch.zeros(batch, dtype=torch.long),
    }
    if facts.rotary:
        tokens = frames // (facts.patch_size_t or 1) * height * width // facts.patch_size**2
        given["image_rotary_emb"] = tuple(torch.zeros(tokens, facts.attention_head_dim) for _ in range(2))
    if facts.ofs_embed_dim is not None:
        given["ofs"] = torch.zeros(1, dtype=dtype)
    return given


@lru_cache
def _decode(config: str, work: Work, offload: str, precision: str, tiling: bool, slicing: bool) -> tuple[int, int]:
    """Bytes of the VAE's weights, and the peak of decoding clips and making frames of them."""
    from diffusers import AutoencoderKLCogVideoX

    with _counting(work.dtype) as (ledger, host):
        vae = AutoencoderKLCogVideoX.from_config(json.loads(config)).requires_grad_(False).eval()
        _quantise(vae, precision)
        _settle(vae, _layers(vae) if offload == "sequential" else None, ahead=False, ledger=ledger, host=host)
        if tiling:
            vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
        weights = ledger.held("device")
        pipeline = TextToVideo(tokenizer=None, text_encoder=None, vae=vae, transformer=None, scheduler=None)
        frames, height, width = work.bucket.latent_shape
        latents = torch.zeros(
            work.videos, frames, vae.config.latent_channels, height, width, dtype=getattr(torch, work.dtype)
        )
        ledger.start_anew()
        video = pipeline.decode_latents(latents)
        pipeline.video_processor.postprocess_video(video, output_type="pt")
        return weights, ledger.peaks["device"].total


def _quantise(module: Any, precision: str) -> None:
    quantise(module, "native" if precision == "native" else "int8", "torchao")


@contextmanager
def _counting(dtype: str) -> Iterator[tuple[Ledger, list[str]]]:
    """Within: tensors have no storage, are counted, and come into being in `dtype`.

    Yields:
        The ledger, and a list: while it is not empty, what is made is the host's.
    """
    host: list[str] = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        ledger = Ledger(lambda: host[-1] if host else None)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), FakeTensorMode(), ledger, gpu_paths():
            yield ledger, host
    finally:
        torch.set_default_dtype(before)


def _layers(module: Any) -> list[Any]:
    """The modules that hold parameters themselves, in the order of their names."""
    return [one for one in module.modules() if next(one.parameters(recurse=False), None) is not None]


def _settle(module: Any, groups: list[Any] | None, *, ahead: bool, ledger: Ledger, host: list[str]) -> None:
    """Count a module's weights where they are at rest: on the device, or those of `groups` on the host.

    Args:
        ahead: a group is fetched while the one before it is computed.
    """
    waiting = [_Waiting(group, host) for group in groups or ()]
    for place, one in enumerate(waiting):
        following = waiting[place + 1] if ahead and place + 1 < len(waiting) else None
        one.module.register_forward_pre_hook(lambda *_, one=one, following=following: _come(one, following))
        one.module.register_forward_hook(lambda *_, one=one: one.leave())
    ledger.label([*module.parameters(), *module.buffers()], "weights")


def _come(one: _Waiting, following: _Waiting | None) -> None:
    one.come()
    if following is not None:
        following.come()


class _Waiting:
    """A module whose weights wait on the host: of a layer its own, of a block all of them."""

    def __init__(self, module: Any, host: list[str]) -> None:
        self.module = module
        self._held: list[tuple[Any, str, Any]] = []
        self._is_here = False
        is_layer = next(module.parameters(recurse=False), None) is not None
        for owner in [module] if is_layer else list(module.modules()):
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    self._held.append((owner, name, self._on_host(parameter, host)))
        self.leave()

    @staticmethod
    def _on_host(parameter: Any, host: list[str]) -> Any:
        host.append("weights")
        try:
            return _frozen(parameter.detach().clone())
        finally:
            host.pop()

    def come(self) -> None:
        """Copy the weights to the device."""
        if not self._is_here:
            for owner, name, waiting in self._held:
                owner._parameters[name] = _frozen(waiting.detach().clone())
        self._is_here = True

    def leave(self) -> None:
        """Drop the device's copies."""
        for owner, name, waiting in self._held:
            owner._parameters[name] = waiting
        self._is_here = False


def _lower(transformer: Any) -> list[Any]:
    """The layers that layerwise casting takes, their parameters in float8 from here on."""
    skipped = (*transformer._skip_layerwise_casting_patterns, "lora_")
    layers = [
        layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and not any(word in name for word in skipped)
    ]
    for layer in layers:
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = _frozen(parameter.to(torch.float8_e4m3fn))
    return layers


class _Cast:
    """A layer whose float8 weights are cast for its forward pass."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype
        self._resting: dict[str, Any] = {}
        layer.register_forward_pre_hook(lambda *_: self._raise())
        layer.register_forward_hook(lambda *_: self._rest(), prepend=True)  # before the layer leaves the device

    def _raise(self) -> None:
        self._resting = {name: one for name, one in self._layer._parameters.items() if one is not None}
        for name, one in self._resting.items():
            self._layer._parameters[name] = _frozen(one.to(self._dtype))

    def _rest(self) -> None:
        self._layer._parameters.update(self._resting)
        self._resting = {}


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _away(module: Any, blocks: str) -> int:
    """Bytes of the blocks that another device than the first one holds."""
    sizes = [sum(one.nbytes for one in block.parameters()) for block in module.get_submodule(blocks)]
    head = sum(one.nbytes for one in module.parameters()) - sum(sizes)
    return sum(size for size, place in zip(sizes, deal(sizes, head, DEVICES), strict=True) if place)
