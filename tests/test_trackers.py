"""What trackers are given, read back from the files that they write."""

import json
import struct
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.errors import ConfigError
from tests.conftest import moving_square, run_command, write_video
from tests.training import only_line, rows_of, train_here
from train import trackers
from train.config import TrainConfig
from train.record import row_digest
from train.trackers import chosen_trackers, holdout_scalars, step_scalars, track_videos

ROW = {
    "step": 7, "epoch": 1, "loss": 0.25, "lr": 1e-4, "grad_norm": 0.5, "seconds": 2.0, "data_seconds": 0.1,
    "samples": ["a", "b", "c"], "timesteps": [10, 999, 240], "losses": [0.3, 0.1, 0.5], "lora_norm": 11.0,
    "forward_seconds": 0.6, "backward_seconds": 1.2, "optimizer_seconds": 0.1, "skipped": False,
}  # fmt: skip


def test_a_row_becomes_its_scalars_and_the_losses_of_its_quartiles():
    assert step_scalars(ROW) == {
        "loss": 0.25, "lr": 1e-4, "grad_norm": 0.5, "lora_norm": 11.0, "seconds": 2.0, "data_seconds": 0.1,
        "forward_seconds": 0.6, "backward_seconds": 1.2, "optimizer_seconds": 0.1, "samples_per_second": 1.5,
        "loss_t0_249": 0.4, "loss_t750_999": 0.1,
    }  # fmt: skip


def test_what_a_row_does_not_say_is_left_out():
    skipped = {**ROW, "loss": None, "grad_norm": None, "lora_norm": None, "losses": [None] * 3, "skipped": True}
    assert not {"loss", "grad_norm", "lora_norm", "loss_t0_249"} & set(step_scalars(skipped))
    assert step_scalars({"step": 1, "loss": 0.5, "lr": 0.0}) == {"loss": 0.5, "lr": 0.0}


def test_a_held_out_loss_becomes_its_scalars():
    assert holdout_scalars({"step": 0, "loss": 0.9, "quartiles": [1.2, 0.9, None, 0.6], "samples": 3}) == {
        "holdout_loss": 0.9, "holdout_loss_t0_249": 1.2, "holdout_loss_t250_499": 0.9, "holdout_loss_t750_999": 0.6,
    }  # fmt: skip


ASKED = {"prompt": "A red\nsquare", "effective_prompt": "SQR A red\nsquare", "seed": 42, "guidance_scale": 6.0}


# --- the files


def wandb_records(path):
    """The records of an offline run: protocol buffers in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2 as wandb_pb  # its names are made when it is imported

    data, place, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while place < len(data):
        if (1 << 15) - place % (1 << 15) < 7:  # a block of 32 KiB ends with zeros where no header fits
            place += (1 << 15) - place % (1 << 15)
            continue
        if len(data) < place + 7:
            return  # it is still being written
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        if len(data) < place + 7 + size:
            return
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield vars(wandb_pb)["Record"].FromString(b"".join(parts))
            parts = []


def wandb_history(path):
    """What was logged at each step, and the configuration.

    wandb's own process writes the file, and may still do so when the run's has finished: the last record is `exit`.
    """
    end = time.monotonic() + 60
    while "exit" not in [record.WhichOneof("record_type") for record in wandb_records(path)]:
        assert time.monotonic() < end, f"{path}: {path.stat().st_size} bytes, and no end"
        time.sleep(0.05)
    history: dict[int, dict[str, float]] = defaultdict(dict)
    config = {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history[items["_step"]] |= {name: value for name, value in items.items() if name[0] != "_"}
        for update in record.run.config.update if kind == "run" else record.config.update if kind == "config" else ():
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    return dict(history), config


def tensorboard_history(folder):
    """What was logged at each step, as float32; and how often."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    history: dict[int, dict[str, float]] = defaultdict(dict)
    count = 0
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            history[event.step][name] = event.value
            count += 1
    return dict(history), count


def expected(run):
    return {row["step"]: step_scalars(row) for row in rows_of(run)}


def test_wandb_offline_holds_the_rows_and_the_configuration(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where wandb would write by itself
    train_here(cache, tmp_path / "run", max_train_steps=3, report_to="wandb", tracker_name="squares")
    (file,) = (tmp_path / "run" / "logs").glob("wandb/offline-run-*/*.wandb")
    history, config = wandb_history(file)
    assert history == expected(tmp_path / "run")
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: config[name] for name in told if told[name] is not None} == {
        name: value for name, value in told.items() if value is not None
    }
    assert not (tmp_path / "wandb").exists()


def test_tensorboard_holds_the_rows_once_also_after_a_resume(cache, tmp_path):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "report_to": "tensorboard", "tracker_name": "squares"}
    train_here(cache, tmp_path / "run", **flags)
    folder = tmp_path / "run" / "logs" / "squares"
    for _ in range(2):
        history, count = tensorboard_history(folder)
        rows = expected(tmp_path / "run")
        assert history == {step: pytest.approx(scalars, rel=1e-6) for step, scalars in rows.items()}
        assert count == sum(map(len, rows.values()))
        train_here(cache, tmp_path / "run", **flags, resume_from_checkpoint="checkpoint-2")
    hparams = next(folder.glob("*/hparams.yml")).read_text()
    assert "max_train_steps: 4" in hparams


