"""The levers of inference: which frames they change and by how much, what they hold, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infer import embeddings, memory
from infer.adapters import Adapters
from infer.config import InferConfig
from infer.embeddings import encode_prompts
from infer.generate import generate, load_pipeline
from infer.lora import Lora
from infer.memory import PRESETS, Levers, install, resolve_levers
from infer.placement import deal, place_text_encoder, split_over
from infer.quantise import quantise
from infer.request import resolve
from infer.split import own_share, world
from infer.video import read_mp4
from shared import float8
from shared.errors import ConfigError
from shared.lora import TARGET_MODULES, add_lora
from shared.models import load_text_encoder
from tests import tiny_model
from tests.conftest import ROOT
from tests.test_lora_inference import checkpoint_at, random_lora

PROMPT = "a red square moves over a gradient"
CPU = torch.device("cpu")
PLAIN = Levers()


@pytest.fixture(scope="module")
def lora(tiny_5b, tmp_path_factory):
    return random_lora(tiny_5b, tmp_path_factory.mktemp("lora"))[1]


@pytest.fixture(scope="module")
def frames_of(tiny_5b, lora):
    """Makes a small clip with some levers: its frames [F, H, W, 3] in 0 to 1, and the pipeline that made it."""
    embeds = encode_prompts(checkpoint_at(tiny_5b), ["", PROMPT], "float32", "float32")

    def make(levers: Levers = PLAIN, videos: int = 1) -> tuple[torch.Tensor, Any]:
        pipeline = load_pipeline(checkpoint_at(tiny_5b), scheduler_of(tiny_5b), "float32")
        pipeline.set_progress_bar_config(disable=True)
        Adapters(pipeline, [Lora.read(str(lora))])
        install(pipeline, levers, "cpu")
        frames = pipeline(
            prompt_embeds=embeds[PROMPT].repeat(videos, 1, 1),
            negative_prompt_embeds=embeds[""].repeat(videos, 1, 1),
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=2,
            generator=[torch.Generator().manual_seed(seed) for seed in range(videos)],
            output_type="pt",
        ).frames
        return frames, pipeline

    return make


@pytest.fixture(scope="module")
def plain(frames_of):
    return frames_of()[0]


def scheduler_of(model: Path) -> dict[str, Any]:
    """The config of a checkpoint's scheduler, as a recipe has it."""
    return {**checkpoint_at(model).config("scheduler"), "_class_name": "CogVideoXDDIMScheduler"}


def weight_bytes(module: Any) -> int:
    """Bytes of what a module holds, quantised or not."""
    from shared.ledger import tensors_of

    return sum(part.nbytes for parameter in module.parameters() for part in tensors_of(parameter))


# What the levers do


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_where_weights_wait_changes_no_frame(frames_of, plain, offload):
    """With a CPU in the GPU's place: the same hooks, whose copies go nowhere."""
    assert torch.equal(frames_of(Levers(offload=offload))[0], plain)


def test_a_model_split_over_devices_makes_the_same_frames(frames_of, plain):
    frames, pipeline = frames_of(Levers(device_map="balanced"))
    assert torch.equal(frames, plain)
    hooked = [name for name, module in pipeline.transformer.named_modules() if hasattr(module, "_hf_hook")]
    assert {"transformer_blocks.0", "transformer_blocks.1", "patch_embed", "proj_out"} <= set(hooked)


def test_where_weights_wait_changes_no_frame_that_starts_from_an_image(tmp_path):
    """The VAE encodes before the transformer's turn there."""
    model = tiny_model.build(tmp_path / "model", "5b-i2v", native=(9, 32, 48))
    embeds = torch.randn(1, 226, 32, generator=torch.Generator().manual_seed(1))
    offloads = [Levers(offload=name) for name in ("none", "model", "sequential", "group")]
    frames = []
    for levers in (*offloads, Levers(device_map="balanced")):
        pipeline = load_pipeline(checkpoint_at(model), scheduler_of(model), "float32")
        pipeline.set_progress_bar_config(disable=True)
        install(pipeline, levers, "cpu")
        for _ in range(2):  # the second finds things where the first left them
            made = pipeline(
                Image.new("RGB", (48, 32), "red"),
                prompt_embeds=embeds,
                negative_prompt_embeds=torch.zeros_like(embeds),
                height=32,
                width=48,
                num_frames=9,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(3),
                output_type="pt",
            ).frames
        frames.append(made)
    assert all(torch.equal(one, frames[0]) for one in frames)


