"""Where a pipeline's weights are: on the device, on the host until they are needed, or dealt to several GPUs.

What only CUDA can run is here and in shared/offload.py, and was not run where this was written: copies, streams, pinned
memory, more GPUs than one. The tests run the same hooks with a CPU in the GPU's place, and compare the frames.
"""

from __future__ import annotations

from typing import Any

import torch

from infer.memory import Levers
from shared.errors import ConfigError
from shared.offload import offload_in_groups


def check_several(levers: Levers, device: str) -> None:
    """Refuse to split a model over fewer than two GPUs.

    Raises:
        ConfigError: as said.
    """
    count = torch.cuda.device_count() if device == "cuda" else 0
    if count < 2:
        raise ConfigError(f"--device_map {levers.device_map}: needs two GPUs or more, here are {count}; leave it out")


def place(pipeline: Any, levers: Levers, device: str) -> None:
    """Put the transformer and the VAE of a pipeline where `--offload` or `--device_map` says.

    Args:
        device: `cuda` or `cpu`; a process of several takes the GPU that infer/split.py chose for it.
    """
    if levers.device_map:
        devices = all_devices(device)
        split_over(pipeline.transformer, "transformer_blocks", devices)
        pipeline.vae.to(devices[0])
    elif levers.offload == "model":
        pipeline.enable_model_cpu_offload(device=own_device(device))
    elif levers.offload == "sequential":
        for part in (pipeline.transformer, pipeline.vae):
            _offload_layers(part, own_device(device))
    elif levers.offload == "group":
        offload_in_groups(pipeline.transformer, own_device(device), "block_level")
        pipeline.vae.to(own_device(device))
    else:
        pipeline.to(own_device(device))


def place_text_encoder(encoder: Any, levers: Levers, device: str) -> None:
    """Put T5, which is alone while it runs, where `--offload` or `--device_map` says."""
    if levers.device_map:
        split_over(encoder, "encoder.block", all_devices(device))
    elif levers.offload == "sequential":
        _offload_layers(encoder, own_device(device))
    elif levers.offload == "group":
        offload_in_groups(encoder, own_device(device), "leaf_level")  # T5's blocks are not where blocks are looked for
    else:
        encoder.to(own_device(device))


def own_device(device: str) -> torch.device:
    """This process's device."""
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def all_devices(device: str) -> list[torch.device]:
    """The GPUs; of a CPU, which has no second, the CPU twice."""
    if device != "cuda":
        return [torch.device(device)] * 2
    return [torch.device(device, number) for number in range(torch.cuda.device_count())]


def _offload_layers(module: Any, device: torch.device) -> None:
    """What a pipeline's `enable_sequential_cpu_offload` does: each layer comes for its own forward pass."""
    from accelerate import cpu_offload

    cpu_offload(module, device)


def split_over(module: Any, blocks: str, devices: list[torch.device]) -> None:
    """Deal a model's blocks to devices, neighbours together, equally by bytes; what is no block is on the first.

    Args:
        blocks: the name of the list of blocks.
    """
    from accelerate import dispatch_model

    listed = module.get_submodule(blocks)
    sizes = [_bytes_of(block) for block in listed]
    dealt = deal(sizes, _bytes_of(module) - sum(sizes), len(devices))
    places = {f"{blocks}.{number}": devices[place] for number, place in enumerate(dealt)}
    inner = blocks.rpartition(".")[0]
    for name, parent in (("", module), *([(inner, module.get_submodule(inner))] if inner else [])):
        for child, _ in (*parent.named_children(), *parent.named_parameters(recurse=False)):
            path = f"{name}.{child}" if name else child
            if path not in (blocks, inner):
                places[path] = devices[0]
    dispatch_model(module, places, main_device=devices[0], force_hooks=True)


def deal(sizes: list[int], head: int, count: int) -> list[int]:
    """Which of `count` devices each block goes to, in order: so that each holds about as many bytes.

    Args:
        sizes: bytes of each block.
        head: bytes that the first device holds beside.
    """
    total, before, dealt = head + sum(sizes), head, []
    for size in sizes:
        dealt.append(min(int(count * (before + size / 2) / total), count - 1))
        before += size
    return dealt


def _bytes_of(module: Any) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
