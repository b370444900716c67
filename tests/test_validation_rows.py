"""Which videos validation makes: chosen by flags, a file or the data set; refused before step 1; made as infer does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infer.__main__ import main as infer
from shared.cache import Cache
from shared.errors import CacheError, ConfigError
from shared.lora import LoraFacts
from shared.models import Checkpoint, open_checkpoint
from shared.prompt_file import PromptRow, row_values
from tests.rows import ROWS, digest_of, opened, stage_1
from tests.runs import FACTS
from tests.training import train_here
from train import loop
from train.config import TrainConfig
from train.validate import main as validate
from train.validation_rows import choose_rows, seeded, store_rows, stored_rows

FLAGS: dict[str, Any] = {"max_train_steps": 1, "validation_steps": 1, "validation_inference_steps": 2}


@pytest.fixture(scope="module")
def lora() -> LoraFacts:
    return replace(FACTS, id_token="SQR", frames=9, height=64, width=96)


@pytest.fixture(scope="module")
def base(image_model) -> Checkpoint:
    return open_checkpoint(str(image_model), revision=None, variant=None, cache_dir=None, weights=())


@pytest.fixture
def choose(image_cache, base, lora):
    """The rows that flags choose, of the data set with pictures or of another."""

    def chosen(cache: Path | None = None, *, makes_videos: bool = True, **flags: Any) -> list[PromptRow]:
        config = TrainConfig(dataset="squares", **flags)
        return choose_rows(config, opened(cache or image_cache), base, lora, makes_videos=makes_videos)

    return chosen


def names(rows: list[PromptRow]) -> list[str]:
    return [Path(row.image or "").name for row in rows]


def test_without_flags_they_are_the_data_sets(choose, image_cache, pictures):
    rows = choose()
    places = {name: digest_of(pictures / name) for name in ("start.png", "again.png", "turned.jpg")}
    assert [name.partition(".")[0] for name in names(rows)] == [places[row["image"]] for row in ROWS]
    told = [{**row_values(row), "image": wanted["image"]} for row, wanted in zip(rows, ROWS, strict=True)]
    assert told == ROWS


def test_a_prompt_chooses_the_rows_that_have_it(choose):
    rows = choose(validation_prompt="a red\nsquare|a blue square|", validation_prompt_separator="|")
    assert [(row.prompt, row.seed, row.height) for row in rows] == [
        ("a red\nsquare", None, 96), ("a blue square", 7, None), ("a blue square", 8, None),
    ]  # fmt: skip
    assert all(row.image for row in rows)


def test_images_stand_in_place_of_the_data_sets(choose, pictures):
    other = pictures / "turned.jpg"
    assert {row.image for row in choose(validation_images=str(other))} == {str(other)}
    flags = {"validation_prompt": "a blue square:::a red\nsquare"}
    images = f"{pictures / 'start.png'}:::{other}"
    rows = choose(**flags, validation_images=images)
    assert [(row.prompt, row.seed, Path(row.image or "").name) for row in rows] == [
        ("a blue square", 7, "start.png"), ("a blue square", 8, "start.png"), ("a red\nsquare", None, "turned.jpg"),
    ]  # fmt: skip


def test_a_file_says_all_of_its_rows_but_for_pictures_that_the_cache_has(choose, pictures, tmp_path):
    shutil.copy(pictures / "turned.jpg", tmp_path)
    (tmp_path / "rows.csv").write_text(
        "prompt,image,seed,num_frames\na blue square,,3,\na blue square,turned.jpg,,17\n", encoding="utf-8"
    )
    rows = choose(validation_prompts=str(tmp_path / "rows.csv"))
    assert [(row.seed, row.num_frames) for row in rows] == [(3, None), (None, 17)]
    assert names(rows) == [f"{digest_of(pictures / 'start.png')}.png", "turned.jpg"]


def write(folder: Path, row: dict[str, Any]) -> dict[str, str]:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return {"validation_prompts": str(folder / "rows.jsonl")}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a cat"}, r"rows\.jsonl:1 'a cat': its embedding is not in data set squares; run "
         "`python -m preprocess` again, with the same flags and this --validation_prompts"),
        ({"prompt": "a blue square", "image": "none.png"}, r"rows\.jsonl:1: image .*none\.png: cannot be read"),
        ({"prompt": "a blue square", "height": 1000}, r"rows\.jsonl:1 'a blue square': .*multiple"),
        ({"prompt": "a blue square", "num_frames": 12}, "4k"),
        ({"prompt": "a blue square", "seed": 2**63 - 1}, r"its seeds are \d+ to 9223372036854775808; must be 0 to"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_made_is_refused_before_step_1(choose, tmp_path, row, told):
    with pytest.raises(ConfigError, match=told):
        choose(**write(tmp_path, row), num_validation_videos=2)


def test_a_picture_that_is_gone_from_the_cache_is_refused(choose, image_cache, tmp_path):
    cache = Path(shutil.copytree(image_cache, tmp_path / "cache"))
    shutil.rmtree(cache / "pictures")
    with pytest.raises(ConfigError, match=r"its picture .*/pictures/.* is gone from the cache; run stage 1 again"):
        choose(cache)


def test_image_to_video_rows_need_pictures_where_videos_are_made(choose, image_model, clips, image_cache, tmp_path):
    cache = Path(shutil.copytree(image_cache, tmp_path / "cache"))
    assert stage_1(cache, image_model, clips, "--validation_prompt", "a blue square") == 0
    with pytest.raises(ConfigError, match=r"--validation_images is missing: .* here or to stage 1"):
        choose(cache)
    assert [row.image for row in choose(cache, makes_videos=False)] == [None]


def test_without_prompts_no_videos_can_be_made(choose, image_model, clips, image_cache, tmp_path):
    cache = Path(shutil.copytree(image_cache, tmp_path / "cache"))
    assert stage_1(cache, image_model, clips) == 0
    with pytest.raises(ConfigError, match=r"^data set squares: has no validation prompts; run `python -m preprocess`"):
        choose(cache)


def test_pictures_are_refused_for_text_to_video(cache, tiny_2b, lora, pictures):
    base = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=())
    config = TrainConfig(dataset="squares", validation_images=str(pictures / "start.png"))
    with pytest.raises(ConfigError, match=r"--validation_images .*start from none; leave it out"):
        choose_rows(config, opened(cache), base, lora, makes_videos=False)


def test_pictures_of_the_data_set_are_left_out_where_the_checkpoint_takes_none(image_cache, tiny_2b, lora):
    base = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=())
    rows = choose_rows(TrainConfig(dataset="squares"), opened(image_cache), base, lora, makes_videos=True)
    assert [(row.prompt, row.image) for row in rows] == [(row["prompt"], None) for row in ROWS]


def test_of_data_sets_with_other_tokens_a_prompt_says_its_own(image_cache, base, lora):
    """The LoRA of several has no id token, and stage 3 puts none before the prompts."""
    rows = choose_rows(TrainConfig(), opened(image_cache), base, replace(lora, id_token=None), makes_videos=True)
    assert {row.prompt for row in rows} == {"SQR a blue square", "SQR a red\nsquare"}


def test_each_number_has_the_seed_that_follows():
    rows = [PromptRow("a"), PromptRow("b", seed=7)]
    made = seeded(TrainConfig(seed=5, num_validation_videos=3), rows)
    assert [(row.prompt, row.seed) for row in made] == [("a", 5), ("b", 7), ("a", 6), ("b", 8), ("a", 7), ("b", 9)]


def test_a_run_holds_its_rows_and_pictures_wherever_it_is(choose, image_cache, pictures, tmp_path):
    cache = Cache(str(image_cache))
    chosen = choose()
    stored = store_rows(tmp_path / "run", chosen, cache)
    for row, wanted in zip(stored, ROWS, strict=True):
        assert Path(row.image or "").parent == (tmp_path / "run/validation/images").resolve()
        assert Path(row.image or "").read_bytes() == (pictures / wanted["image"]).read_bytes()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    again = stored_rows(tmp_path / "elsewhere")
    assert again is not None
    assert [row_values(row) for row in again] == [
        {**row_values(row), "image": str(tmp_path / "elsewhere/validation/images" / Path(row.image or "").name)}
        for row in stored
    ]
    assert store_rows(tmp_path / "elsewhere", again, cache) == again, "its own pictures are taken as they are"
    assert len(list((tmp_path / "elsewhere/validation/images").iterdir())) == 2


def test_a_damaged_picture_is_refused(choose, image_cache, pictures, tmp_path):
    cache = Path(shutil.copytree(image_cache, tmp_path / "cache"))
    for picture in (cache / "pictures").iterdir():
        picture.write_bytes(b"x" + picture.read_bytes()[1:])
    with pytest.raises(CacheError, match=r"its bytes have changed .*preprocess\.verify .* --repair"):
        store_rows(tmp_path / "run", choose(cache), Cache(str(cache)))


def test_a_cache_behind_a_url_gives_its_pictures(image_cache, base, lora, pictures, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in (file for file in image_cache.rglob("*") if file.is_file()):
        memory.pipe_file(f"/rows/{path.relative_to(image_cache)}", path.read_bytes())
    dataset = opened("memory://rows")
    rows = choose_rows(TrainConfig(dataset="squares"), dataset, base, lora, makes_videos=True)
    stored = store_rows(tmp_path / "run", rows, dataset.cache)
    assert [digest_of(Path(row.image or "")) for row in stored] == [digest_of(pictures / row["image"]) for row in ROWS]


# Runs.


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}


@pytest.fixture(scope="module")
def validated(image_cache, tmp_path_factory) -> Path:
    """A run that was told nothing of rows: the data set's."""
    folder = tmp_path_factory.mktemp("rows") / "run"
    assert train_here(image_cache, folder, **FLAGS, use_dynamic_cfg=True) == 0
    return folder


