"""train.export: each format, loaded by its own reader, predicts what the LoRA that was trained predicts."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.errors import ConfigError, LoraError, ModelError
from shared.lora import TARGET_MODULES, LoraFacts, add_lora, save_lora, trainable
from shared.models import load_transformer
from tests.test_lora_inference import checkpoint_at, predict, random_lora
from train.export import main
from train.objective import rotary_embedding

TARGETS = (*TARGET_MODULES, "ff.net.0.proj", "ff.net.2", "norm1.linear", "time_embedding.linear_1", "proj_out")
RANK, ALPHA = 4, 1.0
# Where ComfyUI's model keeps the layers: read off its source, not made by the code that is tested.
COMFYUI = {
    "transformer_blocks.1.attn1.to_q": "blocks.1.q",
    "transformer_blocks.0.attn1.to_k": "blocks.0.k",
    "transformer_blocks.1.attn1.to_v": "blocks.1.v",
    "transformer_blocks.0.attn1.to_out.0": "blocks.0.attn_out",
    "transformer_blocks.1.ff.net.0.proj": "blocks.1.ff_proj",
    "transformer_blocks.0.ff.net.2": "blocks.0.ff_out",
    "transformer_blocks.0.norm1.linear": "blocks.0.norm1.linear",
    "time_embedding.linear_1": "time_embedding_linear_1",
    "proj_out": "proj_out",
}


def facts_of(model, folder, **facts):
    told = {
        "base_model": str(model), "revision": None, "variant": None, "kind": checkpoint_at(model).facts.kind,
        "rank": RANK, "alpha": ALPHA, "target_modules": list(TARGETS), "dataset": "squares",
        "dataset_digest": "0" * 64, "id_token": "SQR", "seed": 1, "step": 7, "dtype": "float32",
        "text_dtype": "float32", "cache_dtype": "float32", "frames": 9, "height": 32, "width": 48, "fps": 8.0,
        "clips": 7,
    }  # fmt: skip
    return LoraFacts(**{**told, **facts})


def train_lora(model, folder, **variant):
    """A run's folder with a LoRA whose every matrix is random, and what the trainer predicts with it."""
    transformer = load_transformer(checkpoint_at(model), torch.float32)
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=0, **variant)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(transformer):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    save_lora(transformer, folder, facts_of(model, folder))
    return folder, predict(transformer)


VARIANTS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture(scope="module")
def trained(tiny_2b, tmp_path_factory):
    """A run's folder and the wanted prediction, of each kind of LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: train_lora(tiny_2b, folder / kind, **variant) for kind, variant in VARIANTS.items()}


@pytest.fixture(scope="module")
def plain(trained):
    return trained["plain"]


def export(run, tmp_path, format, *words):
    output = tmp_path / format
    assert main([str(run), "--format", format, "--output", str(output), *words]) == 0
    return output


def base_at(model):
    return CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_merged_transformer_predicts_what_was_trained(trained, kind, tiny_2b, tmp_path):
    run, wanted = trained[kind]
    output = export(run, tmp_path, "fused")
    fused = CogVideoXTransformer3DModel.from_pretrained(output)
    assert (predict(base_at(tiny_2b)) - wanted).abs().max() > 0.05
    close(predict(fused), wanted)
    assert not any("lora" in name for name in fused.state_dict())
    assert fused.config["num_layers"] == base_at(tiny_2b).config["num_layers"]


@pytest.mark.parametrize("kind", VARIANTS)
def test_peft_s_folder_predicts_what_was_trained(trained, kind, tiny_2b, tmp_path):
    run, wanted = trained[kind]
    model = PeftModel.from_pretrained(base_at(tiny_2b), str(export(run, tmp_path, "peft")))
    assert torch.equal(predict(model), wanted)
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.base_model_name_or_path) == (RANK, ALPHA, str(tiny_2b))


@torch.no_grad()
def load_as_comfyui(transformer, path, *, reads_alpha):
    """As ComfyUI's LoRA loader patches weights at strength 1.0: by alpha / rank where the file has an alpha."""
    state = load_file(path)
    for module, theirs in all_names(transformer).items():
        up, down = (state.pop(f"diffusion_model.{theirs}.lora_{side}.weight") for side in ("up", "down"))
        alpha = state.pop(f"diffusion_model.{theirs}.alpha").item()
        strength = alpha / down.shape[0] if reads_alpha else 1.0
        transformer.get_submodule(module).weight += strength * up @ down
    assert not state, "keys that ComfyUI would not load"


