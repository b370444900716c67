"""The guide's flags: each is where docs/flags.md says, and the guide's own command runs, in two."""

import dataclasses
import importlib
import json
import re
import shlex
from typing import Any

import pytest
import torch

from preprocess.config import PreprocessConfig
from shared.cache import Cache
from shared.config import parse_config
from shared.dataset import open_dataset
from shared.errors import CheckpointError
from tests.conftest import ROOT, moving_square, run_command, write_video
from tests.test_trackers import wandb_history
from tests.training import column, facts_of, lora_of, rows_of, train_here
from train.base import open_base
from train.config import TrainConfig
from train.draws import draw_timestep
from train.optim import make_optimizer

CONFIGS = {"1": "preprocess:PreprocessConfig", "2": "train:TrainConfig", "3": "infer:InferConfig"}

# Of diffusers' examples/cogvideo, in the order of their parsers: train_cogvideox_lora.py, and what the image-to-video
# script has besides.
GUIDE_NAMES = """
pretrained_model_name_or_path revision variant cache_dir dataset_name dataset_config_name instance_data_root
video_column caption_column id_token dataloader_num_workers validation_prompt validation_prompt_separator
num_validation_videos validation_epochs guidance_scale use_dynamic_cfg seed rank lora_alpha mixed_precision
output_dir height width video_reshape_mode fps max_num_frames skip_frames_start skip_frames_end random_flip
train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
lr_power enable_slicing enable_tiling optimizer use_8bit_adam adam_beta1 adam_beta2 prodigy_beta3 prodigy_decouple
adam_weight_decay adam_epsilon max_grad_norm prodigy_use_bias_correction prodigy_safeguard_warmup tracker_name
push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to validation_images noised_image_dropout
nccl_timeout
"""
GUIDE_FLAGS = GUIDE_NAMES.split()

# Its README, from the script's name on.
GUIDE_COMMAND = r"""
  --pretrained_model_name_or_path THUDM/CogVideoX-2b \
  --cache_dir <CACHE_DIR> \
  --instance_data_root <PATH_TO_WHERE_VIDEO_FILES_ARE_STORED> \
  --dataset_name my-awesome-name/my-awesome-dataset \
  --caption_column <CAPTION_COLUMN> \
  --video_column <PATH_TO_VIDEO_COLUMN> \
  --id_token <ID_TOKEN> \
  --validation_prompt "<ID_TOKEN> Spiderman swinging over buildings:::A panda, dressed in a small, red jacket and a tiny hat, sits on a wooden stool in a serene bamboo forest. The panda's fluffy paws strum a miniature acoustic guitar, producing soft, melodic tunes. Nearby, a few other pandas gather, watching curiously and some clapping in rhythm. Sunlight filters through the tall bamboo, casting a gentle glow on the scene. The panda's face is expressive, showing concentration and joy as it plays. The background includes a small, flowing stream and vibrant green foliage, enhancing the peaceful and magical atmosphere of this unique musical performance" \
  --validation_prompt_separator ::: \
  --num_validation_videos 1 \
  --validation_epochs 10 \
  --seed 42 \
  --rank 64 \
  --lora_alpha 64 \
  --mixed_precision fp16 \
  --output_dir /raid/aryan/cogvideox-lora \
  --height 480 --width 720 --fps 8 --max_num_frames 49 --skip_frames_start 0 --skip_frames_end 0 \
  --train_batch_size 1 \
  --num_train_epochs 30 \
  --checkpointing_steps 1000 \
  --gradient_accumulation_steps 1 \
  --learning_rate 1e-3 \
  --lr_scheduler cosine_with_restarts \
  --lr_warmup_steps 200 \
  --lr_num_cycles 1 \
  --enable_slicing \
  --enable_tiling \
  --optimizer Adam \
  --adam_beta1 0.9 \
  --adam_beta2 0.95 \
  --max_grad_norm 1.0 \
  --report_to wandb
"""  # noqa: E501


def fields_of(stage):
    """The flags of a stage, by its number."""
    package, _, name = CONFIGS[stage].partition(":")
    return {field.name for field in dataclasses.fields(getattr(importlib.import_module(f"{package}.config"), name))}