def test_all_gives_the_rows_to_each_tracker_that_is_installed(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "is_installed", lambda name: name in ("wandb", "tensorboard"))
    assert chosen_trackers("all") == ["wandb", "tensorboard"]
    train_here(cache, tmp_path / "run", max_train_steps=1, report_to="all", tracker_name="squares")
    (file,) = (tmp_path / "run" / "logs").glob("wandb/offline-run-*/*.wandb")
    rows = expected(tmp_path / "run")
    assert wandb_history(file)[0] == rows
    assert tensorboard_history(tmp_path / "run" / "logs" / "squares")[0] == {1: pytest.approx(rows[1], rel=1e-6)}


def test_videos_of_a_row_are_shown_under_one_name_at_each_step(cache, tmp_path, monkeypatch):
    """What wandb plays is the file; tensorboard has frames of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made: dict[int, bytes] = {}

    def make_videos(config, dataset, rows, checkpoint, step, **_):
        folder = Path(config.output_dir) / "validation" / f"step-{step}"
        folder.mkdir(parents=True)
        video = write_video(folder / f"a-red-{step}f{step}-step{step}-scale1-seed42.mp4", moving_square(step))
        video.with_suffix(".json").write_text(json.dumps({**ASKED, "lora": {"sha256": f"{step}"}}))
        made[step] = video.read_bytes()
        return [video]

    monkeypatch.setattr("train.loop.make_videos", make_videos)
    monkeypatch.setattr(trackers, "is_installed", lambda name: name in ("wandb", "tensorboard"))
    flags = {"max_train_steps": 2, "validation_steps": 1, "tracker_name": "squares"}
    train_here(cache, tmp_path / "run", **flags, report_to="all")
    name = f"validation/a-red-square-seed42-{row_digest(ASKED)}"
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "squares"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == [name]
    shown = [(event.step, event.height, event.width) for event in events.Images(name)]
    assert shown == [(1, 72, 3 * 104), (2, 72, 3 * 104)], "three frames, side by side"
    (file,) = (tmp_path / "run" / "logs").glob("wandb/offline-run-*/*.wandb")
    history, _ = wandb_history(file)
    for step, data in made.items():
        assert history[step][f"{name}/_type"] == "video-file"
        assert (file.parent / "files" / str(history[step][f"{name}/path"])).read_bytes() == data


def test_comet_and_trackio_are_shown_the_files(tmp_path, monkeypatch):
    """By stand-ins with the signatures of comet_ml 3.58.8 and trackio 0.43.0, which are not installed here."""
    calls: list[Any] = []

    def log_video(file, name=None, overwrite=False, format=None, step=None, epoch=None):
        calls.append(("comet_ml", Path(file), name, step))

    class Video:
        def __init__(self, value, caption=None, fps=None, format=None):
            self.value, self.format = value, format

    def log(values, step=None):
        calls.extend(("trackio", Path(video.value), name, step) for name, video in values.items())

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Video=Video))
    comet = SimpleNamespace(name="comet_ml", writer=SimpleNamespace(log_video=log_video))
    known = [comet, SimpleNamespace(name="trackio", log=log)]
    run: Any = SimpleNamespace(config=TrainConfig(report_to="all"), accelerator=SimpleNamespace(trackers=known))
    video = tmp_path / "red-1f-step2-scale1-seed42.mp4"
    video.with_suffix(".json").write_text(json.dumps(ASKED))
    track_videos(run, [video], 2)
    shown = f"validation/a-red-square-seed42-{row_digest(ASKED)}"
    assert calls == [(name, video, shown, 2) for name in ("comet_ml", "trackio")]


# --- what is not installed


def test_a_tracker_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr(trackers, "is_installed", lambda name: False)
    assert chosen_trackers("none") == []
    for name, install in (("tensorboard", r"'\.\[trackers\]'"), ("trackio", r"'\.\[trackers\]'"), ("wandb", r"\.")):
        with pytest.raises(
            ConfigError, match=rf"^--report_to {name}: it is not installed; run `pip install {install} "
        ):
            chosen_trackers(name)
    with pytest.raises(ConfigError, match=r"^--report_to all: no tracker is installed; run `pip install '\.\[track"):
        chosen_trackers("all")


def test_it_is_told_in_one_line_before_anything_is_loaded(tmp_path):
    code = (
        "import sys\n"
        "from shared.errors import run_command\n"
        "from train import __main__, trackers\n"
        "trackers.is_installed = lambda name: False\n"
        "try: run_command(__main__.main, ['--report_to', 'tensorboard', '--cache', '/nowhere'])\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = run_command("-c", code)
    assert done.returncode == 2
    assert only_line(done.stderr).startswith("error: --report_to tensorboard: it is not installed; run `pip install")


def test_a_folder_named_like_a_tracker_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "latentreel-tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers.is_installed("latentreel-tracker")
    assert trackers.is_installed("wandb")
