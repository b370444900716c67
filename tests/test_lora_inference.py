"""A LoRA's way from the trainer to diffusers: what was trained is what runs, at weight 1.0."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from safetensors.torch import load_file, save_file

from infer.adapters import Adapters
from infer.generate import load_pipeline
from infer.lora import Lora
from infer.pipelines import Pipeline
from shared.errors import LoraError
from shared.lora import (
    FILE_NAME,
    TARGET_MODULES,
    LoraFacts,
    add_lora,
    find_lora,
    load_lora_state,
    lora_state,
    read_metadata,
    save_lora,
    trainable,
)
from shared.models import Checkpoint, load_transformer, open_checkpoint

RANK, ALPHA = 4, 1.0  # not equal: a file that loses alpha is four times too strong


def checkpoint_at(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), revision=None, variant=None, cache_dir=None, weights=("transformer",))


def pipeline_at(folder: Path) -> Pipeline:
    checkpoint = checkpoint_at(folder)
    return load_pipeline(checkpoint, checkpoint.config("scheduler"), "float32")


def apply_lora(pipeline: Pipeline, path: Path, scale: float) -> None:
    """As stage 3 loads a LoRA."""
    Adapters(pipeline, [Lora.read(str(path))]).scale(scale)


def random_lora(model: Path, folder: Path, **facts: object) -> tuple[CogVideoXTransformer3DModel, Path]:
    """A trainer's transformer with a LoRA whose every matrix is random, and the file it was saved to."""
    checkpoint = checkpoint_at(model)
    transformer = load_transformer(checkpoint, torch.float32)
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=TARGET_MODULES, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(transformer):
        parameter.data.normal_(0, 0.5, generator=generator)
    told: dict[str, Any] = {
        "base_model": str(model), "revision": None, "variant": None, "kind": checkpoint.facts.kind, "rank": RANK,
        "alpha": ALPHA, "target_modules": list(TARGET_MODULES), "dataset": "squares", "dataset_digest": "0" * 64,
        "id_token": "SQR", "seed": 1, "step": 7, "dtype": "float32", "text_dtype": "float32", "cache_dtype": "float32",
        "frames": 9, "height": 32, "width": 48, "fps": 8.0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return transformer, save_lora(transformer, folder, LoraFacts(**{**told, **facts}))


@pytest.fixture(scope="module")
def trained(tiny_2b, tmp_path_factory):
    return random_lora(tiny_2b, tmp_path_factory.mktemp("lora"))


@torch.no_grad()
def predict(transformer):
    generator = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(1, 2, 16, 4, 6, generator=generator),
        encoder_hidden_states=torch.randn(1, 226, 32, generator=generator),
        timestep=torch.tensor([500]),
    ).sample


def test_a_file_at_another_alpha_than_rank_predicts_what_the_trainer_predicts(tiny_2b, trained):
    transformer, path = trained
    wanted = predict(transformer)

    pipeline = CogVideoXPipeline.from_pretrained(tiny_2b, text_encoder=None, tokenizer=None)
    base = predict(pipeline.transformer)
    pipeline.load_lora_weights(path.parent, weight_name=FILE_NAME)  # diffusers' own way, and no weight said
    unfused = predict(pipeline.transformer)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = predict(pipeline.transformer)

    assert (wanted - base).abs().max() > 0.05
    assert torch.equal(unfused, wanted)
    torch.testing.assert_close(fused, wanted, rtol=1e-4, atol=1e-5)


def test_stage_3_loads_it_at_its_trained_strength_times_the_scale(tiny_2b, trained):
    transformer, path = trained
    pipeline = pipeline_at(tiny_2b)
    base = predict(pipeline.transformer)

    apply_lora(pipeline, path, 1.0)
    assert torch.equal(predict(pipeline.transformer), predict(transformer))

    pipeline.set_adapters("lora-0", 0.0)
    assert torch.equal(predict(pipeline.transformer), base)

    for module in transformer.modules():
        if hasattr(module, "scaling"):
            module.scaling = dict.fromkeys(module.scaling, 0.5 * ALPHA / RANK)
    half = predict(transformer)
    for module in transformer.modules():  # the fixture is others' too
        if hasattr(module, "scaling"):
            module.scaling = dict.fromkeys(module.scaling, ALPHA / RANK)
    pipeline.set_adapters("lora-0", 0.5)
    assert torch.equal(predict(pipeline.transformer), half)


def test_the_adapter_metadata_are_those_that_diffusers_writes(trained, tmp_path):
    transformer, path = trained
    CogVideoXPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers={name.removeprefix("transformer."): value for name, value in load_file(path).items()},
        **_collate_lora_metadata({"transformer": transformer}),
    )
    theirs, facts = read_metadata(tmp_path / FILE_NAME)
    ours, _ = read_metadata(path)
    assert facts is None
    assert ours is not None
    assert theirs is not None
    for metadata in (ours, theirs):  # a set, written in any order
        metadata["transformer.target_modules"].sort()
    assert ours == theirs
    assert load_file(path).keys() == load_file(tmp_path / FILE_NAME).keys()