def table():
    """docs/flags.md: of each flag of the guide the places that it went to: (flag, stage)."""
    rows = {}
    for line in (ROOT / "docs" / "flags.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and re.fullmatch(r"`--\w+`", cells[0]):
            places = re.findall(r"`--(\w+)` \(([123, ]+)\)", cells[1])
            assert len(places) == cells[1].count("`--"), f"cannot be read: {cells[1]}"
            assert cells[0][3:-1] not in rows, f"twice: {cells[0]}"
            rows[cells[0][3:-1]] = [(name, stage.strip()) for name, stages in places for stage in stages.split(",")]
    return rows


# --- the table


def test_every_flag_of_the_guide_has_its_row_and_no_other_has():
    assert sorted(table()) == sorted(GUIDE_FLAGS)
    assert all(table().values())


@pytest.mark.parametrize("flag", GUIDE_FLAGS)
def test_a_flag_is_where_its_row_says(flag):
    for name, stage in table()[flag]:
        assert name in fields_of(stage), f"stage {stage} has no --{name}"


@pytest.mark.parametrize("flag", GUIDE_FLAGS)
def test_a_row_names_every_stage_that_has_the_flag(flag):
    told = {stage for name, stage in table()[flag] if name == flag}
    assert {stage for stage in CONFIGS if flag in fields_of(stage)} <= told


# --- the guide's command


def split_as_documented(words):
    """The words of the guide's command that are for stage 1, and those for stage 2; as the table says."""
    rows, flag = table(), ""
    parts: dict[str, list[str]] = {"1": [], "2": []}
    for word in words:
        if word.startswith("--"):
            flag = word.removeprefix("--")
        for name, stage in rows[flag]:
            if stage in parts:
                parts[stage].append(f"--{name}" if word.startswith("--") else word)
    return parts["1"], parts["2"]


def test_the_guides_command_split_is_the_one_of_the_docs():
    """With the placeholders of the docs, but for what they leave out: the end of the long prompt, a folder's path."""
    command = re.sub(r"<(\w+)>", r"\1", GUIDE_COMMAND.replace("\\\n", " "))
    command = re.sub(r"A panda, dressed[^\"]*", "A panda", command).replace("/raid/aryan/", "")
    command = command.replace("PATH_TO_WHERE_VIDEO_FILES_ARE_STORED", "VIDEOS").replace("CAPTION_COLUMN", "CAPTIONS")
    first, second = split_as_documented(shlex.split(command.replace("PATH_TO_VIDEO_COLUMN", "PATHS")))
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for stage, words in (("preprocess", first), ("train", second)):
        (line,) = re.findall(rf"^    python -m {stage} +(--pre.*)$", text, re.MULTILINE)
        assert sorted(pairs(shlex.split(line))) == sorted(pairs(words))


def pairs(words):
    """Flags with their values."""
    found: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return found


@pytest.mark.slow
def test_the_guides_command_runs_in_two(tiny_2b, tmp_path):
    """Word for word but for paths, model, size, frames, steps and precision."""
    from preprocess.__main__ import main

    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    for number in range(3):
        write_video(data / "videos" / f"{number}.mp4", moving_square(number))
    lines = [f'"""a square, the {number} of three""","""videos/{number}.mp4"""' for number in range(3)]  # as its README
    (data / "metadata.csv").write_text("\n".join(["text,path", *lines]))
    changed = {
        "pretrained_model_name_or_path": tiny_2b, "cache_dir": tmp_path / "hub", "instance_data_root": data,
        "dataset_name": data / "metadata.csv", "caption_column": "text", "video_column": "path", "id_token": "SQR",
        "mixed_precision": "no", "output_dir": tmp_path / "run",
        "height": 64, "width": 96, "max_num_frames": 9, "num_train_epochs": 2,
    }  # fmt: skip
    words: list[str] = []
    for flag, *values in pairs(shlex.split(GUIDE_COMMAND.replace("\\\n", " "))):
        name = flag.removeprefix("--")
        words += [flag, *([str(changed.pop(name))] if name in changed else values)]
    assert not changed
    first, second = split_as_documented(words)
    assert {word for word in words if word.startswith("--")} <= {*first, *second}, "nothing of the command is lost"

    cache = ["--cache", str(tmp_path / "cache")]
    assert main([*first, *cache]) == 0
    captions = open_dataset(Cache(str(tmp_path / "cache")), "default").columns("caption")["caption"].to_pylist()
    assert captions == [f"a square, the {number} of three" for number in range(3)]
    done = run_command("-m", "train", *second, *cache)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert column(tmp_path / "run", "lr") == pytest.approx([1e-3 * step / 200 for step in range(6)])
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["rank"], config["lora_alpha"], config["optimizer"], config["report_to"]) == (64, 64, "adam", "wandb")
    (tracked,) = (tmp_path / "run").rglob("*.wandb")
    history, _ = wandb_history(tracked)
    assert [history[step]["loss"] for step in sorted(history)] == [row["loss"] for row in rows]


# --- what flags do to a run


