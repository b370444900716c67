"""Validation videos: made by stage 3 of a checkpoint, equal to what it makes later, and never the end of a training."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pytest

from infer.__main__ import main as infer
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, CheckpointError, ConfigError
from shared.prompt_file import PromptRow
from tests.conftest import ROOT
from tests.training import column, facts_of, lora_of, train_here
from train import validation
from train.config import TrainConfig
from train.validate import main as validate
from train.validation import forget_later, is_due, make_videos

FLAGS = {"max_train_steps": 4, "validation_steps": 2, "validation_inference_steps": 2, "checkpointing_steps": 4}


def recipes(folder):
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.fixture(scope="module")
def validated(cache, tmp_path_factory):
    """A run with videos of its two prompts before the first step and after each two."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    assert train_here(cache, folder, **FLAGS, validate_first=True, guidance_scale=3.0) == 0
    return folder


def test_each_point_has_a_video_of_each_prompt(validated):
    made = sorted(path.name for path in (validated / "validation").iterdir())
    assert made == ["prompts.jsonl", "step-0", "step-2", "step-4"]
    for step in (0, 2, 4):
        found = recipes(validated / "validation" / f"step-{step}")
        assert {one["prompt"] for one in found.values()} == {"a blue square", "a red square"}
        assert {one["effective_prompt"] for one in found.values()} == {"SQR a blue square", "SQR a red square"}
        assert all(one["guidance_scale"] == 3.0 and one["num_inference_steps"] == 2 for one in found.values())
        assert all(one["loras"][0]["latentreel"]["step"] == step for one in found.values())


def test_they_are_what_infer_makes_of_the_checkpoint_later(validated, tmp_path):
    """With T5 for the embeddings, which the trainer's child took from the cache."""
    words = ["--lora", validated / "checkpoint-4", "--prompt", "a red square", "--num_inference_steps", "2"]
    assert infer([str(word) for word in (*words, "--guidance_scale", "3", "--output_dir", tmp_path)]) == 0
    ((name, later),) = recipes(tmp_path).items()
    made = recipes(validated / "validation" / "step-4")[name]
    assert made["frames_sha256"] == later["frames_sha256"]
    assert {key: value for key, value in made.items() if key != "loras"} == {
        key: value for key, value in later.items() if key != "loras"
    }


def test_the_lora_changes_what_is_seen(validated):
    before, after = (recipes(validated / "validation" / f"step-{step}") for step in (0, 4))
    assert {one["frames_sha256"] for one in before.values()}.isdisjoint(one["frames_sha256"] for one in after.values())


def test_videos_change_no_number_of_the_training(cache, validated, tmp_path):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2}
    train_here(cache, tmp_path / "run", **flags)
    assert facts_of(tmp_path / "run") == facts_of(validated)
    assert lora_of(tmp_path / "run") == lora_of(validated)


def test_a_prompt_that_the_cache_does_not_hold_is_refused_before_anything_is_loaded(cache, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--validation_prompt 'a cat': its embedding is not in data set squares; run"
    ):
        train_here(cache, tmp_path / "run", validation_prompt="a red square:::a cat", validation_steps=1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ({}, []),
        ({"validation_steps": 3}, [3, 6, 9]),
        ({"validation_epochs": 2}, [8]),
        ({"validate_first": True}, [0]),
        ({"validation_steps": 5, "validate_first": True}, [0, 5]),
    ],
)
def test_points_are_counted_in_steps_or_epochs(flags, due):
    assert [step for step in range(10) if is_due(TrainConfig(**flags), step, steps_per_epoch=4)] == due


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"validation_prompt": " ::: "}, r"--validation_prompt ' ::: ': holds no prompt; .* or leave it out"),
        ({"validation_prompt": ""}, r"--validation_prompt '': holds no prompt"),
        ({"validation_inference_steps": 1001}, r"--validation_inference_steps 1001; must be 1 to 1000"),
        ({"validation_inference_steps": 0}, r"--validation_inference_steps 0; must be 1 to 1000"),
        ({"guidance_scale": float("inf")}, r"--guidance_scale inf; must be a number of 0 or more"),
        ({"guidance_scale": -1.0}, r"--guidance_scale -1\.0; must be a number of 0 or more"),
    ],
)
def test_what_stage_3_would_refuse_each_time_is_refused_at_once(flags, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**flags)


