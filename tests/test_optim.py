"""The optimizer, its learning rate, and its state on the way through a file."""

import json
import math

import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler
from safetensors.torch import load_file, save_file

from shared.errors import CheckpointError, ConfigError
from train.config import TrainConfig
from train.optim import make_optimizer, make_schedule, pack_state, unpack_state

SCHEDULES = [schedule.value for schedule in SchedulerType]
RULES = "1:4,0.5:8,0.125"


def config_of(**flags):
    if flags.get("lr_scheduler") == "piecewise_constant":
        flags["lr_step_rules"] = RULES
    return TrainConfig(**{"learning_rate": 3e-3, "lr_warmup_steps": 3, "lr_num_cycles": 2, "lr_power": 2.0, **flags})


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


def take_steps(optimizer, steps):
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        for number, parameter in enumerate(owned):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
        optimizer.step()


def rates(optimizer, schedule, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_diffusers(name):
    config = config_of(lr_scheduler=name)
    reference = torch.optim.SGD(parameters(), lr=3e-3)
    expected = get_scheduler(name, reference, RULES, num_warmup_steps=3, num_training_steps=12, num_cycles=2, power=2.0)
    optimizer = make_optimizer(config, parameters())
    assert rates(optimizer, make_schedule(config, optimizer, 12), 12) == rates(reference, expected, 12)


def test_learning_rates_are_the_formulas():
    """Independent of the library: warmup over 3 of 12 steps, then the curve over the other 9."""
    warmup = [3e-3 * step / 3 for step in range(3)]
    share = [step / 9 for step in range(9)]
    curves = {
        "constant": [3e-3] * 12,
        "constant_with_warmup": warmup + [3e-3] * 9,
        "linear": warmup + [3e-3 * (1 - part) for part in share],
        "cosine": warmup + [1.5e-3 * (1 + math.cos(math.pi * part)) for part in share],
        "cosine_with_restarts": warmup + [1.5e-3 * (1 + math.cos(math.pi * (2 * part % 1))) for part in share],
        "polynomial": warmup + [(3e-3 - 1e-7) * (1 - part) ** 2 + 1e-7 for part in share],
        "piecewise_constant": [3e-3] * 4 + [1.5e-3] * 4 + [0.375e-3] * 4,
    }
    assert sorted(curves) == sorted(SCHEDULES)
    for name, expected in curves.items():
        config = config_of(lr_scheduler=name)
        optimizer = make_optimizer(config, parameters())
        assert rates(optimizer, make_schedule(config, optimizer, 12), 12) == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize(
    ("flag", "flags", "said"),
    [
        ("lr_step_rules", {"lr_scheduler": "piecewise_constant"}, "piecewise_constant takes rules such as 1:500"),
        ("lr_step_rules", {"lr_step_rules": RULES}, "no other schedule does"),
        ("lr_step_rules", {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:x,2"}, "must be FACTOR:STEP"),
        ("lr_step_rules", {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:5"}, "and a last FACTOR"),
        ("adam_beta1", {"adam_beta1": 1.0}, "must be at least 0 and below 1"),
        ("adam_beta2", {"adam_beta2": -0.1}, "must be at least 0 and below 1"),
        ("adam_epsilon", {"adam_epsilon": math.nan}, "must not be negative"),
        ("prodigy_beta3", {"optimizer": "prodigy", "prodigy_beta3": 1.0}, "must be at least 0 and below 1"),
        ("learning_rate", {"optimizer": "prodigy", "learning_rate": 0.0}, "must be above 0 with --optimizer prodigy"),
        ("adam_epsilon", {"optimizer": "prodigy", "adam_epsilon": 0.0}, "must be above 0 with --optimizer prodigy"),
        ("use_8bit_adam", {"optimizer": "prodigy", "use_8bit_adam": True}, "leave it out with --optimizer prodigy"),
        *[
            (f"prodigy_{name}", {f"prodigy_{name}": value}, "is of --optimizer prodigy; this is adamw")
            for name, value in {"beta3": 0.0, "decouple": True, "use_bias_correction": True,
                                "safeguard_warmup": True}.items()
        ],
    ],
)  # fmt: skip
def test_flags_that_cannot_be_together_are_refused(flag, flags, said):
    with pytest.raises(ConfigError, match=rf"^--{flag}\b.*{said}"):
        TrainConfig(**flags)


@pytest.mark.parametrize(
    ("flags", "steps", "said"),
    [
        ({"lr_warmup_steps": 12}, 12, "--lr_warmup_steps 12: polynomial falls after it, and the run has 12 steps"),
        ({"learning_rate": 1e-7}, 12, "--learning_rate 1e-07; must be above 1e-07 with --lr_scheduler polynomial"),
    ],
)
def test_a_polynomial_that_cannot_fall_is_refused(flags, steps, said):
    config = TrainConfig(lr_scheduler="polynomial", **flags)
    with pytest.raises(ConfigError, match=said):
        make_schedule(config, make_optimizer(config, parameters()), steps)


@pytest.mark.parametrize(("scale_lr", "rate"), [(False, 3e-3), (True, 3e-3 * 8)])
def test_the_learning_rate_is_scaled_by_the_global_batch_when_asked(scale_lr, rate):
    config = config_of(scale_lr=scale_lr)
    optimizer = make_optimizer(config, parameters(), global_batch=8)
    assert make_schedule(config, optimizer, 12).get_last_lr() == [rate]


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_is_torchs_with_every_setting(name, kind):
    config = config_of(optimizer=name, adam_beta1=0.8, adam_beta2=0.7, adam_weight_decay=0.3, adam_epsilon=1e-3)
    own, expected = parameters(), parameters()
    take_steps(make_optimizer(config, own), range(4))
    take_steps(kind(expected, lr=3e-3, betas=(0.8, 0.7), weight_decay=0.3, eps=1e-3), range(4))
    assert all(torch.equal(one, other) for one, other in zip(own, expected, strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "adam"},
        {"optimizer": "adamw"},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "prodigy", "learning_rate": 1.0, "prodigy_beta3": 0.9, "prodigy_use_bias_correction": True},
    ],
    ids=lambda flags: "-".join([flags["optimizer"], *(name for name in flags if name.startswith("prodigy"))]),
)
def test_a_state_that_went_through_files_goes_on_bit_equal(tmp_path, flags):
    config = config_of(**flags)
    whole = parameters()
    optimizer = make_optimizer(config, whole)
    take_steps(optimizer, range(3))
    tensors, values = pack_state(optimizer)
    save_file(tensors, tmp_path / "state.safetensors")
    text = json.dumps(values, allow_nan=False)

    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    other = make_optimizer(config, resumed)
    unpack_state(other, load_file(tmp_path / "state.safetensors"), json.loads(text))
    assert {path: value.tolist() for path, value in pack_state(other)[0].items()} == {
        path: value.tolist() for path, value in tensors.items()
    }
    assert pack_state(other)[1] == values
    take_steps(optimizer, range(3, 6))
    take_steps(other, range(3, 6))
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    assert not torch.equal(whole[0], parameters()[0])


def test_an_empty_tensor_is_not_saved():
    """What a sharding process holds of a parameter that is another one's."""
    parameter = torch.nn.Parameter(torch.ones(0, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(0, 3)
    optimizer.step()
    with pytest.raises(CheckpointError, match="optimizer, exp_avg of parameter 0: is empty; nothing was written"):
        pack_state(optimizer)