def test_a_saved_lora_comes_back_into_another_seeds_injection(tiny_2b, trained):
    transformer, path = trained
    other = load_transformer(checkpoint_at(tiny_2b), torch.float32)
    add_lora(other, rank=RANK, alpha=ALPHA, target_modules=TARGET_MODULES, seed=99)

    load_lora_state(other, path)

    before, after = lora_state(transformer), lora_state(other)
    assert len(before) == 2 * 2 * len(TARGET_MODULES)  # layers, A and B
    assert before.keys() == after.keys() == load_file(path).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(predict(other), predict(transformer))
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in trainable(other))


def test_a_lora_of_another_rank_is_refused_by_its_first_matrix(tiny_2b, trained):
    other = load_transformer(checkpoint_at(tiny_2b), torch.float32)
    add_lora(other, rank=RANK + 1, alpha=ALPHA, target_modules=TARGET_MODULES, seed=0)
    with pytest.raises(LoraError, match=r"16 matrices differ .*lora_A\.weight"):
        load_lora_state(other, trained[1])


def test_a_matrix_that_is_not_finite_is_not_saved(tiny_2b, tmp_path):
    transformer, path = random_lora(tiny_2b, tmp_path)
    before = path.read_bytes()
    facts = read_metadata(path)[1]
    assert facts is not None
    trainable(transformer)[3].data[0, 0] = float("nan")
    with pytest.raises(LoraError, match="must be finite"):
        save_lora(transformer, tmp_path, facts)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_a_run_a_checkpoint_and_a_file_are_found_and_nothing_else_is(trained, tmp_path):
    path = trained[1]
    assert find_lora(str(path)) == find_lora(str(path.parent)) == path
    with pytest.raises(LoraError, match="no such file, and no folder with"):
        find_lora(str(tmp_path))


def renamed(path: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of a LoRA file, without its metadata, with another word in the names of its matrices."""
    target = folder / "foreign.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(path).items()}, target)
    return target


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("transformer.", "unet.", "is not named as a LoRA of CogVideoX's transformer"),
        ("lora_A.", "lora.down.", "is not named as a LoRA of CogVideoX's transformer"),
        ("transformer_blocks.1", "transformer_blocks.7", "is for a module that .* does not have"),
    ],
)
def test_a_foreign_lora_is_refused_before_weights_are_loaded(tiny_2b, trained, tmp_path, old, new, message):
    foreign = renamed(trained[1], tmp_path, old, new)
    with pytest.raises(LoraError, match=message):
        Lora.read(str(foreign)).check_fits(checkpoint_at(tiny_2b))


def test_a_lora_of_wider_modules_is_refused_with_both_shapes(tiny_2b, trained, tmp_path):
    state = load_file(trained[1])
    name = next(name for name in state if "lora_B" in name)
    state[name] = torch.ones(64, RANK)
    save_file(state, tmp_path / FILE_NAME)
    with pytest.raises(LoraError, match=r"is \[64, 4\], and .* has \[32, 32\] there"):
        Lora.read(str(tmp_path)).check_fits(checkpoint_at(tiny_2b))


def test_a_lora_of_which_no_key_is_loaded_is_an_error(tiny_2b, trained, tmp_path):
    """diffusers only logs a warning, and makes the base model's video."""
    pipeline = pipeline_at(tiny_2b)
    with pytest.raises(LoraError, match="none of its matrices is for the transformer"):
        apply_lora(pipeline, renamed(trained[1], tmp_path, "transformer.", "text_encoder."), 1.0)


def test_files_that_are_no_lora_are_refused_in_one_line(tiny_2b, tmp_path):
    (tmp_path / "text.safetensors").write_text("not a safetensors file at all")
    with pytest.raises(LoraError, match="not a safetensors file"):
        read_metadata(tmp_path / "text.safetensors")
    with pytest.raises(LoraError, match="none of a LoRA"):
        read_metadata(tiny_2b / "vae" / "diffusion_pytorch_model.safetensors")


def test_the_file_says_what_it_was_trained_on(trained):
    adapter, facts = read_metadata(trained[1])
    assert adapter is not None
    assert facts is not None
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert (facts.rank, facts.alpha, facts.id_token, facts.step) == (RANK, ALPHA, "SQR", 7)
    assert json.loads(json.dumps(adapter)) == adapter


def test_the_same_lora_gives_the_same_bytes(tiny_2b, tmp_path):
    """safetensors orders the metadata as it likes, another way in each file."""
    files = []
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        _, path = random_lora(tiny_2b, tmp_path / str(number))
        files.append(path.read_bytes())
    assert len(set(files)) == 1
