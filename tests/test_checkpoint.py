"""Checkpoints: whole or not there, refused by name when torn or foreign, rotated once the new one stands."""

import json
import shutil
from dataclasses import fields

import pytest
from safetensors import safe_open

from shared.cache import Cache
from shared.dataset import open_dataset, publish_dataset
from shared.errors import CheckpointError, ConfigError
from shared.lora import read_metadata
from shared.storage import FileLock
from tests.training import facts_of, lora_of, only_line, rows_of, train_here
from train import loop
from train.checkpoint import FIXED, list_checkpoints, read_state, rotate_checkpoints
from train.config import TrainConfig

FILES = ("pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """A run of six steps that kept its last three checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train_here(cache, folder, max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=3) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def resume(cache, run, step="latest", **flags):
    return train_here(
        cache, run, **{"max_train_steps": 6, "checkpointing_steps": 1, **flags}, resume_from_checkpoint=step
    )


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr("train.setup.load_transformer", lambda *_: pytest.fail("weights were loaded"))


# --- what a checkpoint is


def test_a_checkpoint_holds_the_lora_of_its_step(finished):
    for folder in list_checkpoints(finished):
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
        step = int(folder.name.rpartition("-")[2])
        adapter, facts = read_metadata(folder / FILES[0])
        assert adapter is not None
        assert facts is not None
        assert (facts.step, facts.rank, facts.alpha, adapter["transformer.lora_alpha"]) == (step, 4, 2, 2)
    assert lora_of(finished / "checkpoint-6") == lora_of(finished)
    assert lora_of(finished / "checkpoint-5") != lora_of(finished)


def test_a_checkpoint_of_a_finished_run_reads_back(finished, cache):
    state = read_state(finished / "checkpoint-5")
    assert state["step"] == 5
    assert state["position"]["dataset_digest"] == open_dataset(Cache(str(cache)), "squares").digest
    with (
        safe_open(finished / "checkpoint-5" / FILES[1], "pt") as optimizer,
        safe_open(finished / "checkpoint-5" / FILES[0], "pt") as lora,
    ):
        assert len(optimizer.keys()) == 3 * len(lora.keys())  # step, first and second moment of each matrix


# --- rotation


def test_rotation_keeps_the_newest(finished):
    assert names(finished) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_rotation_counts_steps_not_letters(tmp_path):
    for step in (5, 100, 20, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    rotate_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-100"]
    assert (tmp_path / "checkpoint-best").exists()


def test_without_a_limit_all_are_kept(run):
    rotate_checkpoints(run, None)
    assert len(names(run)) == 3


def test_the_old_checkpoint_goes_only_once_the_new_one_stands(cache, tmp_path, monkeypatch):
    before, after = [], []

    def rotate(output_dir, limit):
        newest = list_checkpoints(output_dir)[-1]
        assert read_state(newest)["step"] == rows_of(output_dir)[-1]["step"]  # whole, and its rows are there
        before.append(names(output_dir))
        rotate_checkpoints(output_dir, limit)
        after.append(names(output_dir))

    monkeypatch.setattr(loop, "rotate_checkpoints", rotate)
    train_here(cache, tmp_path / "run", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1)
    assert before == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert after == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]


def test_what_a_killed_run_left_of_a_checkpoint_goes_with_the_next_one(run):
    for name in (".checkpoint-9.tmp", ".checkpoint-4.old"):
        shutil.copytree(run / "checkpoint-4", run / name)
    rotate_checkpoints(run, 2)
    assert names(run) == ["checkpoint-5", "checkpoint-6"]
    assert not list(run.glob(".checkpoint*"))


# --- torn


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_a_changed_byte_is_refused_and_the_one_before_offered(run, file):
    torn = run / "checkpoint-6" / file
    size = torn.stat().st_size
    for place in range(0, size, max(size // 150, 1)):
        flip(torn, place)
        with pytest.raises(CheckpointError, match=rf"^{run}/checkpoint-6.*resume from {run}/checkpoint-5$"):
            read_state(run / "checkpoint-6")
        flip(torn, place)
    assert read_state(run / "checkpoint-6")["step"] == 6


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["missing", "empty", "short"])
@pytest.mark.usefixtures("no_weights")
def test_a_torn_checkpoint_is_refused_before_any_weight_is_loaded(cache, run, file, harm):
    path = run / "checkpoint-6" / file
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if harm == "empty" else path.read_bytes()[:-1])
    rows = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint-6.*; resume from .*checkpoint-5") as caught:
        resume(cache, run)
    only_line(str(caught.value))
    assert (run / "metrics.jsonl").read_bytes() == rows


def test_only_earlier_checkpoints_are_offered(run):
    for step in (4, 5, 6):
        flip(run / f"checkpoint-{step}" / FILES[1], 100)
    with pytest.raises(CheckpointError, match=r"resume from .*checkpoint-4$"):
        read_state(run / "checkpoint-5")
    with pytest.raises(CheckpointError, match=r"; start anew in another --output_dir$"):
        read_state(run / "checkpoint-4")


@pytest.mark.usefixtures("no_weights")
def test_a_checkpoint_that_is_not_there_is_refused(cache, run):
    with pytest.raises(CheckpointError, match=r"checkpoint-99.*resume from .*checkpoint-6"):
        resume(cache, run, run / "checkpoint-99")
    with pytest.raises(CheckpointError, match=rf"^{run}/checkpoint-99: torn .*resume from {run}/checkpoint-6"):
        resume(cache, run, "checkpoint-99")


def test_another_format_is_refused(run):
    path = run / "checkpoint-6" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="not a checkpoint of format 1"):
        read_state(run / "checkpoint-6")


