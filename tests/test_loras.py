"""Several LoRAs, with weights, in ComfyUI's files or of the hub: diffusers' own way and arithmetic by hand agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

from infer.adapters import Adapters
from infer.config import InferConfig
from infer.lora import Lora, check_together, split_weight
from infer.recipes import with_tokens
from shared.config import parse_config
from shared.errors import ConfigError, LoraError
from shared.lora import FILE_NAME, LoraFacts, add_lora, save_lora, trainable
from shared.lora_names import comfyui_name, diffusers_name
from shared.models import load_transformer
from tests.test_infer import PROMPT, SIZE, frames_digest, make, recipe_of
from tests.test_lora_inference import checkpoint_at, pipeline_at, predict, random_lora
from train.formats import TrainedLora, write_comfyui

EVERYWHERE = ["to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_embedding.linear_1", "text_proj", "proj_out"]


def another(model: Path, folder: Path, seed: int, targets: list[str] = EVERYWHERE, **variant: bool) -> Path:
    """A LoRA of other layers and strength, with every matrix random."""
    transformer = load_transformer(checkpoint_at(model), torch.float32)
    add_lora(transformer, rank=3, alpha=2.0, target_modules=targets, seed=seed, **variant)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(transformer):
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3, generator=generator)
        else:
            parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    told: dict[str, Any] = {
        "base_model": str(model), "revision": None, "variant": None, "kind": checkpoint_at(model).facts.kind, "rank": 3,
        "alpha": 2.0, "target_modules": targets, "dataset": "circles", "dataset_digest": "1" * 64, "id_token": "CRC",
        "seed": 1, "step": 9, "dtype": "float32", "text_dtype": "float32", "cache_dtype": "float32", "frames": 9,
        "height": 48, "width": 48, "fps": 4.0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return save_lora(transformer, folder, LoraFacts(**told))


@pytest.fixture(scope="module")
def two(tiny_2b, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return random_lora(tiny_2b, folder / "a")[1], another(tiny_2b, folder / "b", 5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_several_loras_with_weights_are_diffusers_set_adapters(tiny_2b, two, tmp_path):
    a, b = two
    pipeline = CogVideoXPipeline.from_pretrained(tiny_2b)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(a, adapter_name="a")
    pipeline.load_lora_weights(b, adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.8, 0.5])
    generator = torch.Generator().manual_seed(42)
    frames = pipeline(f"SQR CRC {PROMPT}", **SIZE, generator=generator).frames[0]

    (video,) = make(tmp_path, lora=(f"{a}:0.8", f"{b.parent}:0.5"), prompt=PROMPT)

    recipe = recipe_of(video)
    assert recipe["frames_sha256"] == frames_digest(frames)
    assert [one["weight"] for one in recipe["loras"]] == [0.8, 0.5]
    assert (recipe["height"], recipe["fps"]) == (32, 8.0)  # the first one's
    assert "-2loras-scale1-" in video.name


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_doras_and_rsloras_work_in_their_order_each_at_its_strength(tiny_2b, two, tmp_path, scale):
    """By hand, as PEFT has it: each adds to what is there, and a DoRA scales its rows, by norms of the frozen W."""
    paths = [two[0], another(tiny_2b, tmp_path / "dora", 6, use_dora=True)]
    paths.append(another(tiny_2b, tmp_path / "both", 7, use_dora=True, use_rslora=True))
    weights = [0.8, 0.5, 1.5]
    by_hand = load_transformer(checkpoint_at(tiny_2b), torch.float32)
    frozen = {name: value.clone() for name, value in by_hand.state_dict().items()}
    for path, weight in zip(paths, weights, strict=True):
        trained, strength = TrainedLora.read(str(path)), scale * weight
        for layer in trained.layers():
            base = frozen[f"{layer.module}.weight"]
            added, rows = strength * trained.scale * layer.up @ layer.down, 1.0
            if layer.magnitude is not None:
                norm = torch.linalg.norm(base, dim=1)
                rows = (torch.lerp(norm, layer.magnitude, strength) / torch.linalg.norm(base + added, dim=1))[:, None]
            weight_now = by_hand.get_submodule(layer.module).weight
            weight_now.copy_(rows * (weight_now + added))
    pipeline = pipeline_at(tiny_2b)
    base = predict(pipeline.transformer)
    adapters = Adapters(pipeline, [Lora.read(f"{path}:{weight}") for path, weight in zip(paths, weights, strict=True)])
    adapters.scale(0.3)  # whatever was before
    adapters.scale(scale)
    found = predict(pipeline.transformer)
    torch.testing.assert_close(found, predict(by_hand), rtol=1e-3, atol=1e-4)
    assert torch.equal(found, base) == (scale == 0)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("file", ["comfyui", "cogvideox_wrapper"])
def test_comfyui_s_files_are_read_back_as_they_were_trained(tiny_2b, tmp_path, file, use_rslora):
    path = another(tiny_2b, tmp_path / "run", 8, use_rslora=use_rslora)
    write_comfyui(TrainedLora.read(str(path)), tmp_path)
    trained, back = pipeline_at(tiny_2b), pipeline_at(tiny_2b)
    Adapters(trained, [Lora.read(str(path))])
    lora = Lora.read(str(tmp_path / f"{file}.safetensors"))
    assert (lora.is_comfyui, lora.says_alpha) == (file == "comfyui", True)
    lora.check_fits(checkpoint_at(tiny_2b))
    Adapters(back, [lora])
    torch.testing.assert_close(predict(back.transformer), predict(trained.transformer), rtol=1e-4, atol=1e-5)


def test_comfyui_s_alpha_is_folded_by_each_layers_rank_and_absent_is_1(tiny_2b, two, tmp_path):
    write_comfyui(TrainedLora.read(str(two[1])), tmp_path)
    state = load_file(tmp_path / "comfyui.safetensors")
    name = next(name for name in state if name.endswith(".alpha"))
    state[name] = torch.tensor(1.5)  # half its rank
    gone = next(other for other in state if other.endswith(".alpha") and other != name)
    del state[gone]
    save_file(state, tmp_path / "other.safetensors")
    before = Lora.read(str(tmp_path / "comfyui.safetensors")).weights()
    after = Lora.read(str(tmp_path / "other.safetensors")).weights()
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    module = diffusers_name(name.removeprefix("diffusion_model.").removesuffix(".alpha"))
    for key in before:
        factor = 0.5 if key == f"transformer.{module}.lora_B.weight" else 1.0
        assert torch.equal(after[key], before[key] * factor), key
    assert before.keys() == after.keys()


def test_comfyui_s_names_come_back_for_every_layer_of_the_transformer(tiny_2b):
    transformer = load_transformer(checkpoint_at(tiny_2b), torch.float32)
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    names.append("ofs_embedding.linear_1")
    assert len({comfyui_name(name) for name in names}) == len(names) > 20
    assert [diffusers_name(comfyui_name(name)) for name in names] == names


def test_a_comfyui_file_of_another_model_is_refused(tiny_2b, tmp_path):
    state = {f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(state, tmp_path / "flux.safetensors")
    with pytest.raises(LoraError, match=r"double_blocks\..* is for a module that .* does not have"):
        Lora.read(str(tmp_path / "flux.safetensors")).check_fits(checkpoint_at(tiny_2b))


def test_loras_of_different_models_are_not_mixed(tiny_2b, tiny_5b, two, tmp_path):
    read = Lora.read
    other_kind = read(str(random_lora(tiny_5b, tmp_path / "5b")[1]))
    other_base = read(str(random_lora(tiny_2b, tmp_path / "base", base_model="elsewhere")[1]))
    a, b = (read(str(path)) for path in two)
    check_together([a, b], base_is_given=False)
    with pytest.raises(LoraError, match=r"its kind is CogVideoX 1.0 text-to-video .*RoPE.*cannot be mixed$"):
        check_together([a, other_kind], base_is_given=True)
    with pytest.raises(LoraError, match=r"its base_model is elsewhere.*give --pretrained_model_name_or_path to mix"):
        check_together([a, other_base], base_is_given=False)
    check_together([a, other_base], base_is_given=True)
    with pytest.raises(LoraError, match="is given twice"):
        check_together([a, b, read(f"{two[0]}:0.5")], base_is_given=False)


@pytest.mark.parametrize(
    ("told", "source", "weight"),
    [
        ("runs/a", "runs/a", 1.0), ("runs/a:0.8", "runs/a", 0.8), ("runs/a:-1e-1", "runs/a", -0.1),
        ("a:b", "a:b", 1.0), ("a:b:2", "a:b", 2.0), ("me/lora@main:0.5", "me/lora@main", 0.5),
    ],
)  # fmt: skip
def test_a_weight_is_a_number_after_the_last_colon(told, source, weight):
    assert split_weight(told) == (source, weight)


def test_a_path_with_a_colon_is_that_path_where_it_is_there(tmp_path):
    (tmp_path / "a:0.8").mkdir()
    assert split_weight(str(tmp_path / "a:0.8")) == (str(tmp_path / "a:0.8"), 1.0)
    for told in ("a:nan", "a:inf", ":1"):
        with pytest.raises(ConfigError, match="must be a LoRA and a finite weight"):
            split_weight(told)


@pytest.mark.parametrize(
    ("prompt", "effective"),
    [
        ("a cat", "SQR big CRC a cat"),
        ("SQR a cat", "big CRC SQR a cat"),
        ("big CRC a cat", "SQR big CRC a cat"),
        ("big CRC SQR a cat", "big CRC SQR a cat"),
        ("a SQR cat", "SQR big CRC a SQR cat"),
    ],
)
def test_each_loras_id_token_is_put_before_a_prompt_that_lacks_it(prompt, effective):
    assert with_tokens(prompt, ["SQR", "big CRC", "SQR"]) == effective


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ("me/squares", ("me/squares", FILE_NAME, None)),
        ("me/squares@v1", ("me/squares", FILE_NAME, "v1")),
        ("me/squares/sub/x.safetensors@v1:0.5", ("me/squares", "sub/x.safetensors", "v1")),
    ],
)
def test_a_hub_id_is_fetched_and_its_commit_kept(two, tmp_path, monkeypatch, told, asked):
    seen = []

    def download(name, file, revision, cache_dir):
        seen.append((name, file, revision))
        path = tmp_path / "snapshots" / "c0ffee" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(two[0].read_bytes())
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    lora = Lora.read(told)
    assert seen == [asked]
    assert lora.hub == f"{asked[0]}/{asked[1]}@c0ffee"
    assert lora.weight == (0.5 if told.endswith("0.5") else 1.0)
    assert lora.describe()["hub"] == lora.hub


def test_what_the_hub_does_not_give_is_one_line(tmp_path):
    with pytest.raises(
        LoraError, match="--lora me/nothing: no such file or folder, and the hub did not give"
    ) as caught:
        Lora.read("me/nothing", str(tmp_path))
    assert "pytorch_lora_weights.safetensors of me/nothing" in str(caught.value)
    with pytest.raises(LoraError, match=r"--lora runs/x\.safetensors: no such file, and no folder"):
        Lora.read("runs/x.safetensors")


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        LoraError, match=r"^--lora runs/mistyped: no such file, .*; give a run's --output_dir or a file$"
    ):
        Lora.read("runs/mistyped:0.8")


def test_loras_of_a_toml_file_are_replaced_by_flags(tmp_path):
    file = tmp_path / "infer.toml"
    file.write_text('lora = ["a:0.5", "b"]\nprompt = "x"\n')
    assert parse_config(InferConfig, ["--config", str(file)], "infer").lora == ("a:0.5", "b")
    told = parse_config(InferConfig, ["--config", str(file), "--lora", "c", "--lora=d:2"], "infer")
    assert told.lora == ("c", "d:2")
    file.write_text("lora = [1]\n")
    with pytest.raises(ConfigError, match="must be a string, or a list of strings"):
        parse_config(InferConfig, ["--config", str(file)], "infer")
