"""Videos that are there are not made again, a recipe makes its video again, and strengths stand side by side."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infer import gallery
from infer import generate as generate_module
from infer.__main__ import main
from infer.compare import strip, strip_height
from infer.config import InferConfig
from infer.generate import batches, generate, make_batch
from infer.recipe import Recipe
from infer.request import resolve
from infer.video import read_mp4
from shared.config import parse_config
from shared.errors import ConfigError, LoraError, ModelError
from tests import tiny_model
from tests.conftest import run_command
from tests.test_infer import PROMPT, make, recipe_of
from tests.test_lora_inference import random_lora


@pytest.fixture(scope="module")
def lora(tiny_2b, tmp_path_factory):
    return random_lora(tiny_2b, tmp_path_factory.mktemp("lora"))[1]


@pytest.fixture(scope="module")
def three(lora, tmp_path_factory):
    """Three seeds of a prompt, each at two strengths, and what stands side by side."""
    folder = tmp_path_factory.mktemp("three")
    told = {"lora": str(lora), "prompt": PROMPT, "num_videos": 3, "compare": "base,1.0", "seed": 5}
    return told, folder, make(folder, **told)


def no_loading(*_: Any, **__: Any) -> None:
    pytest.fail("a model was loaded")


def test_seeds_count_up_and_each_is_the_video_of_that_seed_alone(lora, three, tmp_path):
    _, _, videos = three
    singles = videos[:6]
    assert [(recipe_of(one)["seed"], recipe_of(one)["lora_scale"]) for one in singles] == [
        (5, 0.0), (5, 1.0), (6, 0.0), (6, 1.0), (7, 0.0), (7, 1.0),
    ]  # fmt: skip
    (alone,) = make(tmp_path, lora=str(lora), prompt=PROMPT, seed=6)
    (base,) = make(tmp_path, lora=str(lora), prompt=PROMPT, seed=6, lora_scale=0)
    assert recipe_of(alone) == recipe_of(singles[3])
    assert recipe_of(base) == recipe_of(singles[2])
    assert len({recipe_of(one)["frames_sha256"] for one in singles}) == 6


def test_strengths_stand_side_by_side_under_their_names(three):
    _, _, videos = three
    for number, video in enumerate(videos[6:]):
        base, strong = videos[2 * number : 2 * number + 2]
        frames, gap, top = read_mp4(video), 4, 16
        assert frames.shape == (9, top + 32, 48 + gap + 48, 3)
        for left, one in ((0, base), (48 + gap, strong)):
            inside = frames[:, top + 2 : top + 30, left + 2 : left + 46].astype(int)
            assert np.abs(inside - read_mp4(one)[:, 2:30, 2:46]).mean() < 4
            assert frames[0, :top, left : left + 48].max() > 150, "the strength is written above it"
        told = json.loads(video.with_suffix(".json").read_text())
        assert [entry["label"] for entry in told["compare"]] == ["base", "LoRA 1"]
        assert [entry["name"] for entry in told["compare"]] == [base.stem, strong.stem]
        assert (told["frames"], told["height"], told["width"]) == frames.shape[:3]
        assert {recipe_of(one)["group"] for one in (base, strong)} == {told["group"]}
    assert len({recipe_of(one)["group"] for one in videos}) == 3


@pytest.mark.parametrize("text", ["base", "LoRA 1", "LoRA 0.5", "LoRA -0.25", "LoRA 0.333333"])
@pytest.mark.parametrize("width", [48, 64, 96, 480, 720, 1360])
def test_no_strength_is_cut_and_above_large_videos_it_is_larger(text, width):
    """In the margins there is no ink; between them as much as in a strip of any width."""
    height = strip_height(width)
    pixels = strip(text, height, width)
    ink = pixels[..., 0] > 60
    assert pixels.shape == (height, width, 3)
    assert ink.any()
    assert not ink[:, [0, -1]].any()
    assert not ink[[0, 1, -2, -1]].any()
    columns = np.flatnonzero(ink.any(axis=0))
    rows = np.flatnonzero(ink.any(axis=1))
    assert columns[-1] - columns[0] >= 12, "all of it"
    assert rows[-1] - rows[0] >= max(4, width // 60), "to be read when the whole is as wide as a page"


def test_what_is_there_is_not_made_again_and_nothing_is_loaded(three, monkeypatch):
    told, folder, videos = three
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    monkeypatch.setattr(generate_module, "encode_prompts", no_loading)
    monkeypatch.setattr(generate_module, "load_pipeline", no_loading)
    again = list(generate(resolve(InferConfig(**told, num_inference_steps=2, output_dir=str(folder)))))
    assert [one.path for one in again] == videos
    assert not any(one.made for one in again)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before


def test_the_page_is_written_after_each_video_that_is_made_and_at_the_end(three, tmp_path, monkeypatch):
    told, folder, videos = three
    copy = shutil.copytree(folder, tmp_path / "copy")
    counts: list[int] = []
    monkeypatch.setattr(gallery, "write_gallery", lambda folder: counts.append(len(list(folder.glob("*.mp4")))))
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    words += ["--num_inference_steps", "2", "--output_dir", str(copy)]
    assert main(words) == 0
    assert counts == [9], "nothing is made"
    for lost in (videos[0], videos[6]):
        (copy / lost.name).unlink()
    assert main(words) == 0
    assert counts == [9, 8, 9, 9]


@pytest.mark.parametrize("torn", [".mp4", ".json"])
def test_of_a_video_that_is_half_there_only_that_is_made_again(three, tmp_path, torn):
    told, folder, videos = three
    copy = shutil.copytree(folder, tmp_path / "copy")
    lost, side = copy / videos[3].name, copy / videos[7].name
    lost.with_suffix(torn).unlink()
    side.with_suffix(torn).unlink()
    again = list(generate(resolve(InferConfig(**told, num_inference_steps=2, output_dir=str(copy)))))
    assert {one.path for one in again if one.made} == {lost, side}
    assert recipe_of(lost) == recipe_of(videos[3])
    assert side.with_suffix(".json").read_bytes() == videos[7].with_suffix(".json").read_bytes()
    assert read_mp4(side).shape == read_mp4(videos[7]).shape


def test_a_name_that_is_another_videos_is_refused(three, tmp_path):
    told, folder, videos = three
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / f"{videos[0].stem}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "guidance_scale": 3.5}))
    with pytest.raises(ConfigError, match="is there, of another video; give another --output_dir"):
        resolve(InferConfig(**told, num_inference_steps=2, output_dir=str(copy)))


def test_rows_with_the_embeddings_of_a_cache_are_those_with_t5(tiny_2b, cache, tmp_path):
    path = random_lora(tiny_2b, tmp_path / "lora", cache_dtype="float16")[1]
    rows = tmp_path / "rows.jsonl"
    told = [{"prompt": "a red square", "seed": 9, "width": 64}, {"prompt": "a blue square", "num_frames": 5}]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in told))
    flags: dict[str, Any] = {"lora": str(path), "prompts": str(rows), "num_inference_steps": 1}
    with_t5 = make(tmp_path / "t5", **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "encode_prompts", no_loading)
        cached = make(tmp_path / "cached", **flags, cache=str(cache), dataset="squares")
    assert [recipe_of(one) for one in cached] == [recipe_of(one) for one in with_t5]
    assert [(recipe_of(one)["seed"], recipe_of(one)["width"], recipe_of(one)["frames"]) for one in cached] == [
        (9, 64, 9), (42, 48, 5),
    ]  # fmt: skip


# --- recipes


def test_a_recipe_makes_the_same_frames_again(three, tmp_path, capsys):
    _, _, videos = three
    words = ["--recipe", str(videos[3].with_suffix(".json")), "--output_dir", str(tmp_path)]
    assert main(words) == 0
    assert "\nframes    are those of the recipe, to the last bit\n" in capsys.readouterr().out
    (video,) = tmp_path.glob("*.mp4")
    assert video.name == videos[3].name
    assert recipe_of(video) == recipe_of(videos[3])


def test_frames_that_differ_from_the_recipes_are_told(three, tmp_path, capsys):
    _, _, videos = three
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**recipe_of(videos[3]), "frames_sha256": "0" * 64}))
    assert main(["--recipe", str(file), "--output_dir", str(tmp_path)]) == 0
    assert "frames    differ from the recipe's" in capsys.readouterr().out


def test_a_changed_lora_is_refused_and_a_moved_one_is_taken(three, lora, tiny_2b, tmp_path):
    _, _, videos = three
    recipe = recipe_of(videos[3])
    other = random_lora(tiny_2b, tmp_path / "other", step=8)[1]
    moved = shutil.copy(lora, tmp_path / "moved.safetensors")
    told: dict[str, Any] = {"recipe": str(tmp_path / "a.json"), "output_dir": str(tmp_path / "out")}
    (tmp_path / "a.json").write_text(json.dumps({**recipe, "loras": [{**recipe["loras"][0], "path": str(other)}]}))
    with pytest.raises(LoraError, match=r"the recipe's is [0-9a-f]{12}\.\.\.: the LoRA has changed"):
        resolve(InferConfig(**told))
    with pytest.raises(ConfigError, match="2 with a --recipe of 1"):
        resolve(InferConfig(**told, lora=(moved, str(lora))))
    with pytest.raises(ConfigError, match="which says the weight"):
        resolve(InferConfig(**told, lora=(f"{moved}:0.5",)))
    (video,) = generate(resolve(InferConfig(**told, lora=(str(moved),))))
    assert video.matches


def test_an_image_to_video_recipe_holds_its_picture_and_a_changed_one_is_refused(tmp_path):
    from PIL import Image

    model = tiny_model.build(tmp_path / "model", "1.5-5b-i2v", native=(9, 32, 48))
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, picture in enumerate(pictures):
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(picture)
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,image,width\na cat,a.png,48\na cat,b.png,48\na cat,b.png,32\n")
    told: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "prompts": str(rows),
        "num_frames": 9,
        "height": 32,
    }
    videos = make(tmp_path / "videos", **told)
    assert [recipe_of(one)["image"]["path"] for one in videos] == [str(pictures[number]) for number in (0, 1, 1)]
    assert len({recipe_of(one)["frames_sha256"] for one in videos}) == 3

    again: dict[str, Any] = {"recipe": str(videos[1].with_suffix(".json")), "output_dir": str(tmp_path / "again")}
    (video,) = generate(resolve(InferConfig(**again)))
    assert video.matches
    with pytest.raises(ConfigError, match="the picture has changed"):
        resolve(InferConfig(**again, image=str(pictures[0])))
    pictures[1].rename(tmp_path / "c.png")
    pictures[0].rename(pictures[1])
    with pytest.raises(ConfigError, match="the picture has changed"):
        resolve(InferConfig(**again))
    other = tiny_model.build(tmp_path / "2b", "2b")
    with pytest.raises(ModelError, match=r"the recipe's model is CogVideoX 1\.5 image-to-video"):
        resolve(InferConfig(**again, image=str(tmp_path / "c.png"), pretrained_model_name_or_path=str(other)))


@pytest.mark.parametrize("text", ["", "[]", '{"prompt": "a cat"}'])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"--recipe .*a\.json: "):
        resolve(InferConfig(recipe=str(file)))


# --- batches


def test_videos_made_at_once_are_those_made_alone(lora, three, tmp_path):
    """The noise is each one's own; products of larger matrices may round otherwise in the last bits."""
    told, _, videos = three
    together = make(tmp_path, **told, batch_size=2)
    assert together[0].parent == tmp_path
    assert sorted(one.name for one in together) == sorted(one.name for one in videos)
    for one in videos[:6]:
        other = tmp_path / one.name
        assert {
            key: value for key, value in recipe_of(other).items() if key not in ("batch_size", "frames_sha256")
        } == {key: value for key, value in recipe_of(one).items() if key not in ("batch_size", "frames_sha256")}
        assert np.abs(read_mp4(other).astype(int) - read_mp4(one)).mean() < 2
    assert sorted(recipe_of(one)["batch_size"] for one in together[:6]) == [1, 1, 2, 2, 2, 2]