def all_names(transformer):
    """ComfyUI's name of each layer that is trained, of every block."""
    names = {}
    for module, _ in transformer.named_modules():
        for ours, theirs in COMFYUI.items():
            for block in ("0", "1"):
                other = ours.replace("blocks.0", "blocks." + block).replace("blocks.1", "blocks." + block)
                if module == other:
                    names[module] = theirs.replace("blocks.0", "blocks." + block).replace("blocks.1", "blocks." + block)
    return names


def test_a_dora_is_refused_where_it_cannot_be_held(trained, tmp_path):
    with pytest.raises(LoraError, match=r"is a DoRA, .*give --format fused or peft"):
        export(trained["dora"][0], tmp_path, "comfyui")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["plain", "rslora"])
@pytest.mark.parametrize("reads_alpha", [True, False])
def test_comfyui_s_file_is_right_whether_alpha_is_read_or_not(trained, kind, tiny_2b, tmp_path, reads_alpha):
    run, wanted = trained[kind]
    transformer = base_at(tiny_2b)
    load_as_comfyui(transformer, export(run, tmp_path, "comfyui") / "comfyui.safetensors", reads_alpha=reads_alpha)
    close(predict(transformer), wanted)


@pytest.mark.parametrize("kind", ["plain", "rslora"])
@pytest.mark.parametrize("reads_metadata", [True, False])
def test_the_wrapper_s_file_is_right_whether_metadata_are_read_or_not(trained, kind, tiny_2b, tmp_path, reads_metadata):
    """The wrapper's loader is diffusers' of before there were metadata: a file without an alpha has the rank."""
    run, wanted = trained[kind]
    path = export(run, tmp_path, "comfyui") / "cogvideox_wrapper.safetensors"
    pipeline = CogVideoXPipeline.from_pretrained(tiny_2b, text_encoder=None, tokenizer=None)
    pipeline.load_lora_weights(str(path) if reads_metadata else load_file(path))
    close(predict(pipeline.transformer), wanted)
    assert all("lora" in name for name in load_file(path)), "diffusers refuses keys such as alpha"


def test_stage_3_reads_the_wrapper_s_file(plain, tmp_path):
    from infer.lora import Lora

    path = export(plain[0], tmp_path, "comfyui") / "cogvideox_wrapper.safetensors"
    lora = Lora.read(str(path))
    assert lora.facts is not None
    assert (lora.facts.alpha, lora.facts.id_token) == (RANK, "SQR")


def test_rslora_s_scale_is_folded_in_by_the_root_of_the_rank(trained, tmp_path):
    run, _ = trained["rslora"]
    path = export(run, tmp_path, "comfyui") / "cogvideox_wrapper.safetensors"
    name = "transformer.proj_out.lora_B.weight"
    before = load_file(run / "pytorch_lora_weights.safetensors")[name]
    torch.testing.assert_close(load_file(path)[name], before * ALPHA / math.sqrt(RANK))


