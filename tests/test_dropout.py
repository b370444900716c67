"""Dropout of the LoRA: masks by seed, step, place and layer, whatever the ranks, the recomputation or a resume."""

import shutil

import pytest
import torch

from shared.lora import TARGET_MODULES, add_lora, lora_layers
from shared.models import load_transformer
from shared.seeds import seed_for
from tests.test_lora_inference import checkpoint_at
from tests.training import column, facts_of, lora_of, train_here, train_on_ranks
from train.checkpoint import list_checkpoints
from train.dropout import LoraDropout, Visit, add_dropout


def dropped(inputs, *, step=3, places=(0, 1), probability=0.25, name="to_q", seed=42):
    visit = Visit(seed)
    visit.see(step, list(places))
    return LoraDropout(probability, name, visit)(inputs)


def test_a_mask_is_that_of_a_generator_of_its_seed_step_place_and_layer():
    inputs = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    rows = []
    for place in (5, 9):
        generator = torch.Generator().manual_seed(seed_for(42, 3, place, "lora_dropout", "blocks.0.to_q"))
        rows.append(torch.empty(50, 8).bernoulli_(0.75, generator=generator))
    expected = inputs * torch.stack(rows) / 0.75
    assert torch.equal(dropped(inputs, places=(5, 9), name="blocks.0.to_q"), expected)


@pytest.mark.parametrize("change", [{"step": 4}, {"places": (1, 0)}, {"name": "to_k"}, {"seed": 43}])
def test_another_step_place_layer_or_seed_has_another_mask(change):
    ones = torch.ones(2, 500)
    assert (dropped(ones) != dropped(ones, **change)).any(dim=1).all()


def test_two_ranks_drop_what_one_drops():
    inputs = torch.randn(4, 50, 8)
    apart = [dropped(inputs[part], places=places) for part, places in ((slice(2), (0, 1)), (slice(2, 4), (2, 3)))]
    assert torch.equal(dropped(inputs, places=(0, 1, 2, 3)), torch.cat(apart))


def test_the_expectation_is_kept_and_the_rate_is_the_probability():
    outputs = dropped(torch.ones(2, 100_000), probability=0.1)
    assert (outputs == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert outputs.mean().item() == pytest.approx(1, abs=0.01)
    assert outputs.unique().tolist() == pytest.approx([0, 1 / 0.9])


def test_the_global_generator_takes_no_part():
    torch.manual_seed(1)
    one, state = dropped(torch.ones(2, 500)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(dropped(torch.ones(2, 500)), one)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_mode_drops_nothing_and_without_a_probability_no_layer_is_replaced(tiny_2b):
    transformer = load_transformer(checkpoint_at(tiny_2b), torch.float32)
    add_lora(transformer, rank=4, alpha=2.0, target_modules=TARGET_MODULES, seed=0)
    add_dropout(transformer, 0.0, seed=42)
    assert not [module for module in transformer.modules() if isinstance(module, LoraDropout)]
    visit = add_dropout(transformer, 0.5, seed=42)
    found = {module.name for module in transformer.modules() if isinstance(module, LoraDropout)}
    assert found == {name for name, _ in lora_layers(transformer)}
    assert len(found) == 8
    visit.see(0, [0])
    layer = transformer.transformer_blocks[0].attn1.to_q
    inputs = torch.randn(1, 7, 32)
    layer.lora_B["default"].weight.data.normal_()
    assert not torch.equal(layer.train()(inputs), layer.eval()(inputs))
    expected = layer.base_layer(inputs) + layer.lora_B["default"](layer.lora_A["default"](inputs)) * 0.5
    torch.testing.assert_close(layer(inputs), expected)


def test_a_micro_batch_of_other_places_is_a_defect():
    with pytest.raises(AssertionError, match="2 rows, 3 places"):
        dropped(torch.ones(2, 5), places=(0, 1, 2))


# --- in a run

SETTINGS = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.3}


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """A run with dropout that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(cache, folder, **SETTINGS) == 0
    return folder


def test_it_drops_from_the_first_step_that_the_lora_takes_part_in(cache, whole, tmp_path):
    train_here(cache, tmp_path / "run", **{**SETTINGS, "lora_dropout": 0})
    one, other = column(whole, "loss"), column(tmp_path / "run", "loss")
    assert one[0] == other[0]  # B is zero
    assert all(with_it != without for with_it, without in zip(one[1:], other[1:], strict=True))


def test_recomputed_blocks_see_the_same_masks(cache, whole, tmp_path):
    train_here(cache, tmp_path / "run", **SETTINGS, gradient_checkpointing=False)
    assert facts_of(tmp_path / "run") == facts_of(whole)
    assert lora_of(tmp_path / "run") == lora_of(whole)


def test_a_resumed_run_drops_what_the_uninterrupted_one_dropped(cache, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(list_checkpoints(run)[-1])
    torch.manual_seed(99)
    assert train_here(cache, run, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert facts_of(run) == facts_of(whole)
    assert lora_of(run) == lora_of(whole)


def test_a_batch_in_place_of_accumulation_drops_the_same(cache, whole, tmp_path):
    settings = {**SETTINGS, "gradient_accumulation_steps": 1, "train_batch_size": 2}
    train_here(cache, tmp_path / "run", **settings)
    assert column(tmp_path / "run", "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)


@pytest.mark.slow
def test_two_real_ranks_train_as_one_with_dropout_and_ema(cache, whole, tmp_path):
    settings = {**SETTINGS, "gradient_accumulation_steps": 1, "ema_decay": 0.9}
    done = train_on_ranks(2, cache, tmp_path / "two", **settings)
    assert done.returncode == 0, done.stderr
    assert column(tmp_path / "two", "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)
