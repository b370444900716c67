"""What stage 1 keeps on the disk instead of in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.tally import Tally
from tests.conftest import ROOT, write_video

MEASURE = """
import json, resource, sys
from pathlib import Path
import pytest
from preprocess import clips, pipeline, preview
from preprocess.__main__ import main
from tests.decoding import use_stand_ins

patch = pytest.MonkeyPatch()
in_children = pipeline.DecodePool
use_stand_ins(patch)
patch.setattr(pipeline, "DecodePool", in_children)  # as in a run: what decoding takes is its own process's
clips.AHEAD_BYTES, preview.PAGE_SAMPLES = 1 << 20, 200  # bounds of their own, which both runs are to reach
assert main(sys.argv[1:]) == 0
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


@given(st.lists(st.tuples(st.sampled_from("abcdé\x00"), st.text(max_size=3)), max_size=60))
def test_a_tally_counts_as_a_counter_does(notes):
    tally = Tally(names=2)
    seen: Counter[str] = Counter()
    for key, name in notes:
        assert tally.add(key, name) == seen[key]
        seen[key] += 1
    repeated = [key for key in seen if seen[key] > 1]
    names = {key: [name for other, name in notes if other == key][:2] for key in seen}
    assert tally.repeated(3) == (len(repeated), [(key, seen[key], names[key]) for key in repeated[:3]])


def peak_bytes(folder, model, count):
    """The peak of the memory of a run over `count` clips, with its own cache."""
    rows = [{"video": "a.mp4", "caption": f"number {row}", "start": row / 8, "end": row / 8 + 1.5}
            for row in range(count)]  # fmt: skip
    (folder / f"{count}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--cache", folder / f"cache{count}", "--pretrained_model_name_or_path", model, "--height", 32,
             "--width", 48, "--max_num_frames", 9, "--dataset_name", folder / f"{count}.jsonl"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"encoded   {count} clips, {count + 1} prompts" in done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clips(tiny_2b, tmp_path):
    """Stand-ins for the models leave little memory for growth to hide in; two thousand segments of one video, each of
    its own frames."""
    write_video(tmp_path / "a.mp4", np.zeros((2020, 32, 48, 3), np.uint8), 8)
    few, many = (peak_bytes(tmp_path, tiny_2b, count) for count in (200, 2000))
    assert many < 1.1 * few