@pytest.mark.parametrize("levers", [Levers(offload="sequential"), Levers(offload="group"), Levers(device_map="b")])
def test_where_t5_waits_changes_no_embedding(tiny_5b, levers):
    tokens = torch.arange(12)[None]
    encoders = [load_text_encoder(checkpoint_at(tiny_5b), torch.float32)[1] for _ in range(2)]
    place_text_encoder(encoders[0], levers, "cpu")
    with torch.no_grad():
        first, second = (encoder(tokens)[0] for encoder in encoders)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "levers", [PLAIN, Levers(offload="sequential"), Levers(offload="group"), Levers(device_map="b")]
)
def test_t5_is_gone_when_its_embeddings_are_there(tiny_5b, monkeypatch, levers):
    """With a CPU in the GPU's place; hooks that hold each other must not hold the model."""
    loaded = []

    def load(*told: Any) -> Any:
        tokenizer, encoder = load_text_encoder(*told)
        loaded.append(weakref.ref(encoder))
        return tokenizer, encoder

    monkeypatch.setattr(embeddings, "load_text_encoder", load)
    assert list(encode_prompts(checkpoint_at(tiny_5b), ["", PROMPT], "float32", "float32", levers)) == ["", PROMPT]
    assert [reference() for reference in loaded] == [None]


def test_slices_are_equal_and_tiles_of_what_fits_one_are_too(frames_of, plain):
    assert torch.equal(frames_of(Levers(vae_tiling=True))[0], plain)  # 32x48 is less than a tile
    whole, sliced = (frames_of(Levers(vae_slicing=on), videos=2)[0] for on in (False, True))
    assert torch.allclose(whole, sliced, atol=1e-5)
    assert not torch.equal(whole[0], whole[1])


def test_a_tiled_frame_is_that_of_diffusers_tiles_and_close_to_the_whole(tiny_5b):
    from infer.pipelines import TextToVideo
    from shared.models import load_vae

    latents = torch.randn(1, 3, 16, 36, 10, generator=torch.Generator().manual_seed(1))
    whole, expected = (load_vae(checkpoint_at(tiny_5b), torch.float32) for _ in range(2))
    whole_frames = whole.decode(1 / whole.config.scaling_factor * latents.transpose(1, 2)).sample
    expected.enable_tiling()
    tiles = expected.decode(1 / expected.config.scaling_factor * latents.transpose(1, 2)).sample
    pipeline = TextToVideo(tokenizer=None, text_encoder=None, vae=whole, transformer=None, scheduler=None)
    pipeline.vae.use_tiling = False
    assert torch.equal(pipeline.decode_latents(latents), whole_frames)
    pipeline.vae.enable_tiling()
    assert torch.equal(pipeline.decode_latents(latents), tiles)
    assert not torch.equal(tiles, whole_frames)
    assert (tiles - whole_frames).abs().mean() < 0.05 * whole_frames.std()


