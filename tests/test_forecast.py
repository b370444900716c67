"""`--plan`: it tells what the run then does, and writes nothing."""

from __future__ import annotations

import json
import re

import pytest

from preprocess.__main__ import main
from shared.errors import ConfigError, UserError
from tests import tiny_model
from tests.test_preprocess import SIZE, preprocess


def plan(cache, model, manifest, *flags, capsys):
    words = ["--cache", cache, "--pretrained_model_name_or_path", model, "--dataset_name", manifest, *SIZE, "--plan"]
    capsys.readouterr()
    assert main([str(word) for word in (*words, *flags)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_plan_tells_what_the_run_does_and_writes_nothing(tiny_2b, clips, tmp_path, capsys):
    cache = tmp_path / "cache"
    told = plan(cache, tiny_2b, clips, "--random_flip", "0.5", capsys=capsys)
    assert not cache.exists()
    assert told[:3] == ["clips     7 of 7", "bucket    9x64x96: 7 clips", "missing   7 clips to read, 8 of 8 prompts"]
    assert re.fullmatch(
        r"memory    T5 \d\.\d\d GiB for 8 prompts at a time, in float32; a GPU with less takes .*", told[4]
    )
    assert re.fullmatch(
        r"memory    VAE \d\.\d\d GiB untiled \(\d\.\d\d GiB in tiles of 240x360\) for 1 x 9x64x96, in float32", told[5]
    )
    assert re.fullmatch(r"time      about \d+ s here, after a probe of a few clips", told[6])
    opened = preprocess(cache, tiny_2b, clips, "--random_flip", "0.5")
    assert opened.encoded == (14, 8)
    assert opened.report["buckets"] == {"9x64x96": 7}
    before = sorted(path.stat().st_mtime_ns for path in cache.rglob("*"))
    again = plan(cache, tiny_2b, clips, "--random_flip", "0.5", capsys=capsys)
    assert again[2:4] == ["missing   0 clips to read, 0 of 8 prompts", "bytes     0.000 GB will be written"]
    assert [line.split()[0] for line in again[4:]] == ["memory", "memory"]
    assert sorted(path.stat().st_mtime_ns for path in cache.rglob("*")) == before
    other = plan(cache, tiny_2b, clips, "--id_token", "NEW", capsys=capsys)
    assert other[2] == "missing   0 clips to read, 7 of 8 prompts"


def test_a_plan_of_nothing_but_rejected_clips_is_the_runs_refusal(tiny_2b, clips, tmp_path, capsys):
    with pytest.raises(UserError, match="all 7 clips were rejected"):
        plan(tmp_path / "cache", tiny_2b, clips, "--min_num_frames", "13", "--max_num_frames", "13", capsys=capsys)


def test_a_worker_without_a_clip_has_a_plan_too(tiny_2b, clips, tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text(json.dumps({"video": "0.mp4", "caption": "a square"}))
    root = ("--instance_data_root", clips, "--num_workers", 2, "--worker_index")
    told = [plan(tmp_path / "cache", tiny_2b, tmp_path / "m.jsonl", *root, index, capsys=capsys) for index in (0, 1)]
    assert sorted(lines[0] for lines in told) == ["clips     0 of 0", "clips     1 of 1"]
    (without,) = (index for index in (0, 1) if told[index][0] == "clips     0 of 0")
    assert f"missing   0 clips to read, {1 - without} of {1 - without} prompts" in told[without]
    message = f"--check_tiling: no clip is of --worker_index {without} of 2; leave "
    words = ("--cache", tmp_path / "cache", "--pretrained_model_name_or_path", tiny_2b, "--check_tiling")
    with pytest.raises(UserError, match=message):
        main([str(word) for word in (*words, "--dataset_name", tmp_path / "m.jsonl", *SIZE, *root, without)])


def test_two_looks_at_a_time_are_refused(tiny_2b, clips, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--plan with --check_tiling: each is a look of its own; give one of them"):
        plan(tmp_path / "cache", tiny_2b, clips, "--check_tiling", capsys=capsys)


def test_the_bytes_of_a_plan_are_those_of_the_arrays(clips, tmp_path, capsys):
    tiny_i2v = tiny_model.build(tmp_path / "model", kind="5b-i2v")
    cache = tmp_path / "cache"
    flags = ("--cache_dtype", "float32", "--drop_learned_positions")
    line = plan(cache, tiny_i2v, clips, *flags, capsys=capsys)[3]
    moments, images = 7 * 32 * 3 * 8 * 12, 7 * 4 * 32 * 8 * 12
    prompts = 8 * 226 * 32
    expected = (moments + images + prompts) * 4
    assert abs(float(line.split()[1]) * 1e9 - expected) < 0.03 * expected + 500_000
