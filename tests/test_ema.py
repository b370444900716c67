"""The average of the LoRA over steps: by hand, as diffusers has it, in checkpoints, and out of the way."""

import shutil

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from shared.errors import CheckpointError
from shared.lora import FILE_NAME
from tests.training import facts_of, lora_of, train_here
from train.checkpoint import LAST_FILE, OPTIMIZER_FILE, STATE_FILE, list_checkpoints, read_state
from train.ema import Ema

STEPS = 6
SETTINGS = {"max_train_steps": STEPS, "checkpointing_steps": 1, "ema_decay": 0.25}  # reached at step 3: 3 / 12


@pytest.fixture(scope="module")
def averaged(cache, tmp_path_factory):
    """A run with an average, and a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    assert train_here(cache, folder, **SETTINGS) == 0
    return folder


def random_parameters(steps):
    """Two parameters and, for each step, what they become."""
    generator = torch.Generator().manual_seed(0)
    walk = [[torch.randn(3, 5, generator=generator), torch.randn(4, generator=generator)] for _ in range(steps + 1)]
    return [torch.nn.Parameter(value.clone()) for value in walk[0]], walk[1:]


@pytest.mark.parametrize("decay", [0.25, 0.9, 0.9999])
def test_the_average_is_diffusers(decay):
    parameters, walk = random_parameters(40)
    ours, theirs = Ema(parameters, decay), EMAModel(parameters, decay=decay)
    for step, values in enumerate(walk):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        ours.update(step, torch.tensor(True))
        theirs.step(parameters)
        for average, shadow in zip(ours.averages, theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, shadow, rtol=1e-6, atol=1e-6)


def test_the_run_saves_the_average_of_the_loras_of_its_steps(averaged):
    average: dict[str, torch.Tensor] = {}
    for step, folder in enumerate(list_checkpoints(averaged)):
        decay = min(0.25, (1 + step) / (10 + step)) if step else 0
        for name, value in load_file(folder / LAST_FILE).items():
            average[name] = value.double() if not step else decay * average[name] + (1 - decay) * value.double()
        found = load_file(folder / FILE_NAME)
        assert found.keys() == average.keys()
        for name, value in found.items():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    assert step == STEPS - 1
    assert lora_of(averaged) == lora_of(averaged / f"checkpoint-{STEPS}")
    assert lora_of(averaged) != (averaged / f"checkpoint-{STEPS}" / LAST_FILE).read_bytes()


def test_the_average_changes_nothing_of_the_training(cache, averaged, tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name != "ema_decay"}
    train_here(cache, tmp_path / "run", **settings)
    assert facts_of(tmp_path / "run") == facts_of(averaged)
    last = list_checkpoints(tmp_path / "run")[-1]
    assert lora_of(last) == (averaged / last.name / LAST_FILE).read_bytes()
    assert {path.name for path in last.iterdir()} == {FILE_NAME, OPTIMIZER_FILE, STATE_FILE}


def test_a_resumed_run_has_the_average_of_the_uninterrupted_one(cache, averaged, tmp_path):
    run = shutil.copytree(averaged, tmp_path / "run")
    for folder in list_checkpoints(run)[2:]:
        shutil.rmtree(folder)
    assert train_here(cache, run, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert facts_of(run) == facts_of(averaged)
    for folder in list_checkpoints(averaged):
        assert lora_of(run / folder.name) == lora_of(folder)
        assert (run / folder.name / LAST_FILE).read_bytes() == (folder / LAST_FILE).read_bytes()
    assert lora_of(run) == lora_of(averaged)


def test_what_is_applied_is_taken_back_to_the_last_bit():
    parameters, walk = random_parameters(3)
    ema = Ema(parameters, 0.9)
    for step, values in enumerate(walk):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        ema.update(step, torch.tensor(True))
    before, averages = [value.data.clone() for value in parameters], [value.clone() for value in ema.averages]
    storages = [value.data_ptr() for value in parameters]
    with ema.applied():
        assert all(map(torch.equal, parameters, averages))
        assert not any(map(torch.equal, parameters, before))
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, ema.averages, averages))
    assert [value.data_ptr() for value in parameters] == storages


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_the_weights_beside_the_average_are_part_of_the_checkpoint(averaged, tmp_path, harm):
    run = shutil.copytree(averaged, tmp_path / "run")
    path = run / f"checkpoint-{STEPS}" / LAST_FILE
    if harm == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"checkpoint-{STEPS}.*; resume from .*checkpoint-{STEPS - 1}$"):
        read_state(path.parent)
