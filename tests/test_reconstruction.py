"""`preview --decode`: what the VAE makes of the cached moments, against diffusers' own decode and plain numpy."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from preprocess.__main__ import main as preprocess
from preprocess.preview import main
from preprocess.reconstruction import peak_signal_to_noise, reconstruct
from preprocess.tiling import tile_choices
from preprocess.verify import main as verify
from shared import models
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError
from shared.geometry import Bucket
from shared.shards import decode_array
from tests.damage import flip, one_part, rows_of
from tests.test_preprocess import resized_frames
from tests.test_preview import page_of

TOLD = r"PSNR ([\d.]+) dB"


def opened(cache):
    return open_dataset(Cache(str(cache)), "squares")


def samples_of(cache):
    return pq.read_table(cache / opened(cache).folder / "samples.parquet").to_pylist()


def reference(model, cache, row, frames, tiles=None):
    """PSNR in dB of what diffusers decodes of a row's mean."""
    vae = AutoencoderKLCogVideoX.from_pretrained(model / "vae")
    if tiles:
        vae.enable_tiling(*tiles)
    moments = decode_array(opened(cache).open_store("latent").read(row["latent_key"]), "test")
    with torch.no_grad():
        pixels = vae.decode(torch.from_numpy(moments[None, :16].astype(np.float32))).sample
    bytes_ = np.clip(np.round((pixels[0].numpy() + 1) / 2 * 255), 0, 255)  # [3, F, H, W]
    return 20 * np.log10(255) - 10 * np.log10(((frames - bytes_) ** 2).mean())


def encoded_frames(clips, row):
    """The pixels of a row's clip, 0 to 255 [3, F, H, W], by another way than stage 1's."""
    pixels = resized_frames(clips / row["source"], row["height"], row["width"])[0]
    return np.round((pixels.numpy() + 1) / 2 * 255)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory, tiny_2b, clips):
    """A cache of two clips, encoded in tiles of 48x40 by a checkpoint whose VAE has these as its own."""
    folder = tmp_path_factory.mktemp("tiled")
    model = shutil.copytree(tiny_2b, folder / "model")
    config = model / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_height": 96, "sample_width": 80}))
    (folder / "clips").mkdir()
    for name in ("0.mp4", "0.txt", "3.mp4", "3.txt"):
        shutil.copy(clips / name, folder / "clips")
    words = ["--cache", folder / "cache", "--dataset", "squares", "--pretrained_model_name_or_path", model]
    words += ["--dataset_name", folder / "clips", "--buckets", "9x64x96", "--tile", "on"]
    assert preprocess([str(word) for word in words]) == 0
    return folder


def test_the_psnr_is_that_of_diffusers_decode(cache, clips, tiny_2b, tmp_path):
    assert main([str(cache), "--dataset", "squares", "--decode", "3", "--output", str(tmp_path)]) == 0
    rows = samples_of(cache)[::3]
    wanted = [reference(tiny_2b, cache, row, encoded_frames(clips, row)) for row in rows]
    assert len({round(psnr, 1) for psnr in wanted}) == 3, "a clip has its own"
    told = [float(psnr) for psnr in re.findall(TOLD, (tmp_path / "preview.html").read_text())]
    assert told == pytest.approx(wanted, abs=0.0501)


def test_a_clip_is_decoded_in_the_tiles_that_it_was_encoded_in(tiled, tiny_2b):
    """Whatever tiles the checkpoint that decodes would take by itself: they are no part of what the VAE is."""
    cache, row = tiled / "cache", samples_of(tiled / "cache")[0]
    (found,) = reconstruct(opened(cache), [row], 2, str(tiny_2b), None).values()
    frames = encoded_frames(tiled / "clips", row)
    wanted = reference(tiny_2b, cache, row, frames, (48, 40, 1 / 6, 1 / 5))
    assert abs(wanted - reference(tiny_2b, cache, row, frames)) > 0.01, "tiles make a difference"
    assert found["psnr"] == pytest.approx(wanted, abs=1e-3)
    assert not found["tiled"]


