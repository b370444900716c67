"""Whatever changes numbers is in a key or a fingerprint, and nothing else is: a run, a change, another run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from preprocess import plan, sources, units, video
from tests.conftest import moving_square, write_video
from tests.decoding import InProcessPool, use_stand_ins
from tests.test_preprocess import preprocess

SIZE = ["--height", "32", "--width", "48", "--max_num_frames", "9"]
CLIPS, PROMPTS = 3, 4  # the empty prompt too
NAMES = [f"{number}.mp4" for number in range(CLIPS)]
NOTHING = (0, 0)
EVERYTHING = (CLIPS, PROMPTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_2b):
    """Videos, a manifest and a model, and the caches of three runs over them; all in one folder that tests change."""
    work = tmp_path_factory.mktemp("stale") / "work"
    (work / "clips").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        write_video(work / "clips" / name, moving_square(number, 24, 96, 64))
    write_manifest(work)
    shutil.copytree(tiny_2b, work / "model")
    with pytest.MonkeyPatch.context() as patch:
        use_stand_ins(patch)
        for name, flags in {"plain": [], "tiled": ["--enable_tiling"]}.items():
            opened = preprocess(work / name, work / "model", work / "clips" / "m.jsonl", *flags, size=SIZE)
            assert opened.encoded == EVERYTHING
    pristine = work.with_name("pristine")
    shutil.copytree(work, pristine)
    return work, pristine


@pytest.fixture
def work(made, monkeypatch):
    """The folder as it was made, modification times included."""
    work, pristine = made
    shutil.rmtree(work)
    shutil.copytree(pristine, work)
    use_stand_ins(monkeypatch)
    monkeypatch.setattr(InProcessPool, "probed", [])
    return work


def write_manifest(work, order=(0, 1, 2), **captions):
    rows = [{"video": NAMES[number], "caption": captions.get(f"of_{number}", f"square {number}")} for number in order]
    (work / "clips" / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(work, *flags, cache="plain", folder="clips", **options):
    return preprocess(work / cache, work / "model", work / folder / "m.jsonl", *flags, **{"size": SIZE, **options})


def edit_weights(work, part, name):
    from safetensors.torch import load_file, save_file

    (path,) = (work / "model" / part).glob("*.safetensors")
    state = load_file(path)
    state[name] = state[name] * 1.5
    save_file(state, path, {"format": "pt"})


def edit_json(path, **facts):
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def write_other(path: Path, seed=77, size_bytes=None):
    """Other pixels under the same name; padded to a size with a box that players skip."""
    write_video(path, moving_square(seed, 24, 96, 64))
    if size_bytes is not None:
        free = size_bytes - path.stat().st_size
        path.write_bytes(path.read_bytes() + free.to_bytes(4) + b"free" + bytes(free - 8))


def touch(path: Path):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


def vae_config(**facts):
    return lambda work: edit_json(work / "model" / "vae" / "config.json", **facts)


def t5_config(**facts):
    return lambda work: edit_json(work / "model" / "text_encoder" / "config.json", **facts)


def transformer_config(**facts):
    return lambda work: edit_json(work / "model" / "transformer" / "config.json", **facts)


def case(name, *flags, change=lambda work: None, encoded=NOTHING, probed=0, **options):
    return pytest.param(SimpleNamespace(**locals()), id=name.replace(" ", "_"))


CASES = [
    # what changes the numbers of clips
    case("vae weights", change=lambda work: edit_weights(work, "vae", "encoder.conv_in.conv.weight"), encoded=(3, 0)),
    case("vae config", change=vae_config(norm_eps=1e-3), encoded=(3, 0)),
    case("tiling", "--enable_tiling", encoded=(3, 0)),
    case("tile size", "--enable_tiling", change=vae_config(sample_height=96), encoded=(3, 0), cache="tiled"),
    case("tile size untiled", change=vae_config(sample_height=96)),
    case("fps", "--fps", "5", encoded=(3, 0)),
    case("fps of the source", "--fps", "source"),  # it is 8 already
    case("skip start", "--skip_frames_start", "1", encoded=(3, 0)),
    case("skip end beyond the clip", "--skip_frames_end", "1"),
    case("skip end", "--skip_frames_end", "19", "--min_num_frames", "5", encoded=(3, 0)),
    case("flip", "--random_flip", "0.5", encoded=(3, 0)),
    case("size", encoded=(3, 0), size=["--height", "48", "--width", "48", "--max_num_frames", "9"]),
    case("frames", encoded=(3, 0), size=["--height", "32", "--width", "48", "--max_num_frames", "13"]),
    case("video", change=lambda work: write_other(work / "clips" / "1.mp4"), encoded=(1, 0), probed=1),
    # what changes the numbers of prompts
    case("t5 weights", change=lambda work: edit_weights(work, "text_encoder", "shared.weight"), encoded=(0, 4)),
    case("t5 config", change=t5_config(layer_norm_epsilon=1e-3), encoded=(0, 4)),
    case("tokenizer", change=lambda work: edit_json(work / "model" / "tokenizer" / "special_tokens_map.json", a=1),
         encoded=(0, 4)),
    case("length", change=transformer_config(max_text_seq_length=64), encoded=(0, 4)),
    case("id token", "--id_token", "SQR", encoded=(0, 3)),
    case("caption", change=lambda work: write_manifest(work, of_1="another"), encoded=(0, 1)),
    # what changes both
    case("dtype", "--dtype", "bfloat16", encoded=EVERYTHING),
    case("cache dtype", "--cache_dtype", "float32", encoded=EVERYTHING),
    # what changes none
    case("nothing"),
    case("slicing", "--enable_slicing"),
    case("vae batch", "--vae_batch_size", "2"),
    case("text batch", "--text_batch_size", "1"),
    case("shard size", "--shard_size", "1"),
    case("workers", "--dataloader_num_workers", "3"),
    case("order", change=lambda work: write_manifest(work, order=(2, 0, 1))),
    case("scaling factor", change=vae_config(scaling_factor=0.7, invert_scale_latents=True)),
    case("transformer", change=transformer_config(use_rotary_positional_embeddings=True)),
    case("seed", "--seed", "7"),
    case("name", dataset="other"),
    case("rehash", "--rehash"),
    case("touched", change=lambda work: touch(work / "clips" / "1.mp4"), probed=1),
    case("weights touched", change=lambda work: touch(work / "model" / "vae" / "diffusion_pytorch_model.safetensors")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_change_encodes_what_it_changes_and_nothing_else(work, case):
    case.change(work)
    opened = run(work, *case.flags, **case.options)
    assert opened.encoded == case.encoded
    assert len(InProcessPool.probed) == case.probed
    assert sorted(row["source"] for row in opened.rows) == NAMES
    again = run(work, *case.flags, **case.options)
    assert again.encoded == NOTHING
    assert again.dataset.digest == opened.dataset.digest


def test_code_that_makes_other_pixels_probes_and_encodes_every_clip_again(work, monkeypatch):
    for module in (plan, sources, units):
        monkeypatch.setattr(module, "PIXELS_VERSION", video.PIXELS_VERSION + 1)
    assert run(work).encoded == (CLIPS, 0)
    assert len(InProcessPool.probed) == CLIPS
    assert run(work).encoded == NOTHING


def test_pixels_version_is_patched_everywhere_that_it_is_used():
    users = [path.stem for path in Path(video.__file__).parent.glob("*.py") if "PIXELS_VERSION" in path.read_text()]
    assert sorted(users) == ["captioning", "plan", "sources", "units", "video"]  # captioning: of captions, not clips


def test_another_video_of_the_same_name_and_size_is_told_by_its_time(work):
    path = work / "clips" / "1.mp4"
    size_bytes = path.stat().st_size + 100_000
    write_other(path, 77, size_bytes)
    assert run(work).encoded == (1, 0)
    write_other(path, 78, size_bytes)
    assert path.stat().st_size == size_bytes
    assert run(work).encoded == (1, 0)


def test_a_moved_video_is_probed_again_but_not_encoded(work):
    (work / "clips").rename(work / "elsewhere")
    assert run(work, folder="elsewhere").encoded == NOTHING
    assert len(InProcessPool.probed) == CLIPS


def test_mirror_images_are_encoded_beside_the_clips_that_are_there_once(work):
    plain = run(work)
    mirrored = run(work, "--random_flip", "0.5")
    assert mirrored.encoded == (CLIPS, 0)
    assert [row["latent_key"] for row in mirrored.rows] == [row["latent_key"] for row in plain.rows]
    assert run(work, "--random_flip", "0.1").encoded == NOTHING
    assert run(work).encoded == NOTHING


def test_another_crop_is_another_clip_by_mode_and_by_seed(work):
    flags = ["--video_reshape_mode", "random"]
    crops = {tuple(row["crop"].values()) + (row["source"],) for row in run(work).rows}
    for seed in ("42", "7"):
        opened = run(work, *flags, "--seed", seed)
        new = {tuple(row["crop"].values()) + (row["source"],) for row in opened.rows} - crops
        assert len(new) > 0, "of 41 places each"
        assert opened.encoded == (len(new), 0)
        crops |= new
    assert run(work, *flags, "--seed", "42").encoded == NOTHING
