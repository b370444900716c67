"""What makes inference small: each lever, the presets, which of them go together, and a pipeline set up with them.

    --vae_tiling, --vae_slicing     frames decoded tile by tile, videos one by one          diffusers' own
    --transformer_precision, ...    weights in 8 bits, made whole for one product           infer/quantise.py
    --layerwise_casting             the transformer's weights at rest in float8             diffusers' own
    --compile                       blocks compiled                                         here
    --offload, --device_map         where weights are                                       infer/placement.py
docs/infer_memory.md says what each saves and costs. T5 is always run first and freed. Loads no torch when imported.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError
from shared.float8 import check_float8

if TYPE_CHECKING:
    from infer.config import InferConfig
    from infer.recipe import Recipe

PARTS = ("transformer", "text_encoder", "vae")
LIBRARIES = {"torchao": "torchao", "quanto": "optimum.quanto"}


@dataclass(frozen=True)
class Levers:
    """The levers of a run, resolved. The defaults are no lever at all.

    Attributes:
        offload: where weights are while they are not computed with: `none`, on the device all the time.
        transformer_precision, text_encoder_precision, vae_precision: native, int8 or fp8.
        quantiser: the library that quantises; None: nothing is quantised.
    """

    vae_tiling: bool = False
    vae_slicing: bool = False
    offload: str = "none"
    transformer_precision: str = "native"
    text_encoder_precision: str = "native"
    vae_precision: str = "native"
    quantiser: str | None = None
    layerwise_casting: bool = False
    compile: bool = False
    device_map: str | None = None

    def precision(self, part: str) -> str:
        """The precision of `transformer`, `text_encoder` or `vae`."""
        return str(getattr(self, f"{part}_precision"))

    def changing_numbers(self) -> dict[str, Any]:
        """What a recipe says of them: those that change frames, but for the tiles, which it tells by themselves."""
        kept = {"vae_tiling", "vae_slicing", "offload", "device_map"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in kept}


_TILED: dict[str, Any] = {"vae_tiling": True, "vae_slicing": True}
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"offload": "model", "vae_slicing": True},
    "balanced": {"offload": "model", **_TILED},
    "low": {"offload": "model", **_TILED, "transformer_precision": "int8", "text_encoder_precision": "int8"},
    "lowest": {"offload": "group", **_TILED},
}


def resolve_levers(config: InferConfig, device: str, *, processes: int = 1, recipe: Recipe | None = None) -> Levers:
    """The levers of a run on this machine.

    Args:
        device: `cuda` or `cpu`; without a preset the first is `balanced`, the second no lever at all.
        processes: that the prompts are dealt to.
        recipe: whose frames are to be made again: what changes them is as it says.

    Raises:
        ConfigError: levers that do not go together or that the device does not have, or a library that is missing.
    """
    levers = combine(config, device)
    if recipe is not None:
        told = {
            name: value
            for name, value in recipe.levers.items()
            if config.cache is None or name != "text_encoder_precision"
        }
        levers = replace(levers, vae_tiling=recipe.vae_tiling, **told)
        _check_together(levers)
    _check_device(levers, device, processes)
    return levers


def combine(config: InferConfig, device: str) -> Levers:
    """The preset's levers, and over them what was asked for by its own flag, on any machine.

    Raises:
        ConfigError: levers that do not go together, or a library that is missing.
    """
    levers = dict(PRESETS[config.preset or ("balanced" if device == "cuda" else "quality")])
    if device == "cpu" or config.device_map:  # a CPU's memory is the host's; a map says where each weight is
        levers["offload"] = "none"
    if config.cache is not None:
        levers.pop("text_encoder_precision", None)  # T5 is not loaded
    if config.layerwise_casting:
        levers.pop("transformer_precision", None)
    for name in ("vae_tiling", "vae_slicing"):
        if (asked := getattr(config, name)) is not None:
            levers[name] = asked == "on"
    for name in ("offload", *(f"{part}_precision" for part in PARTS)):
        if (asked := getattr(config, name)) is not None:
            levers[name] = asked
    _check_asked(config)
    quantised = any(levers.get(f"{part}_precision", "native") != "native" for part in PARTS)
    if config.quantiser and not quantised:
        raise ConfigError(f"--quantiser {config.quantiser}: nothing is quantised; give --transformer_precision int8")
    found = Levers(
        **levers,
        quantiser=(config.quantiser or "torchao") if quantised else None,
        layerwise_casting=config.layerwise_casting,
        compile=config.compile,
        device_map=config.device_map,
    )
    _check_together(found)
    if found.quantiser and not _is_installed(LIBRARIES[found.quantiser]):
        raise ConfigError(
            f"--quantiser {found.quantiser}: {LIBRARIES[found.quantiser]} is not installed; "
            "pip install -c constraints.txt '.[quant]'"
        )
    return found


def _check_asked(config: InferConfig) -> None:
    """Refuse flags that contradict each other, or would do nothing."""
    if config.device_map and config.offload not in (None, "none"):
        raise ConfigError(
            f"--device_map {config.device_map}: keeps all weights on the GPUs, and --offload {config.offload} moves "
            "them to the host; leave one of them out"
        )
    if config.layerwise_casting and config.transformer_precision not in (None, "native"):
        raise ConfigError(
            f"--layerwise_casting: does not go with --transformer_precision {config.transformer_precision}, whose "
            "weights are in 8 bits already; leave one of them out"
        )
    if config.cache is not None and config.text_encoder_precision is not None:
        raise ConfigError(
            f"--text_encoder_precision {config.text_encoder_precision}: with --cache T5 is not loaded; leave one of "
            "them out"
        )


def _check_together(levers: Levers) -> None:
    """Refuse resolved levers that do not go together, whether a flag or the preset asked for them."""
    if levers.compile:
        others = [f"--offload {levers.offload}"] if levers.offload in ("sequential", "group") else []
        others += ["--layerwise_casting"] if levers.layerwise_casting else []
        others += [f"--device_map {levers.device_map}"] if levers.device_map else []
        others += ["--quantiser quanto"] if levers.quantiser == "quanto" else []
        if others:
            raise ConfigError(
                f"--compile: does not go with {others[0]}, which changes blocks as they run; leave one out"
            )
    if levers.offload in ("sequential", "group") and levers.quantiser == "quanto":
        raise ConfigError(
            f"--offload {levers.offload}: does not go with --quantiser quanto, whose weights do not move one by one; "
            "give --offload model, or torchao"
        )


def _check_device(levers: Levers, device: str, processes: int) -> None:
    """Refuse what the machine does not have."""
    if levers.offload != "none" and device == "cpu":
        raise ConfigError(
            f"--offload {levers.offload}: there is no GPU here to keep weights away from; leave it out, or give none"
        )
    if levers.device_map and processes > 1:
        raise ConfigError(
            f"--device_map {levers.device_map}: {processes} processes would each take all GPUs; run one process"
        )
    for part in PARTS:
        if levers.precision(part) == "fp8":
            check_float8(f"--{part}_precision fp8", device)
    if levers.device_map:
        from infer.placement import check_several  # late, as all that asks a GPU

        check_several(levers, device)


def _is_installed(library: str) -> bool:
    package = library.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(library) is not None


def install(pipeline: Any, levers: Levers, device: str) -> None:
    """Set up a pipeline that has its LoRAs: what is quantised first, where weights are last.

    Args:
        device: `cuda` or `cpu`.

    Raises:
        ConfigError: a DoRA, which reads the whole weights beside it, and levers that take these away.
    """
    _check_dora(pipeline.transformer, levers)
    from infer.placement import place
    from infer.quantise import cast_layerwise, quantise

    for part in ("transformer", "vae"):
        quantise(getattr(pipeline, part), levers.precision(part), levers.quantiser)
    if levers.layerwise_casting:
        cast_layerwise(pipeline.transformer)
    if levers.vae_tiling:
        pipeline.vae.enable_tiling()
    if levers.vae_slicing:
        pipeline.vae.enable_slicing()
    if levers.compile:
        for block in pipeline.transformer.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False)
    place(pipeline, levers, device)


def _check_dora(transformer: Any, levers: Levers) -> None:
    flag = None
    if levers.transformer_precision != "native":
        flag = f"--transformer_precision {levers.transformer_precision}"
    elif levers.layerwise_casting:
        flag = "--layerwise_casting"
    elif levers.offload in ("sequential", "group"):
        flag = f"--offload {levers.offload}"
    if flag and any(len(getattr(module, "lora_magnitude_vector", ())) for module in transformer.modules()):
        raise ConfigError(f"{flag}: the LoRA is a DoRA, which reads the whole weights beside it; leave the flag out")
