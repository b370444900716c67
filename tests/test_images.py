"""First frames for image-to-video: their noise, their encodings, what is shared with text-to-video and what is not."""

from __future__ import annotations

import json
import math
import shutil
import statistics

import numpy as np
import pytest
import torch

from preprocess.decode import DecodePool
from preprocess.gc import main as gc
from preprocess.images import draw_sigma, noise_generator, noised_images
from preprocess.verify import main as verify
from shared.cache import image_key
from shared.errors import ConfigError, UserError
from shared.seeds import seed_for
from shared.shards import decode_array
from tests import tiny_model
from tests.test_preprocess import preprocess, resized_frames

KINDS = ("5b-i2v", "1.5-5b-i2v")
FLAGS = ("--fps", "8")  # the clips' own, whatever the checkpoint's
DROPPED = (*FLAGS, "--drop_learned_positions")  # for 5B-I2V, whose learned positions fit one size


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny checkpoints by kind, all with the same weights in the VAE and T5."""
    root = tmp_path_factory.mktemp("i2v")
    built = {kind: tiny_model.build(root / kind, kind) for kind in ("5b", *KINDS)}
    for kind in KINDS:  # weights are drawn in turn, the transformer's first: it takes more numbers here
        for part in ("vae", "text_encoder"):
            for file in (built["5b"] / part).glob("*.safetensors"):
                shutil.copy(file, built[kind] / part / file.name)
    return built


@pytest.fixture(scope="module")
def manifest(clips, tmp_path_factory):
    """Two clips with their captions."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("0.mp4", "0.txt", "1.mp4", "1.txt"):
        shutil.copy(clips / name, folder)
    return folder


@pytest.fixture(scope="module")
def opened(models, manifest, tmp_path_factory):
    """By kind, a data set of the two clips with three variants, in float32."""
    root = tmp_path_factory.mktemp("caches")
    flags = ("--image_variants", "3", "--cache_dtype", "float32")
    learned = {"5b-i2v": DROPPED, "1.5-5b-i2v": FLAGS}
    return {kind: preprocess(root / kind, models[kind], manifest, *learned[kind], *flags) for kind in KINDS}


def image(opened, row):
    return decode_array(opened.store("images").read(row["image_key"]), "test")


@pytest.mark.parametrize("kind", KINDS)
def test_each_variant_is_the_vaes_encoding_of_the_first_frame_with_the_documented_noise(kind, models, manifest, opened):
    """Everything again from docs/format.md: decoded, resized, noised and encoded by other code."""
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(models[kind], subfolder="vae")
    assert len(opened[kind].rows) == 2
    for row in opened[kind].rows:
        first = resized_frames(manifest / row["source"], 64, 96)[:, :, :1]
        stored = image(opened[kind], row)
        assert stored.shape == (3, 32, 1, 8, 12)
        for variant in range(3):
            generator = torch.Generator().manual_seed(seed_for("image", row["image_key"].hex(), variant))
            sigma = torch.exp(-3 + 0.5 * torch.randn((), generator=generator, dtype=torch.float64))
            noisy = first + sigma.float() * torch.randn(3, 64, 96, generator=generator)[None, :, None]
            with torch.no_grad():
                posterior = vae.encode(noisy).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0]
            np.testing.assert_allclose(stored[variant], expected, atol=1e-5)


def test_variants_differ_from_each_other_and_between_clips(opened):
    arrays = [image(opened["5b-i2v"], row) for row in opened["5b-i2v"].rows]
    encodings = [variant for array in arrays for variant in array]
    for number, one in enumerate(encodings):
        assert all(np.abs(one - other).max() > 1e-3 for other in encodings[:number])


