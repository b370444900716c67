"""What stage 1 leaves for validation videos: rows, prompts and pictures; what looks after a cache knows them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from preprocess.gc import main as collect
from preprocess.inventory import all_references
from preprocess.ls import main as ls
from preprocess.merge import main as merge
from shared.cache import Cache, embedding_key
from shared.errors import CacheError, ConfigError
from shared.pictures import is_picture_path, picture_name, read_picture
from shared.prompt_file import PromptRow, prompt_lines, read_prompts
from tests.damage import verifier
from tests.rows import ROWS, digest_of, opened, stage_1


@pytest.fixture
def image_copy(image_cache, tmp_path) -> Path:
    return Path(shutil.copytree(image_cache, tmp_path / "cache"))


def test_rows_and_pictures_are_in_the_cache_as_they_were_given(image_cache, pictures):
    names = {
        name: f"{digest_of(pictures / name)}.{suffix}"
        for name, suffix in (("start.png", "png"), ("turned.jpg", "jpeg"))
    }
    held = {path.name: path.read_bytes() for path in (image_cache / "pictures").iterdir()}
    assert held == {names[name]: (pictures / name).read_bytes() for name in names}, "equal pictures are one file"
    entries = opened(image_cache).info["validation_prompts"]
    told = [{name: entry[name] for name in row} for entry, row in zip(entries, ROWS, strict=True)]
    places = {"start.png": names["start.png"], "again.png": names["start.png"], "turned.jpg": names["turned.jpg"]}
    assert told == [{**row, "image": f"pictures/{places[row['image']]}"} for row in ROWS]
    assert [entry["embedding_key"] for entry in entries] == [
        embedding_key(f"SQR {row['prompt']}").hex() for row in ROWS
    ]
    assert not {"height", "width", "num_frames"} & set(entries[0]), "what a row does not say stands nowhere"


def test_other_rows_are_seen_when_it_is_published_again_and_the_version_stays(image_copy, image_model, clips, pictures):
    before = opened(image_copy)
    other = pictures / "turned.jpg"
    flags = ("--validation_prompt", "a green square | a red\nsquare", "--validation_prompt_separator", "|")
    assert stage_1(image_copy, image_model, clips, *flags, "--validation_images", other) == 0
    after = opened(image_copy)
    assert after.digest == before.digest, "checkpoints go on from it"
    entries = [(entry["prompt"], entry["image"]) for entry in after.info["validation_prompts"]]
    place = f"pictures/{digest_of(other)}.jpeg"
    assert entries == [("a green square", place), ("a red\nsquare", place)]
    report = json.loads((image_copy / after.folder / "report.json").read_text(encoding="utf-8"))
    assert report["encoded"] == {"embeddings": 1, "latents": 0, "images": 0}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--validation_prompt", "a", "--validation_images", "PICTURES/no.png"), r"--validation_images .*no\.png: can"),
        (("--validation_prompt", "a", "--validation_images", "PICTURES/rows.jsonl"), r"rows\.jsonl: cannot be read as"),
        (("--validation_prompt", "a:::b", "--validation_images", "x.png:::y.png:::z.png"), "3 pictures for 2 prompts"),
        (("--validation_images", "PICTURES/start.png"), "1 pictures for 0 prompts"),
        (("--validation_prompts", "PICTURES/rows.jsonl", "--validation_prompt", "a"), "stands in place of"),
        (("--validation_prompts", "PICTURES/rows.jsonl", "--validation_images", "PICTURES/start.png"), "of its own"),
        (("--validation_prompts", "PICTURES/none.csv"), r"--validation_prompts .*none\.csv: cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line_before_any_model_is_opened(tmp_path, clips, pictures, flags, told):
    words = [word.replace("PICTURES", str(pictures)) for word in flags]
    with pytest.raises(ConfigError, match=told):
        stage_1(tmp_path / "cache", tmp_path / "no-model", clips, *words)
    assert not (tmp_path / "cache").exists()


def test_a_truncated_picture_is_refused(tmp_path, clips, pictures):
    whole = (pictures / "start.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "rows.csv").write_text("prompt,image\na,torn.png\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows\.csv:2: image .*torn\.png: cannot be read as a picture"):
        stage_1(tmp_path / "cache", tmp_path, clips, "--validation_prompts", tmp_path / "rows.csv")


def test_pictures_for_text_to_video_and_sizes_that_cannot_be_are_refused(
    tiny_2b, image_model, clips, pictures, tmp_path
):
    flags = ("--validation_prompt", "a", "--validation_images", pictures / "start.png")
    with pytest.raises(ConfigError, match=r"--validation_images .*start\.png: the checkpoint is CogVideoX .*from none"):
        stage_1(tmp_path / "cache", tiny_2b, clips, *flags)
    for row, told in (({"height": 1000}, "multiple"), ({"num_frames": 10}, "4k"), ({"width": 4800}, "at most")):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", **row}) + "\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"rows\.jsonl:1 'a': .*{told}"):
            stage_1(tmp_path / "cache", image_model, clips, "--validation_prompts", tmp_path / "rows.jsonl")


def test_two_workers_hand_the_pictures_over(image_cache, image_model, clips, pictures, tmp_path):
    rows = ("--validation_prompts", pictures / "rows.jsonl", "--num_workers", 2)
    cache = tmp_path / "cache"
    assert stage_1(cache, image_model, clips, *rows, "--worker_index", 0) == 0
    held = all_references(Cache(str(cache)))["pictures"]
    assert {digest.hex() for digest in held} == {path.name[:64] for path in (image_cache / "pictures").iterdir()}
    assert stage_1(cache, image_model, clips, *rows, "--worker_index", 1) == 0
    assert merge([str(cache), "--dataset", "squares"]) == 0
    columns = ("prompt", "image", "seed", "height")
    facts = [
        [[entry.get(name) for name in columns] for entry in opened(folder).info["validation_prompts"]]
        for folder in (cache, image_cache)
    ]
    assert facts[0] == facts[1]


def test_verify_names_a_picture_that_has_changed_and_repair_lets_stage_1_put_it_back(
    image_copy, image_model, clips, pictures, capsys
):
    verify = verifier(image_copy, capsys)
    assert verify()[1][-1] == "clean"
    picture = image_copy / "pictures" / picture_name(pictures / "start.png", "")
    (picture.parent / "notes.txt").write_text("mine", encoding="utf-8")
    picture.write_bytes(b"x" + picture.read_bytes()[1:])
    status, lines = verify()
    assert status == 1
    assert lines[0].startswith(f"bad: pictures/{picture.name}: its bytes have changed since they were written (sha256)")
    assert "leftover: pictures/notes.txt: is no picture" in lines
    status, lines = verify("--repair")
    assert status == 0
    assert f"mended: pictures/{picture.name}: removed; stage 1 puts it there again" in lines
    assert not picture.exists()
    status, lines = verify("--quick")
    assert status == 1
    assert [line for line in lines if line.startswith("missing: ")] == [
        f"missing: squares, version {opened(image_copy).digest[:12]}, prompt 'SQR a blue square': its picture "
        f"pictures/{picture.name}; run stage 1 again"
    ] * 2
    assert stage_1(image_copy, image_model, clips, "--validation_prompts", pictures / "rows.jsonl") == 0
    assert verify()[0] == 0
    assert picture.read_bytes() == (pictures / "start.png").read_bytes()


def test_pictures_are_kept_as_long_as_a_version_names_them(image_copy, pictures, capsys):
    stray = image_copy / "pictures" / f"{'ab' * 32}.png"
    stray.write_bytes(b"of a data set that is gone")
    old = time.time() - 8 * 86400
    kept = {path for path in (image_copy / "pictures").iterdir() if path != stray}
    for path in (*kept, stray):
        os.utime(path, (old, old))
    assert collect([str(image_copy), "--delete"]) == 0
    assert f"removed: pictures/{stray.name}, 26 bytes" in capsys.readouterr().out
    assert set((image_copy / "pictures").iterdir()) == kept


def test_ls_counts_them(image_cache, capsys):
    assert ls([str(image_cache)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("pictures"))
    assert line.split()[1] == "2"


@pytest.mark.parametrize("image", ["../../etc/passwd", "pictures/../x.png", 3, f"pictures/{'ab' * 31}.png"])
def test_a_forged_place_of_a_picture_is_refused(image_copy, image, capsys):
    assert not is_picture_path(image)
    path = image_copy / opened(image_copy).folder / "dataset.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["validation_prompts"][0]["image"] = image
    path.write_text(json.dumps(info), encoding="utf-8")
    status, lines = verifier(image_copy, capsys)()
    assert status == 1
    assert "is no picture of a cache" in lines[0]


def test_a_picture_is_compared_with_its_name_when_it_is_read(image_copy, pictures):
    storage, place = Cache(str(image_copy)).storage, f"pictures/{picture_name(pictures / 'start.png', '')}"
    assert read_picture(storage, place) == (pictures / "start.png").read_bytes()
    (image_copy / place).write_bytes(b"other")
    with pytest.raises(CacheError, match="its bytes have changed"):
        read_picture(storage, place)
    (image_copy / place).unlink()
    with pytest.raises(CacheError, match=f"{place}: is missing; run stage 1 again"):
        read_picture(storage, place)


def test_rows_that_are_written_are_read_again(pictures, tmp_path):
    rows = read_prompts(str(pictures / "rows.jsonl"), "--prompts")
    (tmp_path / "again.jsonl").write_text(prompt_lines(rows), encoding="utf-8")
    again = read_prompts(str(tmp_path / "again.jsonl"), "--prompts")
    plain = [[PromptRow(**{**vars(row), "origin": ""}) for row in found] for found in (rows, again)]
    assert plain[0] == plain[1]