@pytest.mark.parametrize("quantiser", ["torchao", "quanto"])
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.05), ("fp8", 0.2)])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_of_8_bits_take_a_quarter_and_frames_are_close(frames_of, plain, part, precision, most, quantiser):
    pytest.importorskip(memory.LIBRARIES[quantiser], reason="the extra `quant` is not installed")
    frames, pipeline = frames_of(Levers(**{f"{part}_precision": precision}, quantiser=quantiser))
    _, whole = frames_of()
    assert 0 < (frames - plain).std() < most * plain.std()
    if part == "vae":
        taken, before = ([weight_bytes(one.vae.decoder) for one in pair] for pair in ((pipeline,), (whole,)))
        assert taken[0] < 0.4 * before[0]
    else:
        layers = [one.transformer.transformer_blocks[0].attn1.to_q.base_layer for one in (pipeline, whole)]
        assert weight_bytes(layers[0]) < 0.6 * weight_bytes(layers[1])  # of 32 x 32 the scales and the bias weigh
        lora = pipeline.transformer.transformer_blocks[0].attn1.to_q.lora_A
        assert all(parameter.dtype == torch.float32 for parameter in lora.parameters())


def test_int8_weights_are_those_that_training_holds(tiny_5b):
    """A LoRA that was trained over an int8 base meets the same base again."""
    from diffusers import CogVideoXTransformer3DModel

    from train.quantise import dequantised
    from train.quantise import quantise as quantise_for_training

    ours, theirs = (
        CogVideoXTransformer3DModel.from_pretrained(tiny_5b / "transformer").requires_grad_(False) for _ in range(2)
    )
    quantise(ours, "int8", "torchao")
    quantise_for_training(theirs, "int8", CPU)
    quantised = 0
    for name, module in theirs.named_modules():
        if type(module).__name__ == "FrozenLinear":
            expected = dequantised(module.weight, tuple(module.weight.shape), torch.float32)
            assert torch.equal(ours.get_submodule(name).weight.dequantize(), expected)
            quantised += 1
    assert quantised == sum(type(layer.weight.data).__name__ == "Int8Tensor" for layer in ours.modules()
                            if isinstance(layer, torch.nn.Linear))  # fmt: skip


def test_t5_in_int8_is_smaller_and_its_embeddings_are_close(tiny_5b):
    levers = Levers(text_encoder_precision="int8", quantiser="torchao")
    whole, small = (
        encode_prompts(checkpoint_at(tiny_5b), [PROMPT], "float32", "float32", one)[PROMPT] for one in (None, levers)
    )
    assert 0 < (whole - small).abs().max() < 0.05 * whole.abs().max()


def test_layerwise_casting_holds_float8_at_rest_and_leaves_the_lora(frames_of, plain):
    frames, pipeline = frames_of(Levers(layerwise_casting=True))
    layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
    assert layer.lora_A["lora-0"].weight.dtype == torch.float32
    assert 0 < (frames - plain).std() < 0.2 * plain.std()


@pytest.mark.slow
def test_compiled_blocks_make_close_frames(frames_of, plain):
    frames, _ = frames_of(Levers(compile=True))
    assert torch.allclose(frames, plain, atol=1e-4)


@pytest.mark.parametrize(
    "levers",
    [{"offload": "group"}, {"offload": "sequential"}, {"offload": "model"}, {"device_map": "balanced"}],
    ids=str,
)
def test_int8_goes_with_each_place(frames_of, levers):
    quantised: dict[str, Any] = {"transformer_precision": "int8", "vae_precision": "int8", "quantiser": "torchao"}
    assert torch.equal(frames_of(Levers(**quantised, **levers))[0], frames_of(Levers(**quantised))[0])


@pytest.mark.parametrize("offload", ["group", "sequential", "model"])
def test_layerwise_casting_goes_with_offload(frames_of, offload):
    cast = frames_of(Levers(layerwise_casting=True))[0]
    assert torch.equal(frames_of(Levers(layerwise_casting=True, offload=offload))[0], cast)