def test_log_sigma_is_normal_with_mean_3_below_zero_and_deviation_a_half():
    drawn = [math.log(draw_sigma(noise_generator(bytes([key // 256, key % 256]), 1))) for key in range(4000)]
    assert statistics.mean(drawn) == pytest.approx(-3, abs=4 * 0.5 / math.sqrt(4000))
    assert statistics.stdev(drawn) == pytest.approx(0.5, rel=0.05)
    assert max(drawn) > -1.75  # 2.5 deviations: not cut off
    assert min(drawn) < -4.25


def test_the_noise_is_normal_and_not_clipped_to_the_range_of_pixels():
    white = np.full((64, 96, 3), 255, np.uint8)
    noised, sigmas = noised_images(white, b"k" * 16, 4)
    assert noised.shape == (4, 3, 1, 64, 96)
    assert noised.dtype == torch.float32
    assert noised.max() > 1
    for variant, sigma in zip(noised, sigmas, strict=True):
        assert float((variant - 1).std()) == pytest.approx(sigma, rel=0.03)
        assert float((variant - 1).mean()) == pytest.approx(0, abs=0.03 * sigma)


def test_more_variants_leave_the_first_ones_as_they_are():
    frame = np.zeros((16, 16, 3), np.uint8)
    few, many = (noised_images(frame, b"k" * 16, count)[0] for count in (2, 5))
    assert torch.equal(few, many[:2])
    other, _ = noised_images(frame, b"l" * 16, 2)
    assert not torch.equal(few, other)


def test_a_data_set_tells_of_its_images(opened):
    whole = opened["5b-i2v"]
    info, row = whole.dataset.info, whole.rows[0]
    latents = {name: value for name, value in info["facts"]["latents"].items() if name != "kind"}
    noise = {"variants": 3, "log_sigma_mean": -3.0, "log_sigma_std": 0.5}
    assert info["facts"]["images"] == {**latents, **noise, "kind": "images"}
    assert whole.store("images").fingerprint == info["fingerprints"]["images"]
    location = whole.store("images").location(int(whole.store("images").find([row["image_key"]])[0]))
    told = [row[f"image_{fact}"] for fact in ("part", "offset", "size_bytes", "crc32")]
    assert told == [location.part, location.offset, location.size_bytes, location.crc32]


def test_the_key_is_of_the_bytes_the_first_frame_and_its_place(opened):
    key = image_key("ab" * 32, 3, {"top": 1}, 1)
    others = [image_key("cd" * 32, 3, {"top": 1}, 1), image_key("ab" * 32, 4, {"top": 1}, 1)]
    others += [image_key("ab" * 32, 3, {"top": 2}, 1), image_key("ab" * 32, 3, {"top": 1}, 2)]
    assert len({key, *others}) == 5
    keys = {kind: [row["image_key"] for row in whole.rows] for kind, whole in opened.items()}
    assert keys["5b-i2v"] == keys["1.5-5b-i2v"]


def test_a_cache_with_images_is_clean_and_has_no_garbage(opened, capsys):
    url = opened["5b-i2v"].dataset.cache.url
    assert verify([url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clean"
    assert gc([url, "--older_than", "0"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_facts_stand_beside_each_image(opened):
    import tarfile

    whole = opened["5b-i2v"]
    row = whole.rows[0]
    part = whole.dataset.cache.storage.local(f"{whole.dataset.store_folder('image')}/{row['image_part']}.tar")
    with tarfile.open(part) as tar:
        member = tar.extractfile(f"{row['image_key'].hex()}.json")
        assert member is not None
        facts = json.loads(member.read())
    expected = [draw_sigma(noise_generator(row["image_key"], variant)) for variant in range(3)]
    assert facts["sigmas"] == expected
    assert facts["frame_index"] == 0
    assert set(facts) == {"frame_index", "placement", "pixels_version", "sigmas"}


class Reads:
    """Notes the frames that decoding children are asked for."""

    def __init__(self, monkeypatch):
        self.indices: list[list[int]] = []
        read = DecodePool.read

        def noted(pool, path, probe, indices, *rest, **named):
            self.indices.append(list(indices))
            return read(pool, path, probe, indices, *rest, **named)

        monkeypatch.setattr(DecodePool, "read", noted)


def test_text_to_video_and_image_to_video_share_moments(models, manifest, tmp_path, monkeypatch, capsys):
    """The second run reads of each clip the one frame that it needs, and says what it did; a third reads nothing."""
    first = preprocess(tmp_path / "cache", models["5b"], manifest, *FLAGS)
    assert first.report["encoded"] == {"latents": 2, "images": 0, "embeddings": 3}
    assert first.dataset.info["fingerprints"]["images"] is first.dataset.info["facts"]["images"] is None
    assert all(row["image_key"] is row["image_part"] is None for row in first.rows)
    assert not (tmp_path / "cache" / "images").exists()
    reads = Reads(monkeypatch)
    capsys.readouterr()
    second = preprocess(tmp_path / "cache", models["5b-i2v"], manifest, *DROPPED)
    assert second.report["encoded"] == {"latents": 0, "images": 2, "embeddings": 0}
    assert second.report["reused"] == {"latents": 2, "images": 0, "embeddings": 3}
    assert second.report["bytes"].keys() == {"images"}
    assert reads.indices == [[0], [0]]
    assert "encoded   0 clips, 0 prompts, 2 images" in capsys.readouterr().out
    assert [row["latent_part"] for row in second.rows] == [row["latent_part"] for row in first.rows]
    assert second.dataset.digest != first.dataset.digest
    third = preprocess(tmp_path / "cache", models["5b-i2v"], manifest, *DROPPED)
    assert third.report["encoded"] == {"latents": 0, "images": 0, "embeddings": 0}
    assert third.report["reused"] == {"latents": 2, "images": 2, "embeddings": 3}
    assert third.dataset.digest == second.dataset.digest
    assert len(reads.indices) == 2


def test_another_number_of_variants_encodes_images_only(models, manifest, tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    first = preprocess(tmp_path / "cache", models["5b-i2v"], manifest, *DROPPED, "--image_variants", "2")
    assert first.report["encoded"] == {"latents": 2, "images": 2, "embeddings": 3}
    assert [len(indices) for indices in reads.indices] == [9, 9], "each clip is read once"
    second = preprocess(tmp_path / "cache", models["5b-i2v"], manifest, *DROPPED, "--image_variants", "3")
    assert second.report["encoded"] == {"latents": 0, "images": 2, "embeddings": 0}
    for before, after in zip(first.rows, second.rows, strict=True):
        assert before["image_key"] == after["image_key"]
        np.testing.assert_allclose(image(first, before), image(second, after)[:2], atol=2e-3)


def test_clips_that_share_a_first_frame_share_its_image_and_no_failure(models, clips, tmp_path):
    """A clip whose end is damaged is rejected; the image of the shorter one, which needs the same frame, is made."""
    folder = tmp_path / "clips"
    folder.mkdir()
    from tests.conftest import moving_square, write_video

    whole = write_video(folder / "a.mp4", moving_square(7, frames=33))
    data = whole.read_bytes()
    start = int(len(data) * 0.75)
    whole.write_bytes(data[:start] + bytes(400) + data[start + 400 :])
    segments = [{"video": "a.mp4", "caption": f"to {end}", "start": 0, "end": end} for end in (4.0, 1.25, 1.75)]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, segments)))
    size = ["--height", "64", "--width", "96", "--max_num_frames", "33"]
    opened = preprocess(tmp_path / "cache", models["5b-i2v"], folder / "m.jsonl", *DROPPED, size=size)
    assert [row["reason"] for row in opened.rejected] == ["unreadable"]
    assert [row["frames"] for row in opened.rows] == [9, 13]
    assert len({row["image_key"] for row in opened.rows}) == 1
    assert opened.report["encoded"]["images"] == 1
    assert image(opened, opened.rows[0]).shape == (4, 32, 1, 8, 12)


def test_an_image_that_is_not_finite_rejects_its_clip(models, manifest, tmp_path, monkeypatch):
    from preprocess.encode import VideoEncoder

    def broken(encoder, pixels):
        return np.full((len(pixels), 32, 1, 8, 12), np.nan, np.float16)

    monkeypatch.setattr(VideoEncoder, "encode_images", broken)
    with pytest.raises(UserError, match="non_finite"):
        preprocess(tmp_path / "cache", models["5b-i2v"], manifest, *DROPPED)
    assert not (tmp_path / "cache" / "images").exists()


def test_an_image_that_is_not_finite_rejects_every_clip_that_begins_with_it(models, tmp_path, monkeypatch):
    """Two clips of one beginning: neither may be given another clip's image, in this run or when it is run again."""
    from preprocess.encode import VideoEncoder
    from tests.conftest import write_video

    folder = tmp_path / "clips"
    folder.mkdir()
    write_video(folder / "dark.mp4", np.full((9, 64, 96, 3), 10, np.uint8))
    write_video(folder / "light.mp4", np.full((17, 64, 96, 3), 250, np.uint8))
    rows: list[dict[str, object]] = [{"video": "dark.mp4", "caption": "dark"}]
    rows += [{"video": "light.mp4", "caption": f"to {end}", "start": 0, "end": end} for end in (2.125, 1.125)]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encode = VideoEncoder.encode_images

    def broken(encoder, pixels):
        encoded = encode(encoder, pixels)
        return np.full_like(encoded, np.nan) if float(pixels.mean()) > 0 else encoded

    monkeypatch.setattr(VideoEncoder, "encode_images", broken)
    size = ["--height", "64", "--width", "96", "--max_num_frames", "17"]
    for _ in range(2):  # the second time their moments are there
        opened = preprocess(tmp_path / "cache", models["5b-i2v"], folder / "m.jsonl", *DROPPED, size=size)
        assert [row["source"] for row in opened.rows] == ["dark.mp4"]
        assert [row["reason"] for row in opened.rejected] == ["non_finite"] * 2


def test_a_random_flip_is_refused_for_image_to_video(models, manifest, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--random_flip 0.5: the checkpoint is CogVideoX 1.0 image-to-video"
    ) as error:
        preprocess(tmp_path / "cache", models["5b-i2v"], manifest, *DROPPED, "--random_flip", "0.5")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_no_variants_are_refused(models, manifest, tmp_path):
    with pytest.raises(ConfigError, match="--image_variants 0; must be at least 1"):
        preprocess(tmp_path / "cache", models["5b-i2v"], manifest, "--image_variants", "0")
