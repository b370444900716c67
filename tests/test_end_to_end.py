"""The three stages as a user runs them: subprocesses, flags, files."""

from __future__ import annotations

import json

import pytest

from tests.conftest import SHARED_CLIPS, moving_square, run_command, write_video


def three_stages(model, manifest, folder, shape):
    frames, height, width = shape
    done = run_command(
        "-m", "preprocess", "--pretrained_model_name_or_path", str(model), "--dataset_name", str(manifest),
        "--cache", str(folder / "cache"), "--height", str(height), "--width", str(width),
        "--max_num_frames", str(frames), "--id_token", "TOK",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_command(
        "-m", "train", "--cache", str(folder / "cache"), "--output_dir", str(folder / "lora"), "--rank", "4",
        "--lora_alpha", "8", "--max_train_steps", "3", "--learning_rate", "1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_command(
        "-m", "infer", "--lora", str(folder / "lora"), "--prompt", "a square moves", "--num_inference_steps", "2",
        "--output_dir", str(folder / "videos"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (video,) = (folder / "videos").glob("*.mp4")
    return video


def check_video(video, shape, fps):
    import av

    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    assert (len(frames), *frames[0].shape[:2]) == shape
    assert rate == fps
    recipe = json.loads(video.with_suffix(".json").read_text())
    assert recipe["effective_prompt"] == "TOK a square moves"


def test_a_clip_made_here_becomes_a_lora_and_a_video(tiny_5b, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "a b.mp4", moving_square(1, frames=20))
    (clips / "a b.txt").write_text("a square, with a comma")
    video = three_stages(tiny_5b, clips, tmp_path, (17, 64, 96))
    check_video(video, (17, 64, 96), 8)


@pytest.mark.skipif(not SHARED_CLIPS.is_dir(), reason="the real clips beside the project are not here")
def test_a_real_clip_becomes_a_lora_and_a_video(tiny_2b, tmp_path):
    manifest = tmp_path / "metadata.jsonl"
    manifest.write_text(json.dumps({"video": "hiker_tiny.mp4", "caption": "a hiker on a mountain ridge"}))
    for clip in SHARED_CLIPS.glob("hiker_tiny.mp4"):
        (tmp_path / clip.name).write_bytes(clip.read_bytes())
    video = three_stages(tiny_2b, manifest, tmp_path, (49, 80, 128))
    check_video(video, (49, 80, 128), 8)


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path):
    done = run_command("-m", "train", "--cache", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "run `python -m preprocess` first" in line