@pytest.mark.parametrize(
    ("levers", "flag"),
    [
        (Levers(transformer_precision="int8", quantiser="torchao"), "--transformer_precision int8"),
        (Levers(layerwise_casting=True), "--layerwise_casting"),
        (Levers(offload="group"), "--offload group"),
        (Levers(offload="sequential"), "--offload sequential"),
    ],
)
def test_a_dora_wants_the_whole_weights_beside_it(tiny_5b, levers, flag):
    pipeline = load_pipeline(checkpoint_at(tiny_5b), scheduler_of(tiny_5b), "float32")
    add_lora(pipeline.transformer, rank=2, alpha=2, target_modules=TARGET_MODULES, seed=0, use_dora=True)
    with pytest.raises(ConfigError, match=f"{flag}: the LoRA is a DoRA"):
        install(pipeline, levers, "cpu")
    install(pipeline, Levers(offload="model"), "cpu")


@pytest.mark.parametrize(("count", "head"), [(2, 0), (3, 5), (4, 100)])
def test_blocks_are_dealt_in_order_and_equally(count, head):
    sizes = [10] * 42
    dealt = deal(sizes, head, count)
    assert dealt == sorted(dealt)
    assert set(dealt) == set(range(count))
    shares = [sum(size for size, place in zip(sizes, dealt, strict=True) if place == one) for one in range(count)]
    shares[0] += head
    assert max(shares) - min(shares) <= 10 + 10


def test_every_parameter_of_a_split_model_has_its_place(tiny_5b):
    encoder = load_text_encoder(checkpoint_at(tiny_5b), torch.float32)[1]
    split_over(encoder, "encoder.block", [CPU, CPU])
    assert all(hasattr(block, "_hf_hook") for block in encoder.encoder.block)


# What is asked for


def config(**flags: Any) -> InferConfig:
    return InferConfig(pretrained_model_name_or_path="somewhere", prompt=PROMPT, **flags)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs of capability 8.9, as far as what is asked is concerned."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))


