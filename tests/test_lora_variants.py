"""rsLoRA, DoRA, other target modules, and a LoRA to start from: what is trained is what runs, and by hand the same."""

import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infer.generate import load_pipeline
from infer.lora import Lora
from shared.errors import CheckpointError, ConfigError, LoraError
from shared.lora import FILE_NAME, TARGET_MODULES, add_lora, lora_layers, read_metadata
from shared.models import load_transformer
from tests.test_lora_inference import apply_lora, checkpoint_at, pipeline_at
from tests.training import column, lora_of, only_line, train_here
from train import loop
from train.checkpoint import list_checkpoints
from train.objective import rotary_embedding

RANK, ALPHA = 4, 2.0  # as tests.training has them
EVERYWHERE = "to_q,to_out.0,ff.net.0.proj,ff.net.2,norm1.linear,proj_out,time_embedding.linear_1,text_proj"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "everywhere": {"target_modules": EVERYWHERE},
    "dora everywhere": {"target_modules": EVERYWHERE, "use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "ema": {"ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def models(tiny_2b, tiny_5b, tmp_path_factory):
    """A checkpoint of each kind whose VAE and T5 are those that the data set was made with."""
    mixed = shutil.copytree(tiny_2b, tmp_path_factory.mktemp("models") / "5b")
    for part in ("transformer", "scheduler"):
        shutil.rmtree(mixed / part)
        shutil.copytree(tiny_5b / part, mixed / part)
    return {"2b": tiny_2b, "5b": mixed}


@torch.no_grad()
def predict(transformer, model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    rotary = rotary_embedding(checkpoint_at(model).facts, 2, 4, 6, torch.device("cpu"))
    return transformer(
        hidden_states=torch.randn(1, 2, 16, 4, 6, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(1, 226, 32, generator=generator).to(dtype),
        timestep=torch.tensor([500]),
        image_rotary_emb=rotary,
    ).sample


@pytest.fixture(scope="module")
def trained(cache, models, tmp_path_factory):
    """Trains a variant for two steps: the run's folder, and what its own transformer predicts at the end."""
    made = {}

    def train_variant(kind, variant):
        if (kind, variant) not in made:
            folder, opened, open_run = tmp_path_factory.mktemp("runs") / "run", [], loop.open_run

            def keep(*args):
                opened.append(open_run(*args))
                return opened[0]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "open_run", keep)
                settings = {"max_train_steps": 2, "pretrained_model_name_or_path": models[kind], **VARIANTS[variant]}
                assert train_here(cache, folder, **settings) == 0
            state = opened[0].state
            with state.ema.applied() if state.ema else nullcontext():
                made[kind, variant] = folder, predict(state.transformer.eval(), models[kind])
        return made[kind, variant]

    return train_variant


# --- the file


@pytest.mark.parametrize("kind", ["2b", "5b"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_loaded_predicts_what_the_trainer_predicts(trained, models, kind, variant):
    folder, wanted = trained(kind, variant)
    pipeline = CogVideoXPipeline.from_pretrained(models[kind], text_encoder=None, tokenizer=None)
    base = predict(pipeline.transformer, models[kind])
    assert (wanted - base).abs().max() > 1e-3

    pipeline.load_lora_weights(folder, weight_name=FILE_NAME)  # diffusers' own way: no weight said, no eval()
    assert torch.equal(predict(pipeline.transformer, models[kind]), wanted)

    Lora.read(str(folder)).check_fits(checkpoint_at(models[kind]))
    for scale, expected in ((1.0, wanted), (0.0, base)):
        ours = pipeline_at(models[kind])
        apply_lora(ours, folder / FILE_NAME, scale)
        assert torch.equal(predict(ours.transformer, models[kind]), expected)


@torch.no_grad()
def merged_by_hand(model, folder, *, rslora, strength=1.0):
    """The transformer without PEFT, its weights changed as the papers have it."""
    transformer, state = load_transformer(checkpoint_at(model), torch.float32), load_file(folder / FILE_NAME)
    scale = strength * (ALPHA / RANK**0.5 if rslora else ALPHA / RANK)
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith("lora_A.weight")]
    for name in names:
        layer = transformer.get_submodule(name.removeprefix("transformer."))
        frozen = layer.weight.double()
        weight = frozen + scale * (state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double())
        if f"{name}.lora_magnitude_vector" in state:
            norm = frozen.pow(2).sum(dim=1).sqrt()
            magnitude = norm + strength * (state[f"{name}.lora_magnitude_vector"].double() - norm)
            weight = weight * (magnitude / weight.pow(2).sum(dim=1).sqrt())[:, None]
        layer.weight.copy_(weight)
    return transformer


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "dora and rslora", "everywhere", "dora everywhere"])
def test_the_prediction_is_that_of_weights_merged_by_hand(trained, tiny_2b, variant):
    folder, wanted = trained("2b", variant)
    rslora = "rslora" in variant
    by_hand = predict(merged_by_hand(tiny_2b, folder, rslora=rslora), tiny_2b)
    torch.testing.assert_close(by_hand, wanted, rtol=1e-4, atol=1e-5)
    other = predict(merged_by_hand(tiny_2b, folder, rslora=not rslora), tiny_2b)
    assert (other - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["rslora", "dora", "dora everywhere"])
def test_half_the_scale_is_half_of_all_that_was_trained(trained, tiny_2b, variant):
    folder, wanted = trained("2b", variant)
    ours = pipeline_at(tiny_2b)
    apply_lora(ours, folder / FILE_NAME, 0.5)
    found = predict(ours.transformer, tiny_2b)
    by_hand = merged_by_hand(tiny_2b, folder, rslora=variant == "rslora", strength=0.5)
    torch.testing.assert_close(found, predict(by_hand, tiny_2b), rtol=1e-4, atol=1e-5)
    assert (found - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_metadata_say_what_diffusers_must_apply(trained, variant):
    adapter, facts = read_metadata(trained("2b", variant)[0] / FILE_NAME)
    assert adapter is not None
    assert facts is not None
    settings = VARIANTS[variant]
    assert adapter["transformer.use_rslora"] is settings.get("use_rslora", False)
    assert adapter["transformer.use_dora"] is settings.get("use_dora", False)
    targets = sorted(settings.get("target_modules", ",".join(TARGET_MODULES)).split(","))
    assert sorted(adapter["transformer.target_modules"]) == sorted(facts.target_modules) == targets
    assert facts.dropout == settings.get("lora_dropout", 0)
    assert adapter["transformer.lora_dropout"] == 0  # diffusers would go on to drop inputs


def test_a_foreign_loras_dropout_does_not_reach_its_videos(trained, tiny_2b, tmp_path):
    """diffusers gives what it loads PEFT's dropout, in training mode."""
    folder, wanted = trained("2b", "plain")
    with safe_open(folder / FILE_NAME, "pt") as file:
        metadata = file.metadata()
    told = metadata["lora_adapter_metadata"].replace(
        '"transformer.lora_dropout": 0.0', '"transformer.lora_dropout": 0.5'
    )
    assert told != metadata["lora_adapter_metadata"]
    save_file(load_file(folder / FILE_NAME), tmp_path / FILE_NAME, {**metadata, "lora_adapter_metadata": told})
    theirs = CogVideoXPipeline.from_pretrained(tiny_2b, text_encoder=None, tokenizer=None)
    theirs.load_lora_weights(tmp_path)
    assert not torch.equal(predict(theirs.transformer, tiny_2b), wanted)

    ours = pipeline_at(tiny_2b)
    apply_lora(ours, tmp_path / FILE_NAME, 1.0)
    assert torch.equal(predict(ours.transformer, tiny_2b), wanted)


def test_a_dora_of_wider_modules_is_refused(trained, tiny_2b, tmp_path):
    state = load_file(trained("2b", "dora")[0] / FILE_NAME)
    name = next(name for name in state if "magnitude" in name)
    save_file(
        {name: torch.ones(64), **{key: value for key, value in state.items() if key != name}}, tmp_path / FILE_NAME
    )
    with pytest.raises(LoraError, match=r"lora_magnitude_vector is \[64\], and .* has \[32, 32\] there"):
        Lora.read(str(tmp_path)).check_fits(checkpoint_at(tiny_2b))


def test_dora_begins_as_the_frozen_weights_also_in_bfloat16(tiny_2b):
    """PEFT rounds the magnitudes to the weights' dtype, which changes the prediction before the first step."""
    transformer = load_transformer(checkpoint_at(tiny_2b), torch.bfloat16)
    base = predict(transformer, tiny_2b, torch.bfloat16)
    add_lora(transformer, rank=4, alpha=2.0, target_modules=EVERYWHERE.split(","), seed=0, use_dora=True)
    assert torch.equal(predict(transformer, tiny_2b, torch.bfloat16), base)
    for _, layer in lora_layers(transformer):
        layer.lora_magnitude_vector["default"].weight.data = (
            layer.lora_magnitude_vector["default"].weight.bfloat16().float()
        )
    assert not torch.equal(predict(transformer, tiny_2b, torch.bfloat16), base)


@pytest.mark.parametrize("variant", ["plain", "dora everywhere"])
def test_scale_0_is_the_base_model_also_in_bfloat16(trained, tiny_2b, variant):
    pipeline = load_pipeline(checkpoint_at(tiny_2b), checkpoint_at(tiny_2b).config("scheduler"), "bfloat16")
    base = predict(pipeline.transformer, tiny_2b, torch.bfloat16)
    apply_lora(pipeline, trained("2b", variant)[0] / FILE_NAME, 0.0)
    assert torch.equal(predict(pipeline.transformer, tiny_2b, torch.bfloat16), base)


# --- target modules


def test_the_target_modules_are_those_that_get_matrices(trained):
    found = {name.split(".lora_")[0] for name in load_file(trained("2b", "everywhere")[0] / FILE_NAME)}
    block = ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
    assert found == {
        *(f"transformer.transformer_blocks.{number}.{name}" for number in (0, 1) for name in block),
        *(f"transformer.{name}" for name in ("proj_out", "time_embedding.linear_1", "patch_embed.text_proj")),
    }


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("to_q,to_w", r"--target_modules to_w: no layer has a name that ends so; did you mean to_[qkv] or "),
        ("ff.net.1.proj", r"did you mean ff\.net\.0\.proj"),
        ("attn2.to_q", r"did you mean attn1\.to_q"),
        (
            "qqqqqqqq",
            r"ends so; there are attn1\.to_k, attn1\.to_out\.0, attn1\.to_q, attn1\.to_v, ff\.net\.0\.proj, ff",
        ),
        ("ff", r"--target_modules ff: is not a linear layer; .*there are attn1\.to_k, "),
        ("attn1.norm_q", r"attn1\.norm_q: is not a linear layer"),
        ("patch_embed.proj", r"patch_embed\.proj: is not a linear layer"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_what_there_is(cache, tmp_path, targets, told):
    with pytest.raises(LoraError, match=told) as caught:
        train_here(cache, tmp_path / "run", max_train_steps=1, target_modules=targets)
    only_line(str(caught.value))
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_order_of_targets_and_blanks_change_nothing(cache, trained, tiny_2b, tmp_path):
    folder, _ = trained("2b", "plain")
    run = shutil.copytree(folder, tmp_path / "run")
    lora = load_file(run / FILE_NAME)
    settings = {"max_train_steps": 2, "target_modules": " to_out.0, to_v,to_k,to_q,to_q"}
    train_here(cache, run, **settings, pretrained_model_name_or_path=tiny_2b, resume_from_checkpoint="latest")
    assert all(torch.equal(value, lora[name]) for name, value in load_file(run / FILE_NAME).items())


# --- a LoRA to start from


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "everywhere"])
def test_a_run_starts_at_the_matrices_of_the_file(cache, trained, tmp_path, variant):
    folder, _ = trained("2b", variant)
    settings = {**VARIANTS[variant], "seed": 7, "max_train_steps": 1, "learning_rate": 0}
    assert train_here(cache, tmp_path / "run", **settings, init_lora=folder) == 0
    before, after = load_file(folder / FILE_NAME), load_file(tmp_path / "run" / FILE_NAME)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_started_from_a_lora_goes_on_from_its_checkpoint(cache, trained, tmp_path):
    start, other = trained("2b", "plain")[0], trained("5b", "plain")[0]
    settings = {"max_train_steps": 3, "checkpointing_steps": 1}
    train_here(cache, tmp_path / "whole", **settings, init_lora=start)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for folder in list_checkpoints(run)[1:]:
        shutil.rmtree(folder)
    moved = shutil.copy(start / FILE_NAME, tmp_path / "elsewhere.safetensors")
    for wrong in ({}, {"init_lora": other}):
        with pytest.raises(CheckpointError, match=r"checkpoint-1: init_lora was '[0-9a-f]{64}' and is now"):
            train_here(cache, run, **settings, **wrong, resume_from_checkpoint="latest")
    assert train_here(cache, run, **settings, init_lora=moved, resume_from_checkpoint="latest") == 0
    assert column(run, "loss") == column(tmp_path / "whole", "loss")
    assert lora_of(run) == lora_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"rank": 8}, "its rank is 4, this run's is 8"),
        ({"lora_alpha": 4}, r"its lora_alpha is 2\.0, this run's is 4\.0"),
        ({"use_rslora": True}, "its use_rslora is False, this run's is True"),
        ({"use_dora": True}, "its use_dora is False, this run's is True"),
    ],
)
def test_a_lora_of_other_settings_is_refused_before_weights_are_loaded(
    cache, trained, tmp_path, monkeypatch, flags, told
):
    folder, _ = trained("2b", "plain")
    monkeypatch.setattr("train.setup.load_transformer", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(LoraError, match=f"--init_lora {folder / FILE_NAME}: {told}") as caught:
        train_here(cache, tmp_path / "run", max_train_steps=1, init_lora=folder, **flags)
    only_line(str(caught.value))


def test_a_lora_of_other_targets_is_refused_by_its_first_matrix(cache, trained, tmp_path):
    folder, _ = trained("2b", "plain")
    told = r"matrices differ .* the first .*attn1\.to_k\.lora_A\.weight: \(4, 32\) in the file, none in the run"
    with pytest.raises(LoraError, match=told):
        train_here(cache, tmp_path / "run", max_train_steps=1, init_lora=folder, target_modules="to_q")


def test_a_lora_whose_alpha_is_not_known_is_refused(cache, trained, tmp_path):
    save_file(load_file(trained("2b", "plain")[0] / FILE_NAME), tmp_path / "foreign.safetensors")
    with pytest.raises(LoraError, match=r"foreign\.safetensors: does not say its alpha"):
        train_here(cache, tmp_path / "run", max_train_steps=1, init_lora=tmp_path / "foreign.safetensors")
    with pytest.raises(LoraError, match="--init_lora nowhere: no such file"):
        train_here(cache, tmp_path / "run", max_train_steps=1, init_lora="nowhere")


# --- flags


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"target_modules": "to_q,,to_k"}, "--target_modules 'to_q,,to_k'; must be names"),
        ({"lora_dropout": 1}, r"--lora_dropout 1\.0; must be a probability below 1"),
        ({"lora_dropout": 0.1, "use_dora": True}, r"--lora_dropout 0\.1 with --use_dora: .*; give one of them"),
        ({"ema_decay": 1}, r"--ema_decay 1\.0; must be above 0 and below 1"),
        ({"min_snr_gamma": 0}, r"--min_snr_gamma 0\.0; must be above 0"),
        ({"min_snr_floor": 2}, r"--min_snr_floor 2\.0; must be a weight, 0 to 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused(cache, tmp_path, flags, told):
    with pytest.raises(ConfigError, match=told):
        train_here(cache, tmp_path / "run", max_train_steps=1, **flags)


def test_dora_with_dropout_would_reach_the_frozen_weights_in_peft(tiny_2b):
    """Why the two are refused together: with magnitudes that were trained, and a LoRA of zero, inputs are dropped."""
    transformer = load_transformer(checkpoint_at(tiny_2b), torch.float32)
    add_lora(transformer, rank=4, alpha=2.0, target_modules=["to_q"], seed=0, use_dora=True)
    for _, layer in lora_layers(transformer):
        layer.lora_magnitude_vector["default"].weight.data *= 1.5
    without = predict(transformer.train(), tiny_2b)
    for _, layer in lora_layers(transformer):
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert not torch.allclose(predict(transformer.train(), tiny_2b), without, atol=1e-4)
