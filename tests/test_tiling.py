"""Tiles: which are chosen, that the cache keeps them apart, and what they are said to change."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

from preprocess import tiling
from preprocess.__main__ import main
from preprocess.encode import VideoEncoder
from preprocess.fingerprints import tile_geometry
from preprocess.seams import compare, seam_mask
from preprocess.tiling import available_bytes, peak_bytes, tile_choices
from shared.errors import ConfigError
from shared.geometry import Bucket
from shared.models import open_checkpoint
from tests.conftest import moving_square
from tests.test_preprocess import SIZE, preprocess

DEFAULT = {"height": 240, "width": 360, "overlap_height": 1 / 6, "overlap_width": 1 / 5}
SMALL = {"height": 48, "width": 40, "overlap_height": 1 / 6, "overlap_width": 1 / 5}


@pytest.fixture(scope="module")
def model(tiny_2b, tmp_path_factory):
    """A tiny checkpoint whose VAE's own tiles are smaller than the clips."""
    folder = shutil.copytree(tiny_2b, tmp_path_factory.mktemp("tiles") / "2b")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_height": 96, "sample_width": 80}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(model):
    return open_checkpoint(str(model), revision=None, variant=None, cache_dir=None, weights=("vae",))


@pytest.fixture(scope="module")
def manifest(clips, tmp_path_factory):
    """One clip with its caption."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("0.mp4", "0.txt"):
        shutil.copy(clips / name, folder)
    return folder


def have_memory(monkeypatch, size_bytes):
    monkeypatch.setattr(tiling, "available_bytes", lambda: size_bytes)


def needs(checkpoint, tiles, bucket=None):
    """Bytes that must be available for tiles to be taken."""
    weights = sum(path.stat().st_size for path in checkpoint.weight_files("vae"))
    peak = peak_bytes(8, bucket or Bucket(9, 64, 96), 1, 4, tiles)
    return int((weights + peak) / tiling.USABLE) + 4


# Which tiles there are to choose from.


@pytest.mark.parametrize("shapes", ["49x480x720", "49x768x1360", "49x480x720,49x720x480", "9x64x96", "49x64x2000"])
def test_choices_shrink_down_to_the_vaes_own_tiles(shapes):
    buckets = [Bucket.parse(text) for text in shapes.split(",")]
    choices = list(tile_choices(buckets, DEFAULT))
    assert choices[-1] == DEFAULT
    peaks = [max(peak_bytes(128, bucket, 1, 2, tiles) for bucket in buckets) for tiles in choices]
    if len(buckets) == 1:
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] < peak_bytes(128, buckets[0], 1, 2, None) or len(choices) == 1
    assert all(tiles["height"] >= 240 and tiles["width"] >= 360 for tiles in choices)


def test_choices_lie_as_far_apart_in_pixels_as_in_latents():
    """Where they do not, diffusers' tiled encoding gives another size, or moves what it shows."""
    for side in range(64, 1408, 16):
        for tiles in tile_choices([Bucket(9, side, side)], SMALL):
            for name in ("height", "width"):
                latents, overlap = tiles[name] // 8, tiles[f"overlap_{name}"]
                assert int(tiles[name] * (1 - overlap)) == 8 * (latents - int(latents * overlap))


def test_the_encoding_in_each_choice_has_the_size_of_the_untiled_one(checkpoint):
    encoder = VideoEncoder(checkpoint, "float32", "float32", slicing=False, tiling=None)
    frames = moving_square(0, 1, 112, 144)[None]
    whole = encoder.encode(frames)
    for tiles in tile_choices([Bucket(1, 112, 144)], SMALL):
        encoder.set_tiling(tiles)
        assert encoder.encode(frames).shape == whole.shape
    encoder.set_tiling(None)
    np.testing.assert_array_equal(encoder.encode(frames), whole)


def test_peaks_grow_with_all_that_is_encoded_at_once():
    bucket = Bucket(9, 64, 96)
    one = peak_bytes(128, bucket, 1, 4, None)
    assert peak_bytes(128, bucket, 2, 4, None) == 2 * one - tiling.FIXED_BYTES
    longer = [peak_bytes(128, Bucket(frames, 64, 96), 1, 4, None) for frames in range(1, 90, 4)]
    assert longer == sorted(longer), "a shorter clip takes no more"
    assert peak_bytes(128, bucket, 1, 2, None) < one
    assert peak_bytes(128, bucket, 1, 4, SMALL) < one
    assert peak_bytes(128, bucket, 1, 4, DEFAULT) == one