BROKEN = {
    "fails": ("import sys; print('no memory left'); sys.exit(3)", "ended with status 3"),
    "is killed in the middle": (
        "import os, pathlib, signal, sys; folder = sys.argv[sys.argv.index('--output_dir') + 1]; "
        "pathlib.Path(folder, 'half.mp4').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)",
        "ended with status -9",
    ),
    "hangs": ("import time; time.sleep(600)", "took longer than --validation_timeout 1 s and was ended"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_whatever_stage_3_does_training_goes_on(cache, validated, tmp_path, monkeypatch, capfd, how):
    """With a tracker, which would be shown a video."""
    program, told = BROKEN[how]
    monkeypatch.setattr(validation, "CHILD", program)
    assert train_here(cache, tmp_path / "run", **FLAGS, validation_timeout=1, report_to="tensorboard") == 0
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]
    assert lora_of(tmp_path / "run") == lora_of(validated)
    printed = capfd.readouterr()
    assert printed.err.count(f"stage 3 {told}; see ") == 2
    assert "videos    0 of step 2" in printed.out
    if how == "fails":
        assert "no memory left" in (tmp_path / "run" / "validation" / "step-2" / "log.txt").read_text()


def test_a_folder_that_cannot_be_made_costs_the_videos_only(cache, validated, tmp_path, capsys):
    (tmp_path / "validation").write_text("in the way")
    config = TrainConfig(cache=str(cache), dataset="squares", output_dir=str(tmp_path))
    dataset = open_dataset(Cache(str(cache)), "squares")
    assert make_videos(config, dataset, [PromptRow("a red square")], validated / "checkpoint-2", 2) == []
    assert "warning   validation of step 2: stage 3 could not be started ([Errno 20]" in capsys.readouterr().err


def test_stage_3_does_not_take_itself_for_one_of_several(monkeypatch, tmp_path):
    """As a launcher tells this process, which is one."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with (tmp_path / "log").open("w+") as log:
        code = "import os; print(sorted(name for name in os.environ if name.endswith(('RANK', 'WORLD_SIZE'))))"
        assert validation._run([sys.executable, "-c", code], log, 60) is None
    assert (tmp_path / "log").read_text() == "[]\n"


def test_several_videos_of_a_prompt_have_seeds_of_their_own(cache, validated, tmp_path):
    dataset = open_dataset(Cache(str(cache)), "squares")
    config = TrainConfig(
        cache=str(cache), dataset="squares", output_dir=str(tmp_path), num_validation_videos=2,
        validation_inference_steps=1,
    )  # fmt: skip
    rows = [PromptRow("a red square"), PromptRow("a blue square", seed=7)]
    videos = make_videos(config, dataset, rows, validated / "checkpoint-2", 2)
    found = recipes(tmp_path / "validation" / "step-2")
    assert len(videos) == 4
    assert sorted((one["prompt"], one["seed"]) for one in found.values()) == [
        ("a blue square", 7), ("a blue square", 8), ("a red square", 42), ("a red square", 43),
    ]  # fmt: skip
    assert len({one["frames_sha256"] for one in found.values()}) == 4


def test_another_process_makes_those_of_checkpoints_that_have_none(cache, validated, tmp_path, capsys):
    run = shutil.copytree(validated, tmp_path / "run")
    made = recipes(run / "validation" / "step-4")
    shutil.rmtree(run / "validation" / "step-4")
    assert validate([str(run)]) == 0
    assert capsys.readouterr().out == f"videos    2 of step 4, in {run}/validation/step-4\n"
    again = recipes(run / "validation" / "step-4")
    assert {name: one["frames_sha256"] for name, one in again.items()} == {
        name: one["frames_sha256"] for name, one in made.items()
    }
    assert validate([str(run)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_watcher_sees_a_checkpoint_that_comes_later_and_ends_at_ctrl_c(validated, tmp_path):
    """It has made those of another one before, so that it has looked already."""
    run = shutil.copytree(validated, tmp_path / "run")
    for step in (2, 4):
        shutil.rmtree(run / "validation" / f"step-{step}")
    (run / "checkpoint-4").rename(tmp_path / "later")
    words = [sys.executable, "-m", "train.validate", str(run), "--watch", "--poll", "0.2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as watcher:
        try:
            assert watcher.stdout is not None
            assert "2 of step 2" in watcher.stdout.readline()
            (tmp_path / "later").rename(run / "checkpoint-4")
            assert "2 of step 4" in watcher.stdout.readline()
            watcher.send_signal(signal.SIGINT)
            assert watcher.communicate(timeout=60) == ("", "")
        finally:
            watcher.kill()
    assert watcher.returncode == 0
    assert all(len(recipes(run / "validation" / f"step-{step}")) == 2 for step in (2, 4))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json of a run"):
        validate([str(tmp_path)])


def test_what_a_run_that_goes_on_has_not_made_is_removed(tmp_path):
    for step in (0, 2, 4, 10):
        (tmp_path / "validation" / f"step-{step}").mkdir(parents=True)
    forget_later(tmp_path, 3)
    assert sorted(folder.name for folder in (tmp_path / "validation").iterdir()) == ["step-0", "step-2"]


def test_embeddings_of_another_dtype_or_none_are_refused(cache, validated, tmp_path):
    words = ["--lora", validated, "--output_dir", tmp_path, "--cache", cache, "--dataset", "squares"]
    with pytest.raises(CacheError, match=r"holds no embedding of 'SQR a cat'; leave --cache out, or run stage 1"):
        infer([str(word) for word in (*words, "--prompt", "a cat")])
    with pytest.raises(CacheError, match="its embeddings are of dtype float32, and the LoRA wants bfloat16"):
        infer([str(word) for word in (*words, "--prompt", "a red square", "--dtype", "bfloat16")])
