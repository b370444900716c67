"""What makes a large model fit: each lever, which of them go together, and a transformer set up with them.

    --gradient_checkpointing   a block keeps its inputs and is computed again                      diffusers' own, or
    --ff_chunks                ... in stages, token by token work in chunks                        train/blocks.py
    --offload_activations      ... and its inputs wait on the host                                 train/host.py
    --stream_blocks            frozen blocks live on the host, N of them on the device             train/residency.py
    --base_precision           frozen weights in 8 or 4 bits                                       train/quantise.py
    --use_8bit_adam            Adam's moments in 8 bits                                            train/optim.py
    --optimizer_offload        Adam, its moments and the gradients on the host                     train/optim.py
    --compile                  blocks compiled                                                     here
docs/memory.md says what each saves and costs.
"""

from __future__ import annotations

from typing import Any

import torch

from shared.errors import ConfigError
from train.blocks import StagedBlock
from train.config import TrainConfig
from train.host import Mover, Shelf
from train.quantise import check_precision
from train.residency import Residency

COMPILED_SHAPES = 64  # buckets that a block may be compiled for
CHUNKED = ("ff.net.0.proj", "ff.net.2")  # linear layers that see the tokens chunk by chunk


def check_levers(config: TrainConfig, device: torch.device, *, processes: int, precision: str) -> None:
    """Refuse levers that do not go with each other, or with how the run is made.

    Args:
        device: that the blocks are computed on.
        processes: of the run.
        precision: `no`, `fp16` or `bf16`.

    Raises:
        ConfigError: names both, and what to leave out; or a library that is not installed.
    """
    check_precision(config.base_precision, device)
    staged = [name for name in ("stream_blocks", "offload_activations", "ff_chunks") if _is_on(config, name)]
    if staged and not config.gradient_checkpointing:
        raise ConfigError(
            f"--{staged[0]}: computes blocks again in the backward pass; leave out --no_gradient_checkpointing"
        )
    if config.compile and staged:
        raise ConfigError(f"--compile: does not go with --{staged[0]}, which takes blocks apart; leave one of them out")
    if config.compile and config.base_precision not in ("native", "int8"):
        raise ConfigError(f"--compile: does not go with --base_precision {config.base_precision}; give native or int8")
    for name in ("lora_dropout", "use_dora"):
        if config.compile and getattr(config, name):
            raise ConfigError(
                f"--compile: does not go with --{name}, which torch cannot compile; leave one of them out"
            )
    chunked = [layer for layer in CHUNKED if any(f".{layer}".endswith(f".{target}") for target in config.targets)]
    if config.ff_chunks > 1 and config.lora_dropout and chunked:
        raise ConfigError(
            f"--ff_chunks {config.ff_chunks}: does not go with --lora_dropout {config.lora_dropout:g} on {chunked[0]}, "
            "which would drop the same in each chunk; leave one of them out"
        )
    if config.optimizer_offload and processes > 1:
        raise ConfigError(
            f"--optimizer_offload: takes gradients away before {processes} processes have averaged them; "
            "leave it out, or run one process"
        )
    if config.optimizer_offload and precision == "fp16":
        raise ConfigError(
            "--optimizer_offload: float16's loss scaling needs the gradients on the device; give --mixed_precision bf16"
        )


def _is_on(config: TrainConfig, name: str) -> bool:
    return bool(getattr(config, name)) if name != "ff_chunks" else config.ff_chunks > 1


def is_staged(config: TrainConfig) -> bool:
    """Whether the blocks are computed in stages by train/blocks.py."""
    return any(_is_on(config, name) for name in ("stream_blocks", "offload_activations", "ff_chunks"))


def prepare(transformer: Any, config: TrainConfig, device: torch.device) -> None:
    """Set up a transformer, in place, that has its LoRA and is quantised; it may hold tensors without storage.

    What stays on the device is moved there by the caller; streamed blocks' modules hold no weights at rest.

    Raises:
        ConfigError: a dropout, which blocks computed in stages would draw twice.
    """
    _round_positions(transformer)
    if config.compile:
        # one code for all blocks: compiled once for each shape, and again without gradients
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * COMPILED_SHAPES)
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False)
    if not is_staged(config):
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        return
    blocks = transformer.transformer_blocks
    for name, module in blocks.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise ConfigError(f"transformer_blocks.{name}: dropout {module.p:g}; blocks computed in stages have none")
        if hasattr(module, "lora_A"):
            # autocast lowers the LoRA's input as it lowers the base's: a float32 copy between is the same number
            module.cast_input_dtype_enabled = False
    mover = Mover(device)
    residency = Residency(blocks, mover, config.stream_blocks) if config.stream_blocks else None
    shelf = Shelf(mover, ahead=config.stream_blocks != 1) if config.offload_activations else None
    for number, block in enumerate(blocks):
        block.forward = StagedBlock(block, number, chunks=config.ff_chunks, residency=residency, shelf=shelf)


def _round_positions(transformer: Any) -> None:
    """Hold the table of positions, float64, in the dtype that the model rounds it to at each use."""
    embed = transformer.patch_embed
    if getattr(embed, "pos_embedding", None) is not None:
        embed.pos_embedding.data = embed.pos_embedding.data.to(embed.proj.weight.dtype)
