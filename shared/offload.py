"""Weights that wait on the host and come to the device a block or a layer at a time.

What only CUDA can run, streams and pinned memory, was not run where this was written: the tests run the same hooks with
a CPU in the GPU's place.
"""

from __future__ import annotations

from typing import Any

import torch


def offload_in_groups(module: Any, device: torch.device, kind: str) -> None:
    """diffusers' group offload: one block or layer on the device, and the next on its way beside the computation.

    Args:
        kind: `block_level`, for models whose lists of blocks diffusers knows, or `leaf_level`.
    """
    from diffusers.hooks import apply_group_offloading

    streamed = device.type == "cuda"
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        use_stream=streamed,
        record_stream=streamed,
    )
