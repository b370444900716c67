"""The plan of inference: against the tracked peaks of real runs, and what it says of the published checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5EncoderModel

from infer.forecast import BOTH, PHASES, Work, forecast
from infer.generate import load_pipeline
from infer.memory import Levers, install
from infer.plan import main
from infer.published import GUIDE, PUBLISHED
from infer.quantise import quantise
from shared.errors import UserError
from shared.geometry import Bucket
from shared.ledger import Ledger
from shared.models import Checkpoint
from tests import tiny_model
from tests.conftest import run_command
from tests.full_size import NAMES, transformer_config
from tests.test_lora_inference import random_lora

BUCKET = Bucket(9, 128, 192)
WORK = Work(BUCKET, "float32", "float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint wide enough that its tensors are what is held."""
    folder = tiny_model.build(tmp_path_factory.mktemp("wide") / "model", "5b", heads=8, layers=4, vae_width=16)
    return Checkpoint(str(folder), None, None, folder)


def tracked(checkpoint: Checkpoint, levers: Levers, videos: int = 1) -> dict[str, int]:
    """The peaks of real tensors: T5 alone, a step of the transformer, decoding; as stage 3 runs them."""
    peaks = {}
    with torch.no_grad(), Ledger() as ledger:
        encoder = T5EncoderModel.from_pretrained(checkpoint.folder / "text_encoder").requires_grad_(False)
        quantise(encoder, levers.text_encoder_precision, levers.quantiser)
        ledger.label(encoder.parameters(), "weights")
        ledger.start_anew()
        encoder(torch.zeros(1, checkpoint.facts.max_text_seq_length, dtype=torch.long))
        peaks["text"] = ledger.peaks["device"].total
    del encoder
    with torch.no_grad(), Ledger() as ledger:
        scheduler = {**checkpoint.config("scheduler"), "_class_name": "CogVideoXDDIMScheduler"}
        pipeline = load_pipeline(checkpoint, scheduler, "float32")
        install(pipeline, levers, "cpu")
        for part in (pipeline.transformer, pipeline.vae):
            ledger.label([*part.parameters(), *part.buffers()], "weights")
        embeds = torch.zeros(videos, checkpoint.facts.max_text_seq_length, 32)
        ledger.start_anew()
        latents = pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            height=BUCKET.height,
            width=BUCKET.width,
            num_frames=BUCKET.frames,
            num_inference_steps=2,
            output_type="latent",
        ).frames
        peaks["denoise"] = ledger.peaks["device"].total
        ledger.start_anew()
        pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), output_type="pt")
        peaks["decode"] = ledger.peaks["device"].total
    return peaks


@pytest.mark.parametrize(
    "levers",
    [
        Levers(),
        Levers(transformer_precision="int8", text_encoder_precision="int8", vae_precision="int8", quantiser="torchao"),
        Levers(vae_tiling=True),
    ],
    ids=["plain", "int8", "tiles"],
)
def test_the_plan_agrees_with_a_real_run(wide, levers):
    planned, found = forecast(wide, WORK, levers), tracked(wide, levers)
    assert list(planned) == list(PHASES)
    for phase in PHASES:
        assert planned[phase] == pytest.approx(found[phase], rel=0.06), phase


@pytest.mark.parametrize("slicing", [True, False])
def test_videos_that_are_made_at_once_are_counted(wide, slicing):
    levers = Levers(vae_slicing=slicing)
    planned, found = forecast(wide, replace(WORK, videos=3), levers), tracked(wide, levers, videos=3)
    for phase in PHASES:
        assert planned[phase] == pytest.approx(found[phase], rel=0.06), phase
    one = forecast(wide, WORK, levers)
    assert planned["denoise"] > 1.3 * one["denoise"]
    assert planned["decode"] > (1.01 if slicing else 2) * one["decode"]


def parameter_bytes(checkpoint: Checkpoint, part: str) -> int:
    return sum(one.nbytes for path in checkpoint.weight_files(part) for one in load_file(path).values())


def test_offload_takes_away_the_weights_that_wait(wide):
    """By arithmetic over the weight files: models, then all but one layer, then all but two blocks."""
    none, model, layers, groups = (
        forecast(wide, WORK, Levers(offload=name)) for name in ("none", "model", "sequential", "group")
    )
    transformer, vae = (parameter_bytes(wide, part) for part in ("transformer", "vae"))
    assert none["denoise"] - model["denoise"] == pytest.approx(vae, rel=0.01)
    assert none["decode"] - model["decode"] == pytest.approx(transformer, rel=0.01)
    (file,) = wide.weight_files("transformer")
    block = sum(one.nbytes for name, one in load_file(file).items() if name.startswith("transformer_blocks.0."))
    # 2 of 4 blocks are there at once; and the VAE, which is not moved
    assert model["denoise"] + vae - groups["denoise"] == pytest.approx(2 * block, rel=0.01)
    assert layers["denoise"] < groups["denoise"]
    assert none["text"] - groups["text"] > 0.5 * parameter_bytes(wide, "text_encoder")
    assert layers["text"] <= groups["text"]


def test_a_lora_guidance_and_a_second_gpu_are_seen(wide):
    plain = forecast(wide, WORK, Levers())
    with_lora = forecast(wide, replace(WORK, rank=64), Levers())
    unguided = forecast(wide, replace(WORK, guided=False), Levers())
    split = forecast(wide, WORK, Levers(device_map="balanced"))
    assert with_lora["denoise"] > plain["denoise"]
    assert with_lora["text"] == plain["text"]
    weights = parameter_bytes(wide, "transformer") + parameter_bytes(wide, "vae")
    assert unguided["denoise"] - weights == pytest.approx((plain["denoise"] - weights) / BOTH, rel=0.2)
    assert plain["denoise"] - split["denoise"] == pytest.approx(parameter_bytes(wide, "transformer") / 2, rel=0.2)


