"""What stage 1's models hold at their peak: counted on tensors without storage, against the same on real ones."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from preprocess import encode
from preprocess.encode import TextEncoder, VideoEncoder
from preprocess.fingerprints import tile_geometry
from preprocess.memory import text_peak, video_peak
from shared.geometry import Bucket
from shared.ledger import Ledger
from shared.models import open_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_2b):
    return open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=("vae", "text_encoder"))


def shape(frames, height, width) -> Any:
    """A bucket, or what is like one: 15 frames are none, but the VAE takes them."""
    return SimpleNamespace(frames=frames, height=height, width=width)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("frames", [9, 13, 15, 17, 49, 81])
def test_the_vaes_peak_is_that_of_a_real_encode(checkpoint, frames, tiled):
    tiling = {**tile_geometry(checkpoint), "height": 48, "width": 48} if tiled else None
    bucket = shape(frames, 64, 96)
    planned = video_peak(checkpoint, bucket, dtype="float32", batch=1, tiling=tiling, slicing=False)
    with Ledger() as ledger:
        encoder = VideoEncoder(checkpoint, "float32", "float32", slicing=False, tiling=tiling)
        ledger.label(encoder._vae.parameters(), "weights")
        ledger.start_anew()
        encoder.encode(np.zeros((1, frames, 64, 96, 3), np.uint8))
    assert planned == pytest.approx(ledger.peaks["device"].total, rel=0.05)


def test_tiles_slices_and_batches_are_seen(checkpoint):
    def peak(batch=1, **settings):
        return video_peak(checkpoint, Bucket(17, 128, 192), dtype="float32", batch=batch, **settings)

    tiles = {**tile_geometry(checkpoint), "height": 64, "width": 64}
    whole = peak(tiling=None, slicing=False)
    assert peak(tiling=tiles, slicing=False) < 0.6 * whole
    assert peak(batch=3, tiling=None, slicing=False) > 2 * whole
    assert peak(batch=3, tiling=None, slicing=True) < 1.5 * whole


@pytest.mark.parametrize("batch", [1, 8])
def test_t5s_peak_is_that_of_a_real_encode(checkpoint, batch):
    planned = text_peak(checkpoint, dtype="float32", batch=batch)
    with Ledger() as ledger, torch.no_grad():
        encoder = TextEncoder(checkpoint, "float32", "float32")
        ledger.label(encoder._encoder.parameters(), "weights")
        ledger.start_anew()
        encoder.encode(["a red square"] * batch)
    assert planned == pytest.approx(ledger.peaks["device"].total, rel=0.05)


def test_where_t5_is_larger_than_the_gpu_its_layers_wait_and_its_embeddings_are_the_same(
    checkpoint, monkeypatch, capsys
):
    """With a CPU in the GPU's place: the same hooks, whose copies go nowhere. 5B is promised on 8 GB, and T5 has 9."""
    prompts = ["a red square", "a blue disc moves to the left"]
    whole = TextEncoder(checkpoint, "float32", "float32")
    size_bytes = sum(parameter.nbytes for parameter in whole._encoder.parameters())
    monkeypatch.setattr(encode, "free_bytes", lambda device: size_bytes + encode.ROOM_BYTES)
    enough = TextEncoder(checkpoint, "float32", "float32")
    monkeypatch.setattr(encode, "free_bytes", lambda device: size_bytes + encode.ROOM_BYTES - 1)
    assert capsys.readouterr().out == ""
    waiting = TextEncoder(checkpoint, "float32", "float32")
    assert "its layers wait on the host" in capsys.readouterr().out
    hooked = [sum(hasattr(part, "_diffusers_hook") for part in one._encoder.modules()) for one in (enough, waiting)]
    assert hooked[0] == 0
    assert hooked[1] > 10
    for _ in range(2):
        assert np.array_equal(waiting.encode(prompts), whole.encode(prompts))
    gone = weakref.ref(waiting._encoder)
    del waiting
    gc.collect()
    assert gone() is None, "T5 leaves before the VAE comes"