def test_merged_weights_keep_their_dtype_and_are_rounded_once(plain, tiny_2b, tmp_path):
    half = tmp_path / "half"
    CogVideoXPipeline.from_pretrained(tiny_2b, dtype=torch.bfloat16).save_pretrained(half)
    output = export(plain[0], tmp_path, "fused", "--pretrained_model_name_or_path", str(half))
    fused = load_file(output / "diffusion_pytorch_model.safetensors")
    stored = load_file(half / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {name: value.dtype for name, value in fused.items()} == {n: value.dtype for n, value in stored.items()}
    lora = load_file(plain[0] / "pytorch_lora_weights.safetensors")
    up, down = (lora[f"transformer.proj_out.lora_{side}.weight"] for side in "BA")
    wanted = (stored["proj_out.weight"].float() + ALPHA / RANK * up @ down).bfloat16()
    assert torch.equal(fused["proj_out.weight"], wanted)


def test_merged_without_learned_positions_where_it_was_trained_without_them(tmp_path, capsys):
    """A reader that kept them would add what training never saw, or refuse every size but one."""
    from tests import tiny_model

    model = tiny_model.build(tmp_path / "model", "5b-i2v", native=(9, 64, 96))
    trained, path = random_lora(model, tmp_path / "run", image_factor="one", drop_learned_positions=True)
    trained.patch_embed.use_learned_positional_embeddings = False
    fused = CogVideoXTransformer3DModel.from_pretrained(export(path.parent, tmp_path, "fused"))
    facts = checkpoint_at(model).facts
    for frames, height, width in ((3, 8, 12), (2, 12, 8)):  # what the table is for, and another size and count
        generator = torch.Generator().manual_seed(1)
        given = {
            "hidden_states": torch.randn(1, frames, 32, height, width, generator=generator),
            "encoder_hidden_states": torch.randn(1, 226, 32, generator=generator),
            "timestep": torch.tensor([500]),
            "image_rotary_emb": rotary_embedding(facts, frames, height, width, torch.device("cpu")),
        }
        with torch.no_grad():
            close(fused(**given).sample, trained(**given).sample)
    told = capsys.readouterr().err
    assert told.count("warning") == 1
    assert f"{tmp_path / 'fused'}: its reader must multiply first frames as --image_factor one does" in told
    export(path.parent, tmp_path, "peft")
    told = capsys.readouterr().err
    assert f"{tmp_path / 'peft'}: its reader must leave out the learned positions" in told
    assert "--image_factor one" in told


def test_a_checkpoint_of_another_size_is_refused_and_nothing_is_left(plain, tmp_path, tiny_2b):
    from tests import tiny_model

    other = tiny_model.build(tmp_path / "other", "2b", layers=1)
    with pytest.raises(LoraError, match=r"transformer_blocks\.1\..* in .*other it is none"):
        export(plain[0], tmp_path, "fused", "--pretrained_model_name_or_path", str(other))
    with pytest.raises(ModelError, match="no such folder"):
        export(plain[0], tmp_path, "fused", "--pretrained_model_name_or_path", str(tmp_path / "none"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_weights_that_their_dtype_cannot_hold_are_refused(plain, tiny_2b, tmp_path):
    half, strong = tmp_path / "half", tmp_path / "strong"
    CogVideoXPipeline.from_pretrained(tiny_2b, dtype=torch.float16).save_pretrained(half)
    strong.mkdir()
    source = plain[0] / "pytorch_lora_weights.safetensors"
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(source)
    state["transformer.proj_out.lora_B.weight"] *= 1e6
    save_file(state, strong / source.name, metadata)
    with pytest.raises(LoraError, match=r"proj_out is not finite in torch\.float16"):
        export(strong, tmp_path, "fused", "--pretrained_model_name_or_path", str(half))
    assert not (tmp_path / "fused").exists()


def test_mistakes_are_refused_in_one_line(plain, tmp_path):
    run = plain[0]
    with pytest.raises(ConfigError, match="is there already"):
        main([str(run), "--format", "peft", "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match="is for --format fused"):
        main([str(run), "--format", "peft", "--variant", "fp16"])
    with pytest.raises(LoraError, match=r"RUN .*: no such file"):
        main([str(tmp_path), "--format", "peft"])
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(run / "pytorch_lora_weights.safetensors"), bare)
    with pytest.raises(LoraError, match="do not say its alpha"):
        main([str(bare), "--format", "peft"])


def test_the_same_lora_gives_the_same_bytes_by_default_in_the_run(plain):
    files = []
    for _ in range(2):
        assert main([str(plain[0]), "--format", "comfyui"]) == 0
        folder = plain[0] / "export" / "comfyui"
        files.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert files[0] == files[1]
    assert set(files[0]) == {"comfyui.safetensors", "cogvideox_wrapper.safetensors"}