@pytest.mark.parametrize(
    ("shape", "batch", "measured"),  # MB of a whole VAE in float32 (128, 256, 256, 512) on a CPU: docs/preprocess.md
    [
        ("9x64x96", 1, 271.8), ("9x128x192", 1, 883.0), ("13x128x192", 1, 1187.1), ("1x128x192", 1, 346.5),
        ("1x192x288", 1, 643.0), ("9x64x64", 2, 285.4), ("17x64x96", 1, 399.3),
    ],
)  # fmt: skip
def test_the_bound_is_above_what_was_measured_and_near_it(shape, batch, measured):
    bound = peak_bytes(128, Bucket.parse(shape), batch, 4, None) / 1e6
    assert measured <= bound <= 1.5 * measured


def test_the_memory_that_is_available_is_told():
    assert 100e6 < available_bytes() < 1e14


# What a run takes.


def test_auto_is_untiled_where_that_fits_and_shares_its_moments(model, manifest, tmp_path, monkeypatch, checkpoint):
    have_memory(monkeypatch, needs(checkpoint, None))
    plain = preprocess(tmp_path / "cache", model, manifest)
    auto = preprocess(tmp_path / "cache", model, manifest, "--tile", "auto", dataset="auto")
    assert auto.report["tiling"] is None
    assert auto.encoded == (0, 0)
    assert auto.dataset.info["fingerprints"] == plain.dataset.info["fingerprints"]


def test_auto_takes_the_largest_tiles_that_fit_and_records_them(model, manifest, tmp_path, monkeypatch, checkpoint):
    have_memory(monkeypatch, needs(checkpoint, None) - 8)
    opened = preprocess(tmp_path / "cache", model, manifest, "--tile", "AUTO")
    taken = opened.report["tiling"]
    assert taken == next(tile_choices([Bucket(9, 64, 96)], SMALL)) != SMALL
    assert opened.dataset.info["facts"]["latents"]["tiling"] == taken
    have_memory(monkeypatch, 0)
    least = preprocess(tmp_path / "cache", model, manifest, "--tile", "auto", dataset="least")
    assert least.report["tiling"] == SMALL
    assert least.encoded == (1, 0)


def test_auto_keeps_to_what_the_data_set_was_made_with(model, manifest, tmp_path, monkeypatch, checkpoint):
    """Memory that is a little fuller today must not encode everything again; other settings are another choice."""
    have_memory(monkeypatch, 1 << 40)
    first = preprocess(tmp_path / "cache", model, manifest, "--tile", "auto")
    have_memory(monkeypatch, 0)
    second = preprocess(tmp_path / "cache", model, manifest, "--tile", "auto")
    assert second.encoded == (0, 0)
    assert second.dataset.digest == first.dataset.digest
    third = preprocess(tmp_path / "cache", model, manifest, "--tile", "auto", "--vae_batch_size", "2")
    assert third.report["tiling"] == SMALL


def test_on_is_enable_tiling_and_off_is_untiled(model, manifest, tmp_path, capsys):
    on = preprocess(tmp_path / "cache", model, manifest, "--tile", "on")
    assert "tiles     48x40 pixels" in capsys.readouterr().out
    same = preprocess(tmp_path / "cache", model, manifest, "--enable_tiling")
    off = preprocess(tmp_path / "cache", model, manifest, "--tile", "off")
    assert [opened.encoded for opened in (on, same, off)] == [(1, 2), (0, 0), (1, 0)]
    assert [opened.report["tiling"] for opened in (on, same, off)] == [SMALL, SMALL, None]
    assert np.abs(on.array(on.rows[0], "latent") - off.array(off.rows[0], "latent")).max() > 1e-2
    with pytest.raises(ConfigError, match="--tile auto: says other than --enable_tiling"):
        preprocess(tmp_path / "cache", model, manifest, "--tile", "auto", "--enable_tiling")


def test_tiled_moments_are_the_vaes_own(model, manifest, tmp_path):
    from diffusers import AutoencoderKLCogVideoX

    from tests.test_preprocess import resized_frames

    opened = preprocess(tmp_path / "cache", model, manifest, "--enable_tiling", "--cache_dtype", "float32")
    vae = AutoencoderKLCogVideoX.from_pretrained(model, subfolder="vae")
    vae.enable_tiling()
    with torch.no_grad():
        posterior = vae.encode(resized_frames(manifest / "0.mp4", 64, 96)).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].numpy()
    np.testing.assert_allclose(opened.array(opened.rows[0], "latent"), expected, atol=1e-5)