def test_rows_are_made_as_they_say(validated, pictures):
    made = recipes(validated / "validation/step-1")
    told = {
        (one["prompt"], one["seed"], one["height"], one["width"], one["frames"], one["guidance_scale"],
         one["num_inference_steps"], one["use_dynamic_cfg"], one["image"]["sha256"])
        for one in made.values()
    }  # fmt: skip
    start, turned = digest_of(pictures / "start.png"), digest_of(pictures / "turned.jpg")
    assert told == {
        ("a blue square", 7, 64, 96, 9, 6.0, 2, True, start),
        ("a red\nsquare", 42, 96, 64, 17, 3.5, 4, True, turned),
        ("a blue square", 8, 64, 96, 9, 6.0, 2, True, start),
    }
    assert len(list((validated / "validation/step-1").glob("*.mp4"))) == 3


def test_they_are_what_infer_makes_of_the_checkpoint_and_the_same_rows_later(validated, pictures, tmp_path):
    """With the user's file and pictures, and T5 for the embeddings, which the trainer's child took from the cache."""
    words = ["--lora", validated / "checkpoint-1", "--prompts", pictures / "rows.jsonl", "--num_inference_steps", "2"]
    assert infer([str(word) for word in (*words, "--use_dynamic_cfg", "--output_dir", tmp_path)]) == 0
    made, later = recipes(validated / "validation/step-1"), recipes(tmp_path)
    assert {name: one["frames_sha256"] for name, one in made.items()} == {
        name: one["frames_sha256"] for name, one in later.items()
    }