def recipes_in(three) -> list[Recipe]:
    return [Recipe.read(video.with_suffix(".json")) for video in three[2][:6]]


def test_a_batch_is_of_one_setting_and_no_larger_than_asked(three):
    cut = list(batches(recipes_in(three), 2))
    assert [[(one.seed, one.lora_scale) for one in batch] for batch in cut] == [
        [(5, 0.0), (6, 0.0)], [(5, 1.0), (6, 1.0)], [(7, 0.0)], [(7, 1.0)],
    ]  # fmt: skip
    assert [len(batch) for batch in batches(recipes_in(three), 1)] == [1] * 6


@pytest.mark.parametrize("inside", ["", "/deeper/still"])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_read(tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output_dir .*: .*/file is no folder; give another"):
        resolve(InferConfig(lora=("nowhere",), prompt=PROMPT, output_dir=f"{tmp_path}/file{inside}"))


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root
    with pytest.raises(ConfigError, match=r"--output_dir .*/videos: .* may not be written; give a folder of yours"):
        resolve(InferConfig(lora=("nowhere",), prompt=PROMPT, output_dir=str(tmp_path / "videos")))


def test_a_disk_that_fills_is_one_line_and_the_same_command_goes_on(lora, tmp_path):
    """A limit on the size of files stands for the disk: it takes the first video and the page, not the second video."""
    rows = ({"prompt": PROMPT}, {"prompt": PROMPT, "height": 192, "width": 288})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "videos"
    words = ["--lora", str(lora), "--prompts", str(tmp_path / "rows.jsonl"), "--num_inference_steps", "1"]
    words += ["--output_dir", str(folder)]
    code = (
        "import resource, signal\nfrom infer.__main__ import main\nfrom shared.errors import run_command\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "run_command(main)\n"
    )
    done = run_command("-c", code, *words)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]  # on a slow machine after one of progress
    assert re.fullmatch(r"error: --output_dir .*: cannot be written \(File too large\); make room, .*", line)
    (first,) = folder.glob("*.mp4")
    left = {".index.lock", "index.html", first.name, first.with_suffix(".json").name}
    assert {file.name for file in folder.iterdir()} == left, "nothing is there by half"
    made = [video.made for video in generate(resolve(parse_config(InferConfig, words, "infer")))]
    assert made == [False, True]


def test_a_gpu_that_is_too_small_is_one_line(three, tmp_path, monkeypatch, capsys):
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    told, _, _ = three
    monkeypatch.setattr(generate_module, "make_frames", too_large)
    with pytest.raises(
        ConfigError, match=r"^the GPU's memory ran out; what is made stays; give --preset low or lowest"
    ):
        main(["--lora", told["lora"], "--prompt", PROMPT, "--output_dir", str(tmp_path)])


def test_what_does_not_fit_is_made_in_halves(three, monkeypatch, capsys):
    def fits_one(_, recipes, __):
        if len(recipes) > 1:
            raise torch.OutOfMemoryError
        return [recipes[0].seed]

    monkeypatch.setattr(generate_module, "make_frames", fits_one)
    recipes = recipes_in(three)[::2]
    made: Any = list(make_batch(None, recipes, {}))  # type: ignore[arg-type]
    assert made == [(one, one.seed, 1) for one in recipes]
    assert capsys.readouterr().err.count("do not fit into the device's memory") == 2