def test_a_gpu_is_probed_by_encoding(model, manifest, tmp_path, monkeypatch):
    """The flow alone, on a CPU: what does not fit raises, and the next smaller tiles are tried."""
    monkeypatch.setattr(tiling, "choose_device", lambda: "cuda")
    encode, tried = VideoEncoder.encode, []

    def encode_little(encoder, frames):
        tiles = encoder._vae.tile_sample_min_height if encoder._vae.use_tiling else None
        if not frames.any():  # the probe's
            tried.append((tiles, frames.shape))
            if tiles is None or tiles > 48:
                raise torch.cuda.OutOfMemoryError
        return encode(encoder, frames)

    monkeypatch.setattr(VideoEncoder, "encode", encode_little)
    opened = preprocess(tmp_path / "cache", model, manifest, "--tile", "auto")
    assert opened.report["tiling"]["height"] == 48
    assert tried[0] == (None, (1, 9, 64, 96, 3))
    assert tried[-1][0] == 48
    count = len(tried)
    again = preprocess(tmp_path / "cache", model, manifest, "--tile", "auto")
    assert again.encoded == (0, 0)
    assert len(tried) == count, "what the data set was made with is not probed again"


# What tiles change.


def check(model, manifest, cache, *flags, capsys):
    words = ["--cache", cache, "--pretrained_model_name_or_path", model, "--dataset_name", manifest, *SIZE]
    capsys.readouterr()
    assert main([str(word) for word in (*words, "--check_tiling", *flags)]) == 0
    return capsys.readouterr().out.splitlines()


def percentages(line):
    return [float(number) for number in re.findall(r"([\d.]+)%(?!\))", line)]


def test_check_tiling_tells_seams_and_writes_no_latents(model, clips, tmp_path, capsys):
    lines = check(model, clips, tmp_path / "cache", "--enable_tiling", capsys=capsys)
    assert lines[0].startswith("tiles     48x40 pixels, as this run would take")
    assert len(lines) == 1 + 4, "four of the seven clips"
    for line in lines[1:]:
        overall_rms, overall_max, seam_rms, seam_max, rms, largest = percentages(line)
        assert 0 < overall_rms < overall_max == max(seam_max, largest)
        assert min(rms, seam_rms) <= overall_rms <= max(rms, seam_rms)
    assert not (tmp_path / "cache" / "latents").exists()
    assert not (tmp_path / "cache" / "datasets").exists()


def test_a_clip_smaller_than_a_tile_is_not_changed(tiny_2b, manifest, tmp_path, capsys):
    lines = check(tiny_2b, manifest, tmp_path / "cache", capsys=capsys)
    assert lines[0].startswith("tiles     240x360 pixels, the VAE's own: this run would take none")
    assert lines[1].endswith("rms 0.00%, max 0.00%; one tile, no seams")


def test_differences_are_those_of_numpy(checkpoint):
    encoder = VideoEncoder(checkpoint, "float32", "float32", slicing=False, tiling=None)
    frames = moving_square(3, 5, 64, 96)
    seams = compare(encoder, frames, SMALL)
    means = []
    for tiles in (None, SMALL):
        encoder.set_tiling(tiles)
        means.append(encoder.encode(frames[None])[0, :16].astype(np.float64))
    difference = (means[1] - means[0]) / means[0].std()
    assert seams.overall.rms == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
    assert seams.overall.largest == pytest.approx(np.abs(difference).max(), rel=1e-4)


def test_seams_are_where_two_tiles_are_blended():
    """Tiles of 6 x 5 latents that overlap by one: rows from 5, columns from 4 on begin a tile each."""
    mask = seam_mask(8, 12, SMALL)
    assert np.flatnonzero(mask[0]).tolist() == [4, 8]
    assert np.flatnonzero(mask[:, 0]).tolist() == [5]
    assert mask[5].all()
    assert not seam_mask(6, 5, SMALL).any()


def test_the_default_tiles_are_diffusers_own(tiny_2b):
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_2b, subfolder="vae")
    checkpoint = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=("vae",))
    assert tile_geometry(checkpoint) == {
        "height": vae.tile_sample_min_height,
        "width": vae.tile_sample_min_width,
        "overlap_height": vae.tile_overlap_factor_height,
        "overlap_width": vae.tile_overlap_factor_width,
    }