def test_without_a_gpu_only_the_free_lever_is_pulled_and_with_one_the_preset_is_balanced(gpus):
    assert resolve_levers(config(), "cpu") == Levers(vae_slicing=True)
    assert resolve_levers(config(), "cuda") == Levers(vae_tiling=True, vae_slicing=True, offload="model")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flag_wins_over_each_preset(gpus, preset):
    told = {"offload": "none", "vae_tiling": "off", "vae_slicing": "off", "transformer_precision": "fp8"}
    told |= {"text_encoder_precision": "native"}
    found = resolve_levers(config(preset=preset, **told), "cuda")
    assert found == Levers(transformer_precision="fp8", quantiser="torchao")
    lower = resolve_levers(config(preset=preset), "cuda")
    assert {name: getattr(lower, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_presets_on_a_cpu_keep_what_changes_numbers():
    low = resolve_levers(config(preset="low"), "cpu")
    assert (low.offload, low.vae_tiling, low.transformer_precision) == ("none", True, "int8")


def test_casting_and_a_map_take_the_place_of_the_presets_own(gpus):
    assert resolve_levers(config(preset="low", layerwise_casting=True), "cuda").transformer_precision == "native"
    assert resolve_levers(config(preset="lowest", device_map="balanced"), "cuda").offload == "none"
    assert resolve_levers(config(preset="low", cache="cache"), "cuda").text_encoder_precision == "native"


@pytest.mark.parametrize(
    ("flags", "device", "said"),
    [
        ({"device_map": "balanced", "offload": "sequential"}, "cuda", "--device_map balanced: keeps all.*sequential"),
        ({"device_map": "balanced", "offload": "model"}, "cuda", "--device_map balanced: keeps all.*model"),
        ({"device_map": "balanced"}, "cpu", "needs two GPUs or more, here are 0"),
        ({"layerwise_casting": True, "transformer_precision": "int8"}, "cuda", "--layerwise_casting: does not go"),
        ({"cache": "cache", "text_encoder_precision": "int8"}, "cuda", "with --cache T5 is not loaded"),
        ({"quantiser": "torchao"}, "cuda", "--quantiser torchao: nothing is quantised"),
        ({"compile": True, "offload": "group"}, "cuda", "--compile: does not go with --offload group"),
        ({"compile": True, "preset": "lowest"}, "cuda", "--compile: does not go with --offload group"),
        ({"compile": True, "layerwise_casting": True}, "cuda", "--compile: does not go with --layerwise_casting"),
        ({"offload": "sequential", "transformer_precision": "int8", "quantiser": "quanto"}, "cuda", "--offload sequen"),
        ({"preset": "lowest", "vae_precision": "int8", "quantiser": "quanto"}, "cuda", "--offload group: .*or torchao"),
        ({"offload": "model"}, "cpu", "--offload model: there is no GPU here"),
        ({"transformer_precision": "fp8"}, "cpu", r"--transformer_precision fp8: .* no GPU \(cpu\); give int8"),
        ({"vae_precision": "fp8"}, "cpu", "--vae_precision fp8: needs a GPU of capability 8.9"),
    ],
    ids=str,
)
def test_what_does_not_go_is_refused_in_one_line(gpus, flags, device, said):
    with pytest.raises(ConfigError, match=said) as caught:
        resolve_levers(config(**flags), device)
    assert "\n" not in str(caught.value)


def test_fp8_is_refused_by_the_gpu_that_is_there(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"here is capability 8\.6"):
        resolve_levers(config(text_encoder_precision="fp8"), "cuda")
    assert float8.CAPABILITY == (8, 9)


def test_a_missing_library_and_several_processes_are_told(gpus, monkeypatch):
    monkeypatch.setattr(memory, "_is_installed", lambda library: library != "optimum.quanto")
    with pytest.raises(ConfigError, match=r"optimum.quanto is not installed; pip install"):
        resolve_levers(config(transformer_precision="int8", quantiser="quanto"), "cuda")
    with pytest.raises(ConfigError, match="2 processes would each take all GPUs"):
        resolve_levers(config(device_map="balanced"), "cuda", processes=2)


def test_the_recipe_tells_what_changed_the_frames(tiny_5b, tmp_path):
    told: dict[str, Any] = {
        "pretrained_model_name_or_path": str(tiny_5b),
        "prompt": PROMPT,
        "output_dir": str(tmp_path),
    }
    size: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 1}
    (video,) = generate(resolve(InferConfig(**told, **size, preset="low")))
    recipe = json.loads(video.path.with_suffix(".json").read_text())
    assert recipe["vae_tiling"] is True
    assert recipe["levers"] == {
        "transformer_precision": "int8",
        "text_encoder_precision": "int8",
        "vae_precision": "native",
        "quantiser": "torchao",
        "layerwise_casting": False,
        "compile": False,
    }
    (plain,) = resolve(InferConfig(**told, **size)).recipes
    assert plain.name != video.path.stem  # so that neither replaces the other


# Several processes


def test_shares_are_all_items_once(monkeypatch):
    items = list(range(7))
    dealt = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        dealt.append(own_share(items))
    assert sorted(item for share in dealt for item in share) == items
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="RANK=3 WORLD_SIZE=3: must be"):
        world()


@pytest.mark.slow
def test_two_processes_make_the_videos_of_one_bit_for_bit(tiny_5b, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue square\na green square\n", encoding="utf-8")
    words = ["-m", "infer", "--pretrained_model_name_or_path", str(tiny_5b), "--prompts", str(prompts)]
    words += ["--num_frames", "9", "--height", "32", "--width", "48", "--num_inference_steps", "2", "--output_dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, *words, str(tmp_path / "one")]
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    printed = [
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
        for command in (alone, [*launched, str(tmp_path / "two")])
    ]
    assert [done.stdout.count(".mp4  ") for done in printed] == [3, 3]
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.json")} for name in ("one", "two"))
    assert len(one) == 3
    assert one == two, "recipes, and with them the digests of the frames"
    for name in one:
        videos = [read_mp4((tmp_path / folder / name).with_suffix(".mp4")).astype(int) for folder in ("one", "two")]
        assert np.abs(videos[0] - videos[1]).mean() < 2, "x264 may code equal frames otherwise"