@pytest.mark.parametrize("offload", ["none", "sequential", "group"])
def test_layerwise_casting_is_seen(wide, offload):
    cast, whole = (forecast(wide, WORK, Levers(layerwise_casting=on, offload=offload)) for on in (True, False))
    assert cast["denoise"] <= whole["denoise"] - (100_000 if offload != "sequential" else 0)
    assert cast["decode"] <= whole["decode"]


def test_a_plan_leaves_nothing_behind(wide):
    state = torch.random.get_rng_state()
    forecast(wide, replace(WORK, rank=3), Levers())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_the_published_configs_are_those_of_the_full_size_tests():
    by_name = {one.name: one for one in PUBLISHED}
    assert set(by_name) == set(NAMES.values())
    assert set(GUIDE) < set(by_name)
    for kind, name in NAMES.items():
        ours, expected = by_name[name].config("transformer"), transformer_config(kind)
        assert {**ours, **expected} == ours
        assert {**tiny_model.KINDS[kind]["vae"], **by_name[name].config("vae")} == by_name[name].config("vae")
        assert by_name[name].facts.image_to_video == name.endswith("I2V")


def plan(*words: Any, capsys) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize(("number", "billions"), [(0, 1.69), (1, 5.57), (3, 5.57)])
def test_the_published_models_have_their_real_sizes(number, billions):
    """In thousand million parameters, with what a step of a small clip takes beside them; T5 v1.1 XXL has 4.76."""
    one = PUBLISHED[number]
    work = Work(Bucket(49, 128, 128), "bfloat16", "bfloat16", guided=False)
    planned = forecast(one, work, Levers(offload="model", vae_tiling=True))
    table = 17776 * 1920 * 8 if number == 0 else 0  # of positions, in float64
    assert (planned["denoise"] - table) / 2e9 == pytest.approx(billions, rel=0.06)
    assert planned["text"] / 2e9 == pytest.approx(4.76, rel=0.02)


def test_the_table_has_a_row_for_each_preset_and_json_its_bytes(wide, capsys):
    size = ("--num_frames", 9, "--height", 64, "--width", 96)
    words = ("--pretrained_model_name_or_path", wide.folder, *size)
    rows = [line.split()[0] for line in plan(*words, capsys=capsys).splitlines()]
    assert rows[2:7] == ["quality", "balanced", "low", "lowest", "2"]
    found = json.loads(plan(*words, "--json", "--preset", "low", capsys=capsys))["rows"]
    assert len(found) == 1
    assert found[0]["peak_device_bytes"] == max(found[0]["phases"].values())
    assert found[0]["guide_gb"] is None
    mapped = json.loads(plan(*words, "--json", "--device_map", "balanced", capsys=capsys))["rows"]
    assert [row["preset"] for row in mapped] == ["2 GPUs"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device_map", "balanced", "--offload", "sequential"), "--device_map balanced: keeps all weights"),
        (("--lora", "nowhere"), "--lora nowhere: no such file"),
        (("--lora", "run", "--rank", "8"), "--rank 8 with --lora run, whose file says it"),
        (("--rank", "-1"), "--rank -1; must be at least 0"),
        (("--guidance_scale", "nan"), "--guidance_scale nan"),
        (("--batch_size", "0"), "--batch_size 0; must be at least 1"),
        (("--recipe", "a.json"), "--recipe a.json: a plan reads none"),
        (("--height", "50"), "height 50: must be a multiple of 16"),
    ],
)
def test_a_mistake_is_told(words, said):
    with pytest.raises(UserError, match=said):
        main(list(words))


def test_a_runs_command_is_planned_as_it_stands(wide, tmp_path, capsys):
    """Base, size and rank of the LoRA; of a file's rows the largest; what changes no memory is taken, too."""
    lora = random_lora(wide.folder, tmp_path, frames=9, height=64, width=96)[1]
    (tmp_path / "rows.csv").write_text("prompt,height,seed\na cat,,7\na dog,128,\n")
    words = ("--lora", f"{lora}:0.5", "--prompts", tmp_path / "rows.csv", "--seed", 3, "--output_dir", "v", "--json")
    (row,) = json.loads(plan(*words, "--preset", "balanced", capsys=capsys))["rows"]
    assert (row["checkpoint"], row["bucket"], row["dtype"], row["rank"]) == (str(wide.folder), "9x128x96", "float32", 4)
    alone = (
        "--pretrained_model_name_or_path",
        wide.folder,
        "--height",
        128,
        "--width",
        96,
        "--num_frames",
        9,
        "--json",
    )
    (bare,) = json.loads(plan(*alone, "--rank", 4, "--preset", "balanced", capsys=capsys))["rows"]
    assert row == bare
    (other,) = json.loads(plan(*alone, "--preset", "balanced", capsys=capsys))["rows"]
    assert other["phases"]["denoise"] < bare["phases"]["denoise"]


def test_without_t5_there_is_no_phase_of_it(wide, capsys):
    words = ("--pretrained_model_name_or_path", wide.folder, "--num_frames", 9, "--height", 64, "--width", 96, "--json")
    for row in json.loads(plan(*words, "--cache", "cache", capsys=capsys))["rows"]:
        assert row["phases"]["text"] == 0
        assert row["peak_device_bytes"] == max(row["phases"]["denoise"], row["phases"]["decode"])


def test_help_and_typos_of_the_plan_load_no_torch():
    code = (
        "import sys\n"
        "from infer.plan import main\n"
        "for argv in (['--help'], ['--no_such_flag']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: print(end.code, file=sys.stderr)\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    done = run_command("-c", code)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line in "012"] == ["0", "2"]