# --- foreign


@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [
        ("seed", 7, 42),
        ("rank", 8, 4),
        ("lora_alpha", 4.0, 2.0),
        ("max_train_steps", 9, 6),
        ("learning_rate", 0.5, 0.01),
        ("lr_scheduler", "cosine", "constant"),
        ("optimizer", "adam", "adamw"),
        ("scale_lr", True, False),
        ("caption_dropout", 0.5, 0.0),
        ("timestep_sampling", "uniform", "stratified"),
        ("max_grad_norm", 2.0, 1.0),
        ("use_rslora", True, False),
        ("use_dora", True, False),
        ("lora_dropout", 0.1, 0.0),
        ("ema_decay", 0.9, None),
        ("loss_weighting", "min_snr", "none"),
        ("min_snr_gamma", 1.0, 5.0),
        ("min_snr_floor", 0.2, 0.05),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_checkpoint_of_other_settings_is_refused_by_field(cache, run, flag, value, was):
    told = (run / "config.json").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        resume(cache, run, **{flag: value})
    line = only_line(str(caught.value))
    assert line.startswith(f"{run / 'checkpoint-6'}: {flag} was {was!r} and is now {value!r}; ")
    assert (run / "config.json").read_bytes() == told


@pytest.mark.usefixtures("no_weights")
def test_other_target_modules_are_refused(cache, run):
    with pytest.raises(CheckpointError, match=r"target_modules was \['to_k', .* and is now \['to_q'\]"):
        resume(cache, run, target_modules="to_q")


@pytest.mark.usefixtures("no_weights")
def test_another_precision_is_refused(cache, run):
    with pytest.raises(CheckpointError, match="dtype was 'float32' and is now 'bfloat16'"):
        resume(cache, run, mixed_precision="bf16")


@pytest.mark.usefixtures("no_weights")
def test_another_version_of_the_data_set_is_refused(cache_copy, run):
    cache = Cache(str(cache_copy))
    dataset = open_dataset(cache, "squares")
    info = {name: dataset.info[name] for name in dataset.info.keys() - {"name", "digest", "format_version", "samples"}}
    rows = dataset._file.read().to_pylist()[:-1]
    with cache.writer() as writer:
        digest = publish_dataset(cache, writer, "squares", info, rows, [], dict)
    with pytest.raises(CheckpointError, match=f"dataset_digest was '{dataset.digest}' and is now '{digest}'"):
        resume(cache_copy, run)


@pytest.mark.usefixtures("no_weights")
def test_another_base_model_is_refused(cache, run, tiny_5b):
    with pytest.raises(CheckpointError, match=f"base_model was .* and is now '{tiny_5b}'"):
        resume(cache, run, pretrained_model_name_or_path=tiny_5b)


def test_another_commit_of_the_base_model_is_refused(cache, tiny_2b, tmp_path, monkeypatch):
    """A branch of the hub that has moved on: other weights under the same name."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commits = ["c0ffee" * 6 + "c0ff", "decaf0" * 6 + "deca"]
    for commit in commits:
        shutil.copytree(tiny_2b, tmp_path / "models--org--tiny" / "snapshots" / commit)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    branch = tmp_path / "models--org--tiny" / "refs" / "main"
    branch.write_text(commits[0])
    flags = {
        "pretrained_model_name_or_path": "org/tiny",
        "cache_dir": tmp_path,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
    }
    assert train_here(cache, tmp_path / "run", **flags) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    branch.write_text(commits[1])
    with pytest.raises(CheckpointError, match=f"base_revision was '{commits[0]}' and is now '{commits[1]}'"):
        train_here(cache, tmp_path / "run", **flags, resume_from_checkpoint="latest")
    assert train_here(cache, tmp_path / "run", **flags, revision=commits[0], resume_from_checkpoint="latest") == 0


# Flags that change no number of a run, but for roundings on some devices: how it reads, writes, looks, uses memory.
FREE = {
    "cache", "output_dir", "cache_dir", "gradient_checkpointing", "allow_dtype", "stream_blocks", "offload_activations",
    "ff_chunks", "compile", "optimizer_offload", "dataloader_num_workers", "prefetch", "local_cache",
    "local_cache_size", "nccl_timeout", "bad_samples", "max_bad_steps", "holdout_steps", "log_steps",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to", "tracker_name",
    "logging_dir", "push_to_hub", "hub_model_id", "hub_token", "hub_license", "validation_prompt",
    "validation_prompts", "validation_prompt_separator", "validation_images", "num_validation_videos",
    "validation_epochs", "validation_steps", "validate_first", "validation_inference_steps", "validation_timeout",
    "guidance_scale", "use_dynamic_cfg",
}  # fmt: skip
# What is compared as it comes out, by the flags that it comes of.
COMPARED = {
    "base_model": {"pretrained_model_name_or_path"}, "base_revision": {"revision"}, "base_variant": {"variant"},
    "dtype": {"mixed_precision"}, "held_out": {"holdout", "holdout_dataset"}, "dataset": {"dataset"},
    "max_train_steps": {"max_train_steps", "num_train_epochs"}, "init_lora": {"init_lora"},
    "global_batch": {"train_batch_size", "gradient_accumulation_steps"}, "target_modules": {"target_modules"},
    "dataset_digest": set(), "random_flip": set(),
}  # fmt: skip


def test_every_flag_is_compared_or_changes_no_number(finished):
    position = set(json.loads((finished / "checkpoint-6" / "state.json").read_text())["position"])
    assert position == {*FIXED, *COMPARED}
    flags = {field.name for field in fields(TrainConfig)}
    assert flags == {*FIXED, *FREE}.union(*COMPARED.values())
    assert not set(FIXED) & FREE


@pytest.mark.usefixtures("no_weights")
def test_a_batch_that_the_global_batch_is_no_multiple_of_is_refused(cache, run):
    with pytest.raises(ConfigError, match="global batch of 1 cannot be dealt to 1 processes with --train_batch_size 2"):
        resume(cache, run, train_batch_size=2)


# --- starting where something is


@pytest.mark.usefixtures("no_weights")
def test_a_plain_start_over_checkpoints_is_refused(cache, run):
    rows = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"holds checkpoint-6; go on from it with --resume_from_checkpoint latest"
    ):
        train_here(cache, run, max_train_steps=6)
    assert (run / "metrics.jsonl").read_bytes() == rows


def test_latest_starts_anew_where_there_is_none_and_says_so(cache, tmp_path, capsys):
    assert train_here(cache, tmp_path / "run", max_train_steps=1, resume_from_checkpoint="latest") == 0
    assert f"{tmp_path / 'run'} holds no checkpoint; the run starts anew" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "run")) == 1


def test_a_finished_run_has_nothing_left_to_do(cache, run, monkeypatch):
    rows, lora = (run / "metrics.jsonl").read_bytes(), lora_of(run)
    (run / FILES[0]).unlink()  # killed between the last checkpoint and the final file
    monkeypatch.setattr(loop, "take_step", lambda *_: pytest.fail("a step was taken"))
    assert resume(cache, run) == 0
    assert (run / "metrics.jsonl").read_bytes() == rows
    assert lora_of(run) == lora


@pytest.mark.usefixtures("no_weights")
def test_a_second_run_on_a_live_folder_is_refused(cache, run):
    with FileLock(run / ".lock"):
        with pytest.raises(CheckpointError, match=r"another run is writing there; wait for it, or give another"):
            resume(cache, run)


@pytest.mark.parametrize("named", ["checkpoint-4", "path"])
def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(cache, finished, run, capsys, named):
    assert resume(cache, run, run / "checkpoint-4" if named == "path" else named, checkpointing_steps=6) == 0
    assert f"set aside {run / 'aside-checkpoint-5'}" in capsys.readouterr().out
    assert names(run) == ["checkpoint-4", "checkpoint-6"]
    assert (run / "aside-checkpoint-6" / "state.json").exists()
    assert facts_of(run) == facts_of(finished)
    assert lora_of(run) == lora_of(finished)
