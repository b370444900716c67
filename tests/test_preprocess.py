"""Stage 1 as a whole, in process: what is encoded, what is reused, what is rejected, and that the numbers are right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from preprocess.__main__ import main
from shared.cache import Cache, Store, embedding_key
from shared.dataset import open_dataset
from shared.errors import ManifestError, UserError
from shared.shards import decode_array
from shared.storage import Storage
from tests.conftest import ROOT, moving_square, write_video

SIZE = ["--height", "64", "--width", "96", "--max_num_frames", "9"]


def preprocess(cache, model, manifest, *flags, dataset="squares", size=SIZE):
    words = ["--cache", cache, "--dataset", dataset, "--pretrained_model_name_or_path", model]
    assert main([str(word) for word in (*words, "--dataset_name", manifest, *size, *flags)]) == 0
    return Opened(cache, dataset)


class Opened:
    """The current version of a data set, with its rows and report."""

    def __init__(self, cache, name):
        self.dataset = open_dataset(Cache(str(cache)), name)
        self.folder = self.dataset.cache.storage.local(self.dataset.folder)
        self.rows = pq.read_table(self.folder / "samples.parquet").to_pylist()
        self.rejected = pq.read_table(self.folder / "rejected.parquet").to_pylist()
        self.report = json.loads((self.folder / "report.json").read_text())

    def store(self, kind):
        told = dict(self.dataset.info["facts"][kind])
        told.pop("kind"), told.pop("format_version")
        store = Store(self.dataset.cache.storage, kind, told)
        store.refresh()
        return store

    def array(self, row, kind):
        store = self.store({"embedding": "embeddings"}.get(kind, "latents"))
        return decode_array(store.read(row[f"{kind}_key"]), "test")

    @property
    def encoded(self):
        return self.report["encoded"]["latents"], self.report["encoded"]["embeddings"]


@pytest.fixture
def folder(clips, tmp_path):
    """The first three clips with their captions, to change at will."""
    target = tmp_path / "clips"
    target.mkdir()
    for number in (0, 1, 3):
        for suffix in ("mp4", "txt"):
            shutil.copy(clips / f"{number}.{suffix}", target)
    return target


def resized_frames(path, height, width, mirrored=False):
    """All frames decoded and brought to height x width, independently of the code under test: [1, 3, F, H, W]."""
    import av

    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = [max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))]
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    pixels = pixels.flip(-1) if mirrored else pixels
    return (pixels.float() / 127.5 - 1).permute(1, 0, 2, 3)[None]


def test_moments_equal_the_vaes_on_frames_decoded_and_resized_independently(tiny_2b, clips, cache):
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_2b, subfolder="vae")
    opened = Opened(cache, "squares")
    assert len(opened.rows) == 7
    for row in opened.rows[:3]:
        for kind, mirrored in (("latent", False), ("mirrored", True)):
            pixels = resized_frames(clips / row["source"], row["height"], row["width"], mirrored)
            with torch.no_grad():
                posterior = vae.encode(pixels).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].numpy()
            stored = opened.array(row, kind)
            assert stored.dtype == np.float16
            assert stored.shape == (32, 3, row["height"] // 8, row["width"] // 8)
            np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=2e-3)


def test_float32_caches_hold_the_moments_exactly(tiny_2b, folder, tmp_path):
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_2b, subfolder="vae")
    opened = preprocess(tmp_path / "cache", tiny_2b, folder, "--cache_dtype", "float32")
    row = opened.rows[0]
    with torch.no_grad():
        posterior = vae.encode(resized_frames(folder / row["source"], 64, 96)).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].numpy()
    np.testing.assert_allclose(opened.array(row, "latent"), expected, atol=1e-5)


def test_prompt_embeddings_equal_the_pipelines(tiny_2b, cache):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(tiny_2b)
    opened = Opened(cache, "squares")
    row = opened.rows[0]
    assert row["effective_prompt"] == "SQR a square of colour number 0"
    with torch.no_grad():
        expected, empty = pipeline.encode_prompt(row["effective_prompt"], device="cpu")
    stored = opened.array(row, "embedding")
    assert stored.shape == (226, 32)
    np.testing.assert_array_equal(stored, expected[0].numpy().astype(np.float16))
    stored_empty = decode_array(opened.store("embeddings").read(embedding_key("")), "empty")
    np.testing.assert_array_equal(stored_empty, empty[0].numpy().astype(np.float16))
    assert row["tokens"] == len(pipeline.tokenizer(row["effective_prompt"]).input_ids)


def test_validation_prompts_are_in_the_cache_with_their_id_token(cache):
    entries = Opened(cache, "squares").dataset.info["validation_prompts"]
    assert [entry["effective_prompt"] for entry in entries] == ["SQR a blue square", "SQR a red square"]
    assert all(entry["embedding_key"] == embedding_key(entry["effective_prompt"]).hex() for entry in entries)


def test_a_second_run_encodes_nothing_and_gives_the_same_version(tiny_2b, folder, tmp_path):
    first = preprocess(tmp_path / "cache", tiny_2b, folder)
    assert first.encoded == (3, 4)  # the empty prompt too
    files = sorted(path for path in (tmp_path / "cache").rglob("*.tar"))
    second = preprocess(tmp_path / "cache", tiny_2b, folder)
    assert second.encoded == (0, 0)
    assert (second.report["reused"]["latents"], second.report["reused"]["embeddings"]) == (3, 4)
    assert second.dataset.digest == first.dataset.digest
    assert sorted(path for path in (tmp_path / "cache").rglob("*.tar")) == files


def test_a_second_run_imports_no_torch_and_opens_no_video(tiny_2b, folder, tmp_path):
    preprocess(tmp_path / "cache", tiny_2b, folder)
    words = ["--cache", tmp_path / "cache", "--dataset", "squares", "--pretrained_model_name_or_path", tiny_2b]
    argv = [str(word) for word in (*words, "--dataset_name", folder, *SIZE)]
    code = (
        "import sys, builtins, pathlib\n"
        "from preprocess.__main__ import main\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "sys.addaudithook(lambda event, args: opened.append('CHILD') if event == 'subprocess.Popen' else None)\n"
        f"assert main({argv!r}) == 0\n"
        "assert not {'torch', 'transformers', 'diffusers', 'datasets', 'av', 'decord'} & set(sys.modules)\n"
        "assert not [path for path in opened if path.endswith('.mp4') or path == 'CHILD'], opened\n"
        "assert [path for path in opened if path.endswith('.txt')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_changed_caption_encodes_one_prompt_and_no_clip(tiny_2b, folder, tmp_path):
    first = preprocess(tmp_path / "cache", tiny_2b, folder)
    (folder / "1.txt").write_text("another caption")
    second = preprocess(tmp_path / "cache", tiny_2b, folder)
    assert second.encoded == (0, 1)
    assert second.dataset.digest != first.dataset.digest
    assert [row["sample_id"] for row in second.rows] == [row["sample_id"] for row in first.rows]


def test_a_new_id_token_encodes_prompts_only(tiny_2b, folder, tmp_path):
    preprocess(tmp_path / "cache", tiny_2b, folder)
    second = preprocess(tmp_path / "cache", tiny_2b, folder, "--id_token", "NEW")
    assert second.encoded == (0, 3)
    assert all(row["effective_prompt"] == f"NEW {row['caption']}" for row in second.rows)


def test_another_order_makes_another_version_and_encodes_nothing(tiny_2b, folder, tmp_path):
    rows = [(f"{number}.mp4", f"caption {number}") for number in (0, 1, 3)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        lines = [json.dumps({"video": video, "caption": caption}) for video, caption in order]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    first = preprocess(tmp_path / "cache", tiny_2b, folder / "a.jsonl")
    second = preprocess(tmp_path / "cache", tiny_2b, folder / "b.jsonl")
    assert second.encoded == (0, 0)
    assert second.dataset.digest != first.dataset.digest
    assert [row["source"] for row in second.rows] == [row["source"] for row in first.rows][::-1]
    version = first.dataset.cache.storage.local(first.dataset.folder)
    assert version.is_dir(), "the first version is immutable and stays"


def test_a_broken_clip_in_the_middle_shifts_no_caption(tiny_2b, folder, tmp_path):
    """A peer dropped a short clip and moved every later caption by one."""
    shutil.copy(folder / "0.mp4", folder / "4.mp4")
    (folder / "4.txt").write_text("the last caption")
    (folder / "2.mp4").write_bytes(b"not a video at all" * 100)
    (folder / "2.txt").write_text("the broken caption")
    opened = preprocess(tmp_path / "cache", tiny_2b, folder)
    captions = {row["source"]: row["caption"] for row in opened.rows}
    expected = {f"{number}.mp4": (folder / f"{number}.txt").read_text() for number in (0, 1, 3, 4)}
    assert captions == expected
    assert [(row["source"], row["reason"]) for row in opened.rejected] == [("2.mp4", "unreadable")]
    assert opened.rejected[0]["caption"] == "the broken caption"
    assert opened.report["rejected"] == {"unreadable": 1}


def test_clips_of_one_name_in_two_folders_have_their_own_latents(tiny_2b, tmp_path):
    for number, name in enumerate(("left", "right")):
        (tmp_path / "clips" / name).mkdir(parents=True)
        write_video(tmp_path / "clips" / name / "clip.mp4", moving_square(number))
        (tmp_path / "clips" / name / "clip.txt").write_text("a square")
    opened = preprocess(tmp_path / "cache", tiny_2b, tmp_path / "clips")
    left, right = (opened.array(row, "latent") for row in opened.rows)
    assert np.abs(left - right).max() > 1e-3
    assert opened.encoded == (2, 2)


def test_the_same_video_under_two_captions_is_encoded_once(tiny_2b, folder, tmp_path):
    rows = [{"video": "0.mp4", "caption": caption} for caption in ("one", "two")]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    opened = preprocess(tmp_path / "cache", tiny_2b, folder / "m.jsonl")
    assert opened.encoded == (1, 3)
    assert len({row["sample_id"] for row in opened.rows}) == 2
    assert len({row["latent_key"] for row in opened.rows}) == 1


def test_too_short_clips_are_rejected_and_long_ones_take_4k_plus_1_frames(tiny_2b, folder, tmp_path):
    write_video(folder / "5.mp4", moving_square(5, frames=8))
    write_video(folder / "6.mp4", moving_square(6, frames=16))
    for number in (5, 6):
        (folder / f"{number}.txt").write_text("a square")
    size = ["--height", "64", "--width", "96", "--max_num_frames", "49"]
    opened = preprocess(tmp_path / "cache", tiny_2b, folder, size=size)
    assert {row["source"]: row["bucket"] for row in opened.rows}["6.mp4"] == "13x64x96"
    assert [(row["source"], row["reason"]) for row in opened.rejected] == [("5.mp4", "too_short")]


def test_buckets_take_portrait_and_landscape(cache):
    rows = Opened(cache, "squares").rows
    assert {row["source"]: row["bucket"] for row in rows} == {
        f"{number}.mp4": "9x96x64" if number in (2, 5) else "9x64x96" for number in range(7)
    }


def test_previews_show_what_was_encoded(cache):
    from PIL import Image

    opened = Opened(cache, "squares")
    row = opened.rows[0]
    part = opened.dataset.cache.storage.local(f"{opened.dataset.store_folder('latent')}/{row['latent_part']}.tar")
    with tarfile.open(part) as tar:
        member = tar.extractfile(f"{row['latent_key'].hex()}.preview.jpg")
        assert member is not None
        strip = np.asarray(Image.open(member))
    assert strip.shape == (64, 4 * 96, 3)
    expected = moving_square(0, 9, 72, 104)[0]
    top_left, left_frame = strip[:8, :8].mean(), strip[:, :96]
    assert abs(top_left - expected[4:12, 4:12].mean()) < 12
    assert abs(left_frame.mean() - expected.mean()) < 12


def test_the_same_input_twice_gives_byte_identical_tars(tiny_2b, folder, tmp_path):
    tars = []
    for name in ("first", "second"):
        preprocess(tmp_path / name, tiny_2b, folder)
        found = {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.tar")}
        tars.append(found)
    assert len(tars[0]) == 2
    assert tars[0] == tars[1]


def test_small_shards_and_batches_change_no_number(tiny_2b, folder, tmp_path):
    whole = preprocess(tmp_path / "whole", tiny_2b, folder)
    flags = ["--shard_size", "1", "--text_batch_size", "1", "--vae_batch_size", "2", "--dataloader_num_workers", "2"]
    small = preprocess(tmp_path / "small", tiny_2b, folder, *flags)
    assert small.dataset.digest == whole.dataset.digest
    for one, other in zip(whole.rows, small.rows, strict=True):
        for kind in ("latent", "embedding"):
            np.testing.assert_allclose(whole.array(one, kind), small.array(other, kind), rtol=2e-3, atol=2e-3)
    assert len(list((tmp_path / "small").rglob("latents/*/*.tar"))) == 3


def test_random_crops_are_drawn_from_the_seed_alone(tiny_2b, folder, tmp_path):
    runs = [
        preprocess(tmp_path / str(number), tiny_2b, folder, "--video_reshape_mode", "random", "--seed", str(seed),
                   size=["--height", "32", "--width", "96", "--max_num_frames", "9"])
        for number, seed in enumerate((1, 1, 2))
    ]  # fmt: skip
    crops = [[row["crop"]["top"] for row in run.rows] for run in runs]
    assert crops[0] == crops[1] != crops[2]


def test_nothing_is_written_when_the_manifest_is_wrong(tiny_2b, folder, tmp_path):
    (folder / "1.txt").write_text("  ")
    with pytest.raises(ManifestError, match="empty"):
        preprocess(tmp_path / "cache", tiny_2b, folder)
    assert not (tmp_path / "cache").exists()


def test_sizes_that_the_model_cannot_take_are_refused_before_anything_is_opened(tiny_2b, folder, tmp_path):
    with pytest.raises(UserError, match=r"height 60: must be a multiple of 16; use 48 or 64"):
        preprocess(tmp_path / "cache", tiny_2b, folder, size=["--height", "60", "--width", "96"])
    assert not (tmp_path / "cache").exists()


def test_all_rejected_or_strict_publish_nothing(tiny_2b, folder, tmp_path):
    with pytest.raises(UserError, match="all 3 clips were rejected"):
        preprocess(tmp_path / "cache", tiny_2b, folder, "--min_num_frames", "13", size=[*SIZE[:4]])
    (folder / "1.mp4").write_bytes(b"broken")
    with pytest.raises(UserError, match="1 of 3 clips were rejected"):
        preprocess(tmp_path / "cache", tiny_2b, folder, "--strict")
    assert not (tmp_path / "cache" / "datasets").exists()


def test_a_non_finite_encoding_is_rejected_by_name(folder, tmp_path, tiny_2b):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_2b, model)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["encoder.conv_out.conv.weight"].fill_(float("nan"))
    save_file(state, weights)
    with pytest.raises(UserError, match="non_finite"):
        preprocess(tmp_path / "cache", model, folder)


def test_tiling_has_its_own_fingerprint_and_slicing_has_not(tiny_2b, folder, tmp_path):
    first = preprocess(tmp_path / "cache", tiny_2b, folder)
    sliced = preprocess(tmp_path / "cache", tiny_2b, folder, "--enable_slicing", "--vae_batch_size", "2")
    tiled = preprocess(tmp_path / "cache", tiny_2b, folder, "--enable_tiling")
    assert sliced.encoded == (0, 0)
    assert tiled.encoded == (3, 0)
    assert first.dataset.info["facts"]["latents"]["tiling"] is None
    assert tiled.dataset.info["facts"]["latents"]["tiling"]["height"] == 240


def test_the_writers_folder_is_empty_afterwards(cache):
    storage = Storage(str(cache))
    assert [name for name in storage.names("writers") if not name.startswith(".")] == []
    assert set(storage.names("")) == {"latents", "embeddings", "datasets", "sources.parquet", "writers"}


def test_the_summary_counts_what_was_done(tiny_2b, folder, tmp_path, capsys):
    (folder / "1.mp4").write_bytes(b"broken")
    preprocess(tmp_path / "cache", tiny_2b, folder)
    printed = capsys.readouterr()
    assert "encoded   2 clips, 3 prompts" in printed.out
    assert "bucket    9x64x96: 2 clips" in printed.out
    assert "rejected  1 unreadable" in printed.out
    assert "1.mp4: unreadable" in printed.err
