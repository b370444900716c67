"""Prodigy: its flags reach it, its state survives a resume, and a step that does not stand leaves it as it was."""

import json
import shutil
import sys

import pytest
import torch
from prodigyopt import Prodigy
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.errors import CheckpointError, ConfigError
from tests.test_optim import parameters, take_steps
from tests.test_step import poison
from tests.training import column, facts_of, lora_of, train_here
from train.config import TrainConfig
from train.optim import make_optimizer, pack_state, take_optimizer_step, unpack_state
from train.prodigy import CountedProdigy

FLAGS = {
    "beta3": 0.5,
    "decouple": True,
    "use_bias_correction": True,
    "safeguard_warmup": True,
}
SETTINGS = {"optimizer": "Prodigy", "learning_rate": 0.5, "max_train_steps": 6}


def stepped(optimizer, owned, steps=50):
    """The parameters after steps towards 3: far too small ones at first, as Prodigy's estimate begins at 1e-6."""
    optimizer.param_groups[0]["lr"] = 0.5  # `safeguard_warmup` is about rates other than 1
    for _ in range(steps):
        for parameter in owned:
            parameter.grad = parameter.detach() - 3
        optimizer.step()
    assert optimizer.param_groups[0]["d"] > 5 * optimizer.param_groups[0]["d0"], "the estimate grows"
    return torch.cat([parameter.detach().flatten() for parameter in owned])


def ours(**flags):
    owned = parameters()
    config = TrainConfig(optimizer="prodigy", learning_rate=1.0, adam_weight_decay=0.3, **flags)
    return stepped(make_optimizer(config, owned), owned)


@pytest.mark.parametrize("names", [[], *([name] for name in FLAGS), list(FLAGS)], ids="-".join)
def test_it_is_prodigyopts_with_every_setting(names, capsys):
    chosen = {name: FLAGS[name] for name in names}
    owned = parameters()
    plain = {"decouple": False, "use_bias_correction": False, "safeguard_warmup": False}
    reference = Prodigy(owned, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3, **{**plain, **chosen})
    capsys.readouterr()
    found = ours(**{f"prodigy_{name}": value for name, value in chosen.items()})
    assert torch.equal(found, stepped(reference, owned))
    assert torch.equal(found, ours()) == (not chosen), "each flag changes the weights"
    assert capsys.readouterr().out == "", "on several ranks it would be said several times"


@pytest.mark.parametrize("flags", [{"adam_beta1": 0.5}, {"adam_beta2": 0.5}, {"adam_epsilon": 0.1}])
def test_it_shares_the_flags_of_adam(flags):
    assert not torch.equal(ours(**flags), ours())


def test_an_estimate_that_grows_goes_on_through_files_bit_equal(tmp_path):
    config = TrainConfig(optimizer="prodigy", learning_rate=1.0)
    whole = parameters()
    optimizer = make_optimizer(config, whole)
    stepped(optimizer, whole, 25)
    tensors, values = pack_state(optimizer)
    save_file(tensors, tmp_path / "state.safetensors")
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    other = make_optimizer(config, resumed)
    unpack_state(other, load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(values, allow_nan=False)))
    assert torch.equal(stepped(optimizer, whole, 25), stepped(other, resumed, 25))
    assert pack_state(other)[1] == pack_state(optimizer)[1]


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(cache, tmp_path):
    """Under a warm-up: its first step is at learning rate 0."""
    flags = {**SETTINGS, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "prodigy_safeguard_warmup": True}
    flags["checkpointing_steps"] = 2
    train_here(cache, tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("checkpoint-2", "checkpoint-4"):
        train_here(cache, tmp_path / "again", **flags, resume_from_checkpoint=tmp_path / "again" / name)
    assert facts_of(tmp_path / "again") == facts_of(tmp_path / "whole")
    assert lora_of(tmp_path / "again") == lora_of(tmp_path / "whole")


def test_going_on_with_another_setting_is_refused(cache, tmp_path):
    train_here(cache, tmp_path / "run", **SETTINGS)
    with pytest.raises(CheckpointError, match="prodigy_decouple was False and is now True"):
        train_here(cache, tmp_path / "run", **SETTINGS, prodigy_decouple=True, resume_from_checkpoint="latest")


def test_a_step_that_is_not_finite_changes_neither_weights_nor_estimate(cache, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    train_here(cache, tmp_path / "run", **SETTINGS)
    assert [step for step, skipped in enumerate(column(tmp_path / "run", "skipped")) if skipped] == [2]
    norms = column(tmp_path / "run", "lora_norm")
    assert norms[2] == norms[1]
    assert len(set(norms)) == 5
    assert all(loss > 0 for loss in column(tmp_path / "run", "loss") if loss is not None)


def test_it_steps_on_the_host_as_it_does_on_the_device(cache, tmp_path):
    for name, offload in (("device", False), ("host", True)):
        train_here(cache, tmp_path / name, **SETTINGS, optimizer_offload=offload)
    assert lora_of(tmp_path / "device") == lora_of(tmp_path / "host")


def test_without_prodigyopt_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ConfigError, match=r"^--optimizer prodigy: prodigyopt is not installed; pip .*\[optim\]"):
        ours()


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_the_bytes_of_fake_tensors_are_those_that_it_holds(beta1):
    config = TrainConfig(optimizer="prodigy", learning_rate=1.0, adam_beta1=beta1)
    owned = parameters()
    real = make_optimizer(config, owned)
    take_steps(real, range(1))
    held = sum(value.nbytes for state in real.state.values() for value in state.values() if torch.is_tensor(value))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [torch.nn.Parameter(torch.empty(parameter.shape)) for parameter in owned]
        counted = make_optimizer(config, fake)
        assert isinstance(counted, CountedProdigy)
        for parameter in fake:
            parameter.grad = torch.empty_like(parameter)
        take_optimizer_step(counted)
    assert sum(value.nbytes for state in counted.state.values() for value in state.values()) == held