@pytest.mark.parametrize("shape", ["49x480x720", "81x768x1360"])
def test_tiles_that_encode_without_a_seam_out_of_place_decode_so(shape):
    """As diffusers' tiled_decode puts them: a step in latents is what is kept of a tile, in pixels."""
    default = {"height": 240, "width": 360, "overlap_height": 1 / 6, "overlap_width": 1 / 5}
    for tiles in tile_choices([Bucket.parse(shape)], default):
        for side, overlap in (("height", tiles["overlap_height"]), ("width", tiles["overlap_width"])):
            step = int(tiles[side] // 8 * (1 - overlap))
            assert tiles[side] - int(tiles[side] * overlap) == step * 8, tiles


def test_a_gpu_without_room_for_the_whole_decodes_in_tiles_and_says_so(cache, tmp_path, monkeypatch):
    load = models.load_vae
    seen = []

    def small(checkpoint, dtype):
        vae = load(checkpoint, dtype)
        decode = vae.decode

        def decode_or_fail(latents):
            seen.append(vae.use_tiling)
            if not vae.use_tiling:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(latents)

        vae.decode = decode_or_fail
        return vae

    monkeypatch.setattr("preprocess.reconstruction.load_vae", small)
    assert main([str(cache), "--dataset", "squares", "--decode", "2", "--output", str(tmp_path)]) == 0
    html = (tmp_path / "preview.html").read_text()
    assert len(re.findall(rf"in tiles, as the GPU has no room for the whole: {TOLD}", html)) == 2
    assert seen == [False, True, True], "it is not tried again for each"


def test_a_part_that_a_repair_moved_is_found(cache_copy, tmp_path, capsys):
    """And a sample that the repair had to drop is told in its card."""
    tar = one_part(cache_copy, "latents")
    lost = samples_of(cache_copy)[3]
    (row,) = (row for row in rows_of(tar) if (row["key"], row["member"]) == (lost["latent_key"], "moments.npy"))
    flip(tar, row["offset"] + row["size_bytes"] // 2)
    assert verify([str(cache_copy), "--repair"]) == 0
    assert one_part(cache_copy, "latents").name != tar.name
    command = [str(cache_copy), "--dataset", "squares", "--output", str(tmp_path / "pages"), "--decode"]
    assert main([*command, "3"]) == 0
    html = (tmp_path / "pages" / "preview.html").read_text()
    assert len(re.findall(TOLD, html)) == 2
    assert html.count(f"does not hold {lost['latent_key'].hex()}; run stage 1 again") == 1
    assert html.count("no strip: ") == 2, "its own and the reconstruction's"


def test_a_video_that_has_gone_is_told_where_the_psnr_would_be(tiled, tiny_2b, tmp_path):
    cache = shutil.copytree(tiled / "cache", tmp_path / "cache")
    moved = tiled / "clips" / "3.mp4"
    moved.rename(tmp_path / "3.mp4")
    try:
        assert main([str(cache), "--dataset", "squares", "--decode", "2"]) == 0
        html = page_of(cache).read_text()
        assert len(re.findall(TOLD, html)) == 1
        assert html.count("after the VAE: no PSNR, its video is not where stage 1 read it, or has changed") == 1
        assert html.count("the same frames after the VAE") == 2
    finally:
        (tmp_path / "3.mp4").rename(moved)
    (cache / "sources.parquet").unlink()
    with pytest.raises(CacheError, match="no sample could be compared"):
        main([str(cache), "--dataset", "squares", "--decode", "1"])


def test_equal_frames_are_infinitely_near():
    black, grey = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 51, np.uint8)
    assert round(peak_signal_to_noise(black, grey), 4) == 13.9794  # 20 log10(255 / 51)
    assert peak_signal_to_noise(grey, grey) == float("inf")
