"""What a run does to the LoRA, and what it says of itself."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import ConfigError
from shared.lora import TARGET_MODULES, add_lora, read_metadata
from shared.models import load_transformer, open_checkpoint
from shared.seeds import seed_for
from tests.training import column, lora_of, rows_of, train_here
from train import loop
from train.checkpoint import list_checkpoints
from train.config import TrainConfig
from train.data import DrawSettings, Samples
from train.metrics import Metrics
from train.objective import Batch, alphas_cumprod, batch_loss
from train.reading import LatentDataset, collate
from train.sampler import MISSING, Sampler


@pytest.fixture
def run(monkeypatch):
    """A list that will hold the run that `train_here` opens."""
    opened, open_run = [], loop.open_run

    def keep(*args):
        opened.append(open_run(*args))
        return opened[-1]

    monkeypatch.setattr(loop, "open_run", keep)
    return opened


class World:
    """The pieces of a run, put together without the loop: an independent reference for its losses."""

    def __init__(self, cache, model):
        dataset = open_dataset(Cache(str(cache)), "squares")
        self.checkpoint = open_checkpoint(str(model), revision=None, variant=None, cache_dir=None, weights=())
        self.samples = Samples(dataset)
        self.draws = DrawSettings(42, 2, stratified=True, random_flip=0.5, caption_dropout=0.0)
        self.reader = LatentDataset(dataset, self.checkpoint.facts, self.draws)
        self.order = Sampler(self.samples.buckets, 2, dataset.digest, 42)
        self.schedule = alphas_cumprod(self.checkpoint.config("scheduler"))
        self.transformer = load_transformer(self.checkpoint, torch.float32)

    def rows(self, step):
        batch = self.order.batch(step)
        return [
            self.reader[self.samples.request(int(number), step, place, 1.0, self.draws)]
            for place, number in enumerate(batch)
            if number != MISSING
        ]

    def losses(self, rows):
        batch = collate(rows)
        assert isinstance(batch, Batch)
        return batch_loss(self.transformer, batch, self.checkpoint.facts, self.schedule, torch.float32)


@pytest.fixture
def world(cache, tiny_2b):
    return World(cache, tiny_2b)


# --- what a step does


def test_every_b_matrix_moves_and_no_base_weight_does(cache, tiny_2b, tmp_path, run):
    assert train_here(cache, tmp_path / "run", max_train_steps=2, gradient_checkpointing=True) == 0
    transformer = run[0].state.transformer
    assert transformer.is_gradient_checkpointing
    base = load_file(tiny_2b / "transformer" / "diffusion_pytorch_model.safetensors")
    seen = {"lora_A": 0, "lora_B": 0, "base": 0}
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            kind = "lora_A" if "lora_A" in name else "lora_B"
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert parameter.abs().sum() > 0, name
        else:
            kind = "base"
            assert not parameter.requires_grad
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
        seen[kind] += 1
    assert seen == {"lora_A": 8, "lora_B": 8, "base": len(base)}  # two blocks of four projections


def test_gradient_checkpointing_changes_no_number(cache, tmp_path):
    for name, checkpointing in (("with", True), ("without", False)):
        train_here(cache, tmp_path / name, max_train_steps=3, gradient_checkpointing=checkpointing)
    assert column(tmp_path / "with", "loss") == column(tmp_path / "without", "loss")
    assert lora_of(tmp_path / "with") == lora_of(tmp_path / "without")


def test_the_base_is_held_in_the_asked_precision_and_the_lora_in_float32(cache, tmp_path, run):
    train_here(cache, tmp_path / "run", max_train_steps=2, mixed_precision="bf16")
    parameters = dict(run[0].state.transformer.named_parameters())
    assert {value.dtype for name, value in parameters.items() if "lora_" in name} == {torch.float32}
    assert {value.dtype for name, value in parameters.items() if "lora_" not in name} == {torch.bfloat16}
    assert all(0.1 < loss < 10 for loss in column(tmp_path / "run", "loss"))
    _, facts = read_metadata(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert facts is not None
    assert facts.dtype == "bfloat16"


def test_the_gradient_is_that_of_the_mean_over_filled_places(cache, tmp_path, world):
    """At learning rate 0, over an epoch with short batches; the norm is told as it was before clipping."""
    train_here(cache, tmp_path / "run", max_train_steps=4, train_batch_size=2, max_grad_norm=1e-4, learning_rate=0)
    add_lora(world.transformer, rank=4, alpha=2.0, target_modules=TARGET_MODULES, seed=seed_for(42, "lora"))
    for step, told in enumerate(column(tmp_path / "run", "grad_norm")):
        world.transformer.zero_grad()
        world.losses(world.rows(step)).mean().backward()
        gradients = [parameter.grad for parameter in world.transformer.parameters() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])).item()
        assert norm > 1e-3
        assert told == pytest.approx(norm, rel=1e-4)


def test_min_snr_weighs_the_gradient_and_not_the_loss_that_is_told(cache, tmp_path, world):
    settings = {"max_train_steps": 3, "train_batch_size": 2, "learning_rate": 0}
    told = {"loss_weighting": "min_snr", "min_snr_gamma": 3, "min_snr_floor": 0.1}
    train_here(cache, tmp_path / "plain", **settings)
    train_here(cache, tmp_path / "weighted", **settings, **told)
    assert column(tmp_path / "weighted", "loss") == column(tmp_path / "plain", "loss")
    add_lora(world.transformer, rank=4, alpha=2.0, target_modules=TARGET_MODULES, seed=seed_for(42, "lora"))
    for step, norm in enumerate(column(tmp_path / "weighted", "grad_norm")):
        world.transformer.zero_grad()
        rows = world.rows(step)
        batch = collate(rows)
        assert isinstance(batch, Batch)
        abar = world.schedule[batch.timesteps]
        snr = abar / (1 - abar)
        weights = (snr.clamp(max=3) / (snr + 1)).clamp(min=0.1)
        (world.losses(rows) * weights).mean().backward()
        gradients = [parameter.grad for parameter in world.transformer.parameters() if parameter.grad is not None]
        expected = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])).item()
        assert norm == pytest.approx(expected, rel=1e-4)
        assert norm != pytest.approx(column(tmp_path / "plain", "grad_norm")[step], rel=0.01)


# --- batches


def test_the_loss_of_two_samples_is_the_mean_of_their_single_losses(world):
    generator = torch.Generator().manual_seed(0)
    add_lora(world.transformer, rank=4, alpha=2.0, target_modules=TARGET_MODULES, seed=0)
    with torch.no_grad():
        for name, parameter in world.transformer.named_parameters():
            if "lora_B" in name:  # alive, so that the LoRA takes part
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for step in range(4):
        rows = world.rows(step)
        together = world.losses(rows).mean()
        alone = torch.stack([world.losses([row])[0] for row in rows])
        torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=0)
        if len(rows) == 2:
            assert abs(alone[0] - alone[1]) > 0.01  # two different losses


DEALS = {"batch": {"train_batch_size": 2}, "accumulation": {"gradient_accumulation_steps": 2}}


@pytest.mark.parametrize("deal", DEALS)
def test_a_row_is_the_mean_over_the_places_that_are_filled(cache, tmp_path, world, deal):
    """At learning rate 0 every step sees the untouched model: each loss can be had without the loop."""
    train_here(cache, tmp_path / "run", num_train_epochs=2, learning_rate=0, **DEALS[deal])
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 * world.order.steps_per_epoch == 8
    assert sorted(len(row["samples"]) for row in rows) == [1, 1, 2, 2, 2, 2, 2, 2]
    for step, row in enumerate(rows):
        expected = world.losses(world.rows(step)).mean().item()
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        numbers = [int(number) for number in world.order.batch(step) if number != MISSING]
        assert row["samples"] == [world.samples.sample_id(number) for number in numbers]


def test_accumulating_two_is_a_batch_of_two(cache, tmp_path):
    for name, flags in DEALS.items():
        train_here(cache, tmp_path / name, max_train_steps=6, caption_dropout=0.3, **flags)
    batch, accumulation = tmp_path / "batch", tmp_path / "accumulation"
    assert column(batch, "samples") == column(accumulation, "samples")
    assert column(batch, "loss") == pytest.approx(column(accumulation, "loss"), rel=1e-5)
    assert column(batch, "grad_norm") == pytest.approx(column(accumulation, "grad_norm"), rel=1e-3)
    one, other = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (batch, accumulation))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-4)
    assert max(value.abs().max().item() for name, value in one.items() if "lora_B" in name) > 0.02


def test_an_epoch_trains_every_sample_exactly_once(cache, tmp_path):
    train_here(cache, tmp_path / "run", num_train_epochs=2, train_batch_size=3)
    epochs = [[row["samples"] for row in rows_of(tmp_path / "run") if row["epoch"] == epoch] for epoch in (0, 1)]
    first, second = ([sample for samples in epoch for sample in samples] for epoch in epochs)
    assert len(first) == len(set(first)) == 7
    assert sorted(first) == sorted(second)
    assert epochs[0] != epochs[1]


def test_a_global_batch_larger_than_the_data_set_works(cache, tmp_path):
    train_here(cache, tmp_path / "run", num_train_epochs=1, train_batch_size=4, gradient_accumulation_steps=3)
    assert sorted(len(row["samples"]) for row in rows_of(tmp_path / "run")) == [2, 5]


# --- what a run says of itself


def test_metrics_have_the_columns_of_the_contract(cache, tmp_path):
    train_here(cache, tmp_path / "run", max_train_steps=2)
    rows = rows_of(tmp_path / "run")
    names = ["step", "epoch", "loss", "lr", "grad_norm", "seconds", "data_seconds", "forward_seconds"]
    names += ["backward_seconds", "optimizer_seconds", "samples", "timesteps", "losses", "lora_norm", "skipped"]
    assert [list(row) for row in rows] == [names, names]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        phases = [row[f"{phase}_seconds"] for phase in ("data", "forward", "backward", "optimizer")]
        assert all(seconds >= 0 for seconds in phases)
        assert sum(phases) == pytest.approx(row["seconds"], abs=1e-5)


def test_the_learning_rate_is_diffusers_in_optimizer_steps(cache, tmp_path):
    train_here(
        cache, tmp_path / "run", max_train_steps=6, lr_scheduler="cosine", lr_warmup_steps=2,
        gradient_accumulation_steps=2, learning_rate=1e-3,
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6)
    expected = []
    for _ in range(6):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert column(tmp_path / "run", "lr") == expected


def test_the_lora_says_what_it_was_trained_on(cache, tiny_2b, tmp_path):
    train_here(cache, tmp_path / "run", max_train_steps=2, seed=5)
    adapter, facts = read_metadata(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert adapter is not None
    assert facts is not None
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (4, 2)
    assert (facts.base_model, facts.dataset, facts.seed, facts.step) == (str(tiny_2b), "squares", 5, 2)
    assert facts.dataset_digest == open_dataset(Cache(str(cache)), "squares").digest
    assert (facts.id_token, facts.frames, facts.height, facts.width, facts.fps) == ("SQR", 9, 64, 96, 8)


def test_a_run_is_a_function_of_its_seed(cache, tmp_path):
    torch.manual_seed(1)
    train_here(cache, tmp_path / "one", max_train_steps=3)
    torch.manual_seed(2)
    train_here(cache, tmp_path / "same", max_train_steps=3)
    train_here(cache, tmp_path / "other", max_train_steps=3, seed=43)
    assert column(tmp_path / "one", "loss") == column(tmp_path / "same", "loss")
    assert lora_of(tmp_path / "one") == lora_of(tmp_path / "same")
    assert not set(column(tmp_path / "one", "loss")) & set(column(tmp_path / "other", "loss"))


def test_the_loss_goes_down(cache, tmp_path, world, run):
    """On the same draws, so that luck has no part in it. The tiny model can learn little; the sign is what counts."""
    before = [world.losses(world.rows(step)).mean().item() for step in range(8)]
    train_here(cache, tmp_path / "run", max_train_steps=30, train_batch_size=5, learning_rate=0.1)
    world.transformer = run[0].state.transformer
    after = [world.losses(world.rows(step)).mean().item() for step in range(8)]
    assert all(new < old for new, old in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_ends_the_run(cache, tmp_path, monkeypatch, number):
    write = Metrics.write

    def write_and_be_told(self, row):
        write(self, row)
        if row["step"] == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Metrics, "write", write_and_be_told)
    before = signal.getsignal(number)
    assert train_here(cache, tmp_path / "run", max_train_steps=9) == 128 + number
    assert signal.getsignal(number) is before
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.name == "checkpoint-3"  # the step that was under way is finished
    assert column(tmp_path / "run", "step") == [1, 2, 3]
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


# --- the configuration


@pytest.mark.parametrize(
    ("flag", "value", "must"),
    [
        ("rank", 0, "must be at least 1"),
        ("lora_alpha", 0.0, "must be above 0"),
        ("train_batch_size", 0, "must be at least 1"),
        ("max_train_steps", 0, "must be at least 1"),
        ("checkpoints_total_limit", 0, "must be at least 1"),
        ("learning_rate", float("nan"), "must not be negative"),
        ("max_grad_norm", -1.0, "must not be negative"),
        ("caption_dropout", 1.1, "must be a probability"),
        ("dataset", "../up", "use letters"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_with_its_value(flag, value, must):
    with pytest.raises(ConfigError, match=rf"^--{flag} .*{value}.*{must}"):
        replace(TrainConfig(), **{flag: value})


def test_half_precision_on_a_cpu_is_refused(cache, tmp_path):
    with pytest.raises(ConfigError, match="--mixed_precision fp16: needs a GPU"):
        train_here(cache, tmp_path / "run", mixed_precision="fp16")
