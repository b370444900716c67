"""What many tests share: tiny random checkpoints, clips made on the spot, a cache made of them.

Nothing is downloaded. Everything here is made once a session and must not be changed by a test: copy it first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_model

ROOT = Path(__file__).resolve().parent.parent
SHARED_CLIPS = ROOT.parent / "shared" / "clips"
SHAPE = (9, 64, 96)  # frames, height and width of the clips in `cache`


# Before anything imports the hub's library, which reads it once: no test reaches a hub.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline")


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Digests are remembered in a folder of the session's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def tiny_2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the 2B kind: sin-cos positions, float32."""
    return tiny_model.build(tmp_path_factory.mktemp("models") / "2b", "2b")


@pytest.fixture(scope="session")
def tiny_5b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the 5B kind: RoPE, float32."""
    return tiny_model.build(tmp_path_factory.mktemp("models") / "5b", "5b", seed=1)


def write_video(path: Path, frames: np.ndarray, fps: int = 8, codec: str = "libx264") -> Path:
    """Write uint8 RGB frames [F, H, W, 3] as a nearly lossless video."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        stream.options = {"crf": "4"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def moving_square(seed: int, frames: int = 9, height: int = 72, width: int = 104) -> np.ndarray:
    """Frames [F, H, W, 3] of a coloured square that moves over a gradient; another one for each seed."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    background = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1)
    clip = np.repeat(background[None].astype(np.uint8), frames, axis=0)
    colour, top, left = rng.integers(0, 256, 3), rng.integers(0, height - 24), rng.integers(0, width - 48)
    for number in range(frames):
        x = left + number * 24 // frames
        clip[number, top : top + 24, x : x + 24] = colour
    return clip


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of seven short clips, `0.mp4` to `6.mp4`, each with its caption beside it; two of another shape."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        height, width = (104, 72) if number in (2, 5) else (72, 104)
        write_video(folder / f"{number}.mp4", moving_square(number, 9, height, width))
        (folder / f"{number}.txt").write_text(f"a square of colour number {number}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_2b: Path, clips: Path) -> Path:
    """A cache with the data set `squares`: seven clips of two buckets, mirrored too, encoded by `tiny_2b`."""
    from preprocess.__main__ import main

    folder = tmp_path_factory.mktemp("cache")
    status = main(
        ["--cache", str(folder), "--dataset", "squares", "--pretrained_model_name_or_path", str(tiny_2b)]
        + ["--dataset_name", str(clips), "--buckets", "9x64x96,9x96x64", "--id_token", "SQR", "--random_flip", "0.5"]
        + ["--validation_prompt", "a blue square:::a red square"]
    )
    assert status == 0
    return folder


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image-to-video checkpoint that takes any size."""
    return tiny_model.build(tmp_path_factory.mktemp("models") / "1.5-5b-i2v", "1.5-5b-i2v")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, and rows.jsonl of validation videos that start from them."""
    from tests.rows import write_pictures

    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory, image_model: Path, clips: Path, pictures: Path) -> Path:
    """A cache of `image_model`, whose data set `squares` holds the rows of `pictures`."""
    from tests.rows import stage_1

    folder = tmp_path_factory.mktemp("image-cache")
    assert stage_1(folder, image_model, clips, "--validation_prompts", pictures / "rows.jsonl") == 0
    return folder


@pytest.fixture(scope="session")
def facts(tiny_2b: Path) -> Any:
    """What the configs of `tiny_2b` say."""
    from shared.models import open_checkpoint

    return open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=("transformer",)).facts


@pytest.fixture(scope="session")
def squares(cache: Path) -> Any:
    """The data set `squares` of `cache`."""
    from shared.cache import Cache
    from shared.dataset import open_dataset

    return open_dataset(Cache(str(cache)), "squares")


@pytest.fixture(scope="session")
def samples(squares: Any) -> Any:
    """Its samples, as training has them."""
    from train.samples import Samples

    return Samples(squares)


@pytest.fixture
def cache_copy(cache: Path, tmp_path: Path) -> Path:
    """A cache that a test may damage."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


WARNINGS = "default,ignore:`torch.jit:DeprecationWarning"  # the latter in libraries, as in pyproject.toml


def run_command(*words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ...` from the checkout as a user would, on one thread, and return what it printed."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
