"""The optimizer over the LoRA, its learning rate, and its state as tensors and plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from shared.errors import CheckpointError, ConfigError
from train.config import TrainConfig
from train.host import Mover, has_no_storage, host_copy, on_host
from train.prodigy import Counted, make_prodigy

ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SMALLEST_8BIT = 4096  # elements: bitsandbytes leaves smaller tensors in float32
BLOCK_8BIT = 256  # elements that share a scale
POLYNOMIAL_END = 1e-7  # diffusers' learning rate after the last step


def make_optimizer(
    config: TrainConfig, parameters: list[torch.nn.Parameter], global_batch: int = 1
) -> torch.optim.Optimizer:
    """Adam, AdamW or Prodigy over the LoRA's parameters, or over their twins on the host.

    Args:
        global_batch: samples of an optimizer step, which `--scale_lr` multiplies the learning rate by.

    Raises:
        ConfigError: bitsandbytes or prodigyopt is not installed.
    """
    offload = Offload(parameters) if config.optimizer_offload else None
    owned = offload.twins if offload else parameters
    settings: dict[str, Any] = {
        "lr": config.learning_rate * (global_batch if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    optimizer: torch.optim.Optimizer
    if config.optimizer == "prodigy":
        optimizer = make_prodigy(config, owned, settings)
    elif not config.use_8bit_adam:
        # it can be told by the device to leave a step out
        optimizer = ADAMS[config.optimizer](owned, **settings, fused=True)
    elif has_no_storage(owned[0]):
        optimizer = Counted8bit(owned, settings)
    else:
        optimizer = _adams_8bit()[config.optimizer](owned, **settings, min_8bit_size=SMALLEST_8BIT)
    if offload:
        offload.serve(optimizer)
    return optimizer


def _adams_8bit() -> dict[str, Any]:
    try:
        from bitsandbytes.optim import Adam8bit, AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "--use_8bit_adam: bitsandbytes is not installed; pip install -c constraints.txt '.[quant]'"
        ) from error
    return {"adam": Adam8bit, "adamw": AdamW8bit}


class Counted8bit(Counted):
    """The bytes that bitsandbytes' 8-bit Adam holds."""

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        if parameter.numel() < SMALLEST_8BIT:
            return {name: torch.empty_like(parameter) for name in ("state1", "state2")}
        scales = -(-parameter.numel() // BLOCK_8BIT)
        state = {name: torch.empty_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")}
        return state | {name: parameter.new_empty(scales) for name in ("absmax1", "absmax2")}


class Offload:
    """Twins of the trainable parameters on the host, which an optimizer steps there.

    A gradient goes to the host as soon as it is gathered, and after a step the twins are copied to the device. It is
    for one process: where several average their gradients, they would look for them on the device.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self.twins = [torch.nn.Parameter(host_copy(parameter.detach(), "optimizer")) for parameter in parameters]
        self._mover: Mover | None = None
        self._arriving: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        for parameter, twin in zip(parameters, self.twins, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda found, twin=twin: self._send(found, twin))

    def serve(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the parameters as an optimizer over the twins leaves them."""
        optimizer.offload = self  # type: ignore[attr-defined]
        optimizer.register_step_post_hook(lambda *_: self._copy(self.twins, self._parameters))

    def take_over(self) -> None:
        """Set the twins as the parameters are, after a checkpoint has set those."""
        self._copy(self._parameters, self.twins)

    def gather(self) -> None:
        """Wait for the gradients that are on their way, and add up those of each twin."""
        if self._mover is not None:
            self._mover.settle()
        for twin, grad in self._arriving:
            twin.grad = grad if twin.grad is None else twin.grad.add_(grad)
        self._arriving.clear()

    def _send(self, parameter: torch.Tensor, twin: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        if self._mover is None:
            self._mover = Mover(parameter.device)
        (grad,), _ = self._mover.leave([parameter.grad], "gradients")
        self._arriving.append((twin, grad))
        parameter.grad = None

    @staticmethod
    @torch.no_grad()
    def _copy(sources: list[torch.nn.Parameter], targets: list[torch.nn.Parameter]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)


def gathered(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer steps, in a fixed order, with the gradients of a whole step."""
    offload: Offload | None = getattr(optimizer, "offload", None)
    if offload is not None:
        offload.gather()
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take_optimizer_step(optimizer: Any) -> None:
    """An optimizer's step; what it makes is the host's where its parameters are.

    Args:
        optimizer: or accelerate's wrapper of one.
    """
    if getattr(getattr(optimizer, "optimizer", optimizer), "offload", None) is None:
        optimizer.step()
        return
    with on_host("optimizer"):
        optimizer.step()


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """The learning rate's schedule, to be stepped once an optimizer step whatever the number of processes.

    Raises:
        ConfigError: polynomial has no steps to fall in, or nothing to fall from.
    """
    from diffusers.optimization import get_scheduler

    if config.lr_scheduler == "polynomial":
        if config.lr_warmup_steps >= max_steps:
            raise ConfigError(
                f"--lr_warmup_steps {config.lr_warmup_steps}: polynomial falls after it, and the run has {max_steps} "
                "steps; give fewer"
            )
        if optimizer.defaults["lr"] <= POLYNOMIAL_END:
            raise ConfigError(
                f"--learning_rate {config.learning_rate}; must be above {POLYNOMIAL_END:g} with --lr_scheduler "
                "polynomial, which ends there"
            )
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def pack_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and as values that JSON holds exactly.

    Raises:
        CheckpointError: a tensor is empty: this process holds a part of the state only.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        for name, value in _flat(entries):
            if isinstance(value, torch.Tensor):
                if not value.numel():
                    raise CheckpointError(f"optimizer, {name} of parameter {number}: is empty; nothing was written")
                # a copy: bitsandbytes' parameters share a table, which a file would not take twice
                tensors[f"{number}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                values.setdefault(str(number), {})[name] = value
    groups = [{name: value for name, value in group.items() if value != math.inf} for group in state["param_groups"]]
    return tensors, {"values": values, "groups": groups}


def _flat(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries with those of an entry in it named `outer/inner`: bitsandbytes puts what it quantised one level down."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", one) for inner, one in value.items())
        else:
            yield name, value


def unpack_state(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], packed: dict[str, Any]) -> None:
    """Give an optimizer, whose parameters are set, the state that `pack_state` made of another of the same kind.

    What is infinite is a setting, which JSON does not hold and the optimizer has of itself: Prodigy's growth_rate.
    """
    state: dict[int, dict[str, Any]] = {int(number): {} for number in packed["values"]}
    entries = [(f"{number}/{name}", value) for number, one in packed["values"].items() for name, value in one.items()]
    for path, value in (*tensors.items(), *entries):
        number, _, name = path.partition("/")
        outer, _, inner = name.rpartition("/")
        place = state.setdefault(int(number), {})
        (place.setdefault(outer, {}) if outer else place)[inner] = value
    groups = [
        {**own, **{key: tuple(value) if key == "betas" else value for key, value in group.items()}}
        for own, group in zip(optimizer.state_dict()["param_groups"], packed["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    offload: Offload | None = getattr(optimizer, "offload", None)
    if offload is not None:
        offload.take_over()