def test_another_folder_and_cache_make_the_same(validated, image_cache, tmp_path, monkeypatch, capsys):
    """As on another machine: the run, the cache and the working folder are elsewhere, and what stage 1 read is gone."""
    run = Path(shutil.copytree(validated, tmp_path / "moved"))
    cache = shutil.copytree(image_cache, tmp_path / "cache")
    shutil.rmtree(cache / "pictures")  # they are in the run
    made = recipes(run / "validation/step-1")
    shutil.rmtree(run / "validation/step-1")
    told = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({**told, "cache": "/nowhere"}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert validate(["moved", "--cache", "cache"]) == 0
    assert "videos    3 of step 1" in capsys.readouterr().out
    again = recipes(run / "validation/step-1")
    assert {name: one["frames_sha256"] for name, one in again.items()} == {
        name: one["frames_sha256"] for name, one in made.items()
    }


@pytest.mark.slow
def test_a_run_without_rows_takes_the_data_sets_when_it_is_validated(validated, image_cache, tmp_path, capsys):
    run = Path(shutil.copytree(validated, tmp_path / "run"))
    shutil.rmtree(run / "validation")
    assert validate([str(run)]) == 0
    assert "videos    3 of step 1" in capsys.readouterr().out
    assert [row.seed for row in stored_rows(run) or []] == [7, None, 8]


def test_validate_refuses_what_training_would(validated, image_model, clips, image_cache, tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(validated, run)
    shutil.copytree(image_cache, cache)
    shutil.rmtree(run / "validation/step-1")
    assert stage_1(cache, image_model, clips, "--validation_prompt", "a blue square") == 0
    with pytest.raises(
        ConfigError, match=r"prompts\.jsonl:2 'a red\\nsquare': its embedding is not in data set squares"
    ):
        validate([str(run), "--cache", str(cache)])
    shutil.rmtree(run / "validation")
    with pytest.raises(ConfigError, match="--validation_images is missing"):
        validate([str(run), "--cache", str(cache)])


def test_a_missing_prompt_or_picture_ends_a_run_before_its_weights_are_loaded(image_cache, tmp_path, monkeypatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("train.setup.load_transformer", never)
    monkeypatch.setattr(loop, "make_videos", never)
    for row, told in (
        ({"prompt": "a cat"}, "its embedding is not"),
        ({"prompt": "a blue square", "image": "x"}, "x: c"),
    ):
        with pytest.raises(ConfigError, match=told):
            train_here(image_cache, tmp_path / "run", **FLAGS, **write(tmp_path, row))
    assert not (tmp_path / "run/validation").exists()


def test_a_run_that_makes_no_videos_wants_nothing_of_them(image_cache, tmp_path):
    cache = Path(shutil.copytree(image_cache, tmp_path / "cache"))
    shutil.rmtree(cache / "pictures")
    assert train_here(cache, tmp_path / "run", max_train_steps=1) == 0
    assert not (tmp_path / "run/validation").exists()
