"""The optimizer over the LoRA, its learning rate, and its state as tensors and plain values."""

from __future__ import annotations

from typing import Any

import torch

from train.config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Adam or AdamW over the LoRA's parameters."""
    optimizer_type = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return optimizer_type(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """The learning rate's schedule, to be stepped once an optimizer step whatever the number of processes."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def pack_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and as values that JSON holds exactly."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}/{name}"] = value.detach().cpu().contiguous()
            else:
                values.setdefault(str(number), {})[name] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


def unpack_state(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], packed: dict[str, Any]) -> None:
    """Give an optimizer the state that `pack_state` made of another one of the same kind."""
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in packed["values"].items()}
    for path, tensor in tensors.items():
        number, _, name = path.partition("/")
        state.setdefault(int(number), {})[name] = tensor
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in packed["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