def test_scale_lr_multiplies_by_the_global_batch_and_a_resume_keeps_it(cache, tmp_path):
    flags = {"lr_scheduler": "linear", "learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 2}
    train_here(cache, tmp_path / "plain", **flags, train_batch_size=2, gradient_accumulation_steps=2)
    train_here(cache, tmp_path / "run", **flags, train_batch_size=2, gradient_accumulation_steps=2, scale_lr=True)
    rates = column(tmp_path / "run", "lr")
    assert rates == pytest.approx([4 * rate for rate in column(tmp_path / "plain", "lr")])
    assert rates[0] == pytest.approx(4e-3)
    whole, lora = facts_of(tmp_path / "run"), lora_of(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2"
    # accumulation follows the checkpoint's global batch, whatever is asked for
    train_here(cache, tmp_path / "run", **flags, train_batch_size=2, scale_lr=True, resume_from_checkpoint=folder)
    assert facts_of(tmp_path / "run") == whole
    assert lora_of(tmp_path / "run") == lora


@pytest.fixture
def float32_products():
    """PyTorch's setting, off, and after the test as it was."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    yield
    matmul.allow_tf32 = before


@pytest.mark.parametrize("allow", [False, True])
def test_allow_tf32_sets_what_cuda_multiplies_float32_with(cache, tmp_path, monkeypatch, float32_products, allow):
    seen = []

    def look(*args):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()))
        return make_optimizer(*args)

    monkeypatch.setattr("train.setup.make_optimizer", look)
    train_here(cache, tmp_path / "run", max_train_steps=1, allow_tf32=allow)
    assert seen == [(allow, "high" if allow else "highest")]


def test_a_run_is_not_gone_on_from_with_other_products(cache, tmp_path, float32_products):
    train_here(cache, tmp_path / "run", max_train_steps=1)
    with pytest.raises(CheckpointError, match="checkpoint-1: allow_tf32 was False and is now True"):
        train_here(cache, tmp_path / "run", max_train_steps=1, allow_tf32=True, resume_from_checkpoint="latest")


def test_logging_dir_is_where_a_tracker_writes(cache, tmp_path):
    train_here(cache, tmp_path / "run", max_train_steps=1, report_to="TensorBoard", logging_dir="boards")
    assert list((tmp_path / "run" / "boards" / "latentreel").glob("events.out.tfevents.*"))
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("given", "separator", "prompts"),
    [
        ("a cat:::a dog", ":::", ["a cat", "a dog"]),
        ("a cat, walking | a dog:::s", "|", ["a cat, walking", "a dog:::s"]),
        ("a cat||", "|", ["a cat"]),
    ],
)
def test_validation_prompts_are_cut_at_the_separator(given, separator, prompts):
    words = ["--pretrained_model_name_or_path", "m", "--validation_prompt", given]
    config = parse_config(
        PreprocessConfig, [*words, "--validation_prompt_separator", separator], "python -m preprocess"
    )
    assert [row.prompt for row in config.validation_rows] == prompts


def test_a_schedule_with_rules_reaches_the_run(cache, tmp_path):
    train_here(
        cache, tmp_path / "run", max_train_steps=5, learning_rate=1e-3, lr_scheduler="Piecewise_Constant",
        lr_step_rules="1:2,0.5:4,0.1",
    )  # fmt: skip
    assert column(tmp_path / "run", "lr") == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 1e-4])


@pytest.mark.parametrize("most", [0.0, 1e-3, 1e3])
def test_gradients_are_scaled_down_to_their_most_and_no_further(cache, tmp_path, monkeypatch, most):
    """Seen through plain descent at a rate of 1, whose step is the gradient: Adam's hardly knows its size."""
    moved: list[float] = []

    class Descent(torch.optim.SGD):
        def step(self, closure=None):
            owned = self.param_groups[0]["params"]
            before = [parameter.detach().clone() for parameter in owned]
            super().step()
            moved.append(torch.nn.utils.get_total_norm([a - b for a, b in zip(owned, before, strict=True)]).item())

    monkeypatch.setattr("train.setup.make_optimizer", lambda config, parameters, _: Descent(parameters, lr=1.0))
    train_here(cache, tmp_path / "run", max_train_steps=1, max_grad_norm=most)
    (norm,) = column(tmp_path / "run", "grad_norm")
    assert 2e-3 < norm < 1e3
    assert moved == [pytest.approx(most if most == 1e-3 else norm, rel=1e-3)]


@pytest.mark.parametrize("kind", ["stratified", "uniform"])
def test_timesteps_are_drawn_as_they_are_asked_for(cache, tmp_path, kind):
    train_here(cache, tmp_path / "run", max_train_steps=2, train_batch_size=4, timestep_sampling=kind)
    for row in rows_of(tmp_path / "run"):
        step, places = row["step"] - 1, range(len(row["samples"]))
        asked = [draw_timestep(42, step, place, 4, stratified=kind == "stratified") for place in places]
        assert row["timesteps"] == asked
        assert asked != [draw_timestep(42, step, place, 4, stratified=kind != "stratified") for place in places]


@pytest.mark.parametrize(
    ("flags", "name", "revision", "variant"),
    [
        ({}, "org/made", "abc", "fp16"),
        ({"revision": "main"}, "org/made", "main", "fp16"),
        ({"variant": "bf16"}, "org/made", "abc", "bf16"),
        ({"pretrained_model_name_or_path": "org/other"}, "org/other", None, None),
        ({"pretrained_model_name_or_path": "org/other", "revision": "r", "variant": "v"}, "org/other", "r", "v"),
    ],
)
def test_the_checkpoint_is_the_one_asked_for_or_the_data_sets(monkeypatch, flags, name, revision, variant):
    """A revision or variant of the one is not taken for the other."""
    opened: list[Any] = []
    monkeypatch.setattr("train.base.open_checkpoint", lambda *words, **given: opened.append((*words, given)))
    made_with = {"name": "org/made", "revision": "abc", "variant": "fp16"}
    open_base(TrainConfig(**flags, cache_dir="hub"), made_with)
    assert opened == [
        (name, {"revision": revision, "variant": variant, "cache_dir": "hub", "weights": ("transformer",)})
    ]
