"""preprocess.caption: whose captions stand where, what is never overwritten, and that stage 1 reads what it writes."""

import csv
import dataclasses
import datetime
import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from preprocess import generation, glimpses
from preprocess.__main__ import main as preprocess
from preprocess.caption import CaptionConfig, main
from preprocess.captions import COLUMNS, Row, notes
from preprocess.generation import Captioner, Decoding, Rewriter, clean, fetch_model
from preprocess.glimpses import Look, read_glimpses
from preprocess.journal import Journal
from shared.cache import Cache
from shared.config import parse_config
from shared.dataset import open_dataset
from shared.errors import ConfigError, ManifestError, ModelError, UserError
from tests import tiny_language
from tests.conftest import ROOT, run_command, write_video
from tests.decoding import InProcessPool, use_stand_ins
from tests.test_video import write_kind

TOKENS = 12  # enough to tell texts apart


@pytest.fixture(scope="session")
def captioner(tmp_path_factory) -> Path:
    return tiny_language.build_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="session")
def rewriter(tmp_path_factory) -> Path:
    return tiny_language.build_rewriter(tmp_path_factory.mktemp("rewriter"))


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Frames are decoded in the test's own process: a decoder of its own takes seconds to start."""
    monkeypatch.setattr(glimpses, "DecodePool", InProcessPool)


@pytest.fixture
def videos(clips, tmp_path) -> Path:
    """A folder of three videos without captions, and one that is none."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        shutil.copy(clips / f"{number}.mp4", folder)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def run(folder, *flags, output="captions.jsonl"):
    words = ["--dataset_name", str(folder), "--output", str(Path(folder) / output)]
    return main([*words, "--max_new_tokens", str(TOKENS), "--dataloader_num_workers", "1", *map(str, flags)])


def rows_of(path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def captions_of(path) -> dict[str, str]:
    return {row["video"]: row["caption"] for row in rows_of(path)}


class Talker:
    """Stands in for a model: says which clip it was shown, and how often; may die before it answers."""

    heard: list[str] = []  # noqa: RUF012
    dies_at: int | None = None

    def __init__(self, files, decoding, prompt):
        self.prompt = prompt

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def say(self, texts):
        for text in texts:
            if len(self.heard) == Talker.dies_at:
                raise KeyboardInterrupt
            self.heard.append(text)
        return texts

    def caption(self, clips, seeds):
        return self.say([f"frames {int(clip.astype(np.int64).sum())}" for clip in clips])

    def rewrite(self, captions, seeds):
        return self.say([f"again {caption}" for caption in captions])


@pytest.fixture
def talker(monkeypatch):
    """Both models are stand-ins; `heard` has each text that they wrote."""
    monkeypatch.setattr(generation, "Captioner", Talker)
    monkeypatch.setattr(generation, "Rewriter", Talker)
    monkeypatch.setattr(Talker, "heard", [])
    monkeypatch.setattr(Talker, "dies_at", None)
    return Talker


# --- what a caption is


def frames_of(path, indices):
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [frames[index] for index in indices]


def test_captions_and_their_rewriting_are_those_of_transformers_alone(videos, captioner, rewriter):
    """Nine frames in three equal spans: those in view at the middles are 1, 4 and 7."""
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    assert run(videos, "--caption_model", captioner, "--rewrite_model", rewriter, "--frames", 3) == 0
    processor, model = AutoProcessor.from_pretrained(captioner), AutoModelForImageTextToText.from_pretrained(captioner)
    tokenizer, language = AutoTokenizer.from_pretrained(rewriter), AutoModelForCausalLM.from_pretrained(rewriter)
    prompt = (ROOT / "configs" / "caption_prompt.txt").read_text(encoding="utf-8").strip()
    template = (ROOT / "configs" / "caption_template.txt").read_text(encoding="utf-8").strip()
    for row in rows_of(videos / "captions.jsonl"):
        pictures = [Image.fromarray(frame) for frame in frames_of(videos / row["video"], (1, 4, 7))]
        text = "user: " + "<image>" * 3 + prompt + "\nassistant: "
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["raw_caption"] == clean(processor.decode(tokens, skip_special_tokens=True))
        inputs = tokenizer(
            "user: " + template.replace("{caption}", row["raw_caption"]) + "\nassistant: ", return_tensors="pt"
        )
        inputs.pop("token_type_ids", None)
        tokens = language.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["caption"] == clean(tokenizer.decode(tokens, skip_special_tokens=True))


def test_each_text_tells_its_source(videos, captioner, rewriter):
    (videos / "1.txt").write_text("mine", encoding="utf-8")
    assert run(videos, "--caption_model", captioner, "--rewrite_model", rewriter) == 0
    rows = rows_of(videos / "captions.jsonl")
    recipes = json.loads((videos / "captions.jsonl.recipes").read_text())
    assert [row["video"] for row in rows] == ["0.mp4", "1.mp4", "2.mp4"]
    assert [row["caption_source"] for row in rows] == ["rewrite", "manifest", "rewrite"]
    assert all(list(row) == COLUMNS for row in rows)
    assert rows[1] == Row("1.mp4", "mine").cells
    for row in (rows[0], rows[2]):
        assert (row["caption_model"], row["rewrite_model"]) == (str(captioner), str(rewriter))
        assert row["caption_revision"] is None, "of a folder"
        told = recipes[row["caption_recipe"]]
        assert (told["task"], told["frames"], told["dtype"], told["temperature"]) == ("caption", 8, "float32", 0.0)
        assert "50 to 100 words" in told["prompt"]
        assert "{caption}" in recipes[row["rewrite_recipe"]]["template"]
    assert rows[0]["raw_caption"] != rows[2]["raw_caption"]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_caption_does_not_depend_on_its_batch(clips, captioner, temperature):
    look = Look(2, 448, None)
    shown = {number: (str(clips / f"{number}.mp4"), None, None) for number in range(4)}
    with read_glimpses(shown, look, 1, 60, {}) as shown_frames:
        frames = [clip for _, clip in shown_frames]
    files = fetch_model(str(captioner), sees=True, revision=None, cache_dir=None, dtype="auto")
    with Captioner(files, Decoding(temperature, TOKENS), "what happens?") as model:
        together = model.caption(frames, [1, 2, 3, 4])
        alone = [model.caption([clip], [seed])[0] for clip, seed in zip(frames, (1, 2, 3, 4), strict=True)]
        other = model.caption(frames, [5, 6, 7, 8])
    assert alone == together
    assert len(set(together)) > 1
    assert (other == together) == (temperature == 0)


def test_rewriting_does_not_depend_on_its_batch(rewriter):
    captions = ["a red bicycle", "a white rabbit looks up at a butterfly in a green meadow", "a car"]
    files = fetch_model(str(rewriter), sees=False, revision=None, cache_dir=None, dtype="float32")
    with Rewriter(files, Decoding(0.5, TOKENS), "write {caption} anew") as model:
        together = model.rewrite(captions, [1, 2, 3])
        alone = [model.rewrite([caption], [seed])[0] for caption, seed in zip(captions, (1, 2, 3), strict=True)]
    assert alone == together


def test_draws_are_of_softmax_at_the_temperature():
    logits, count, temperature = torch.tensor([2.0, 1.0, 0.0, -torch.inf]), 4000, 0.7
    drawn = generation._Drawn(temperature, list(range(count)))
    tokens = drawn(torch.zeros(count, 1), logits.repeat(count, 1)).argmax(-1)
    expected = torch.softmax(logits / temperature, 0)
    shares = torch.bincount(tokens, minlength=4) / count
    assert torch.allclose(shares, expected, atol=4 * (0.25 / count) ** 0.5)
    assert shares[3] == 0


def test_seed_and_temperature_reach_the_texts(videos, captioner):
    told = {}
    for name, temperature, seed in (("a", 0.9, 1), ("b", 0.9, 1), ("c", 0.9, 2), ("d", 0, 1)):
        flags = ("--caption_model", captioner, "--temperature", temperature, "--seed", seed)
        assert run(videos, *flags, output=f"{name}.jsonl") == 0
        told[name] = captions_of(videos / f"{name}.jsonl")
        (videos / f"{name}.jsonl").unlink()  # the folder is that of the videos alone
    assert told["a"] == told["b"]
    assert len({str(captions) for captions in told.values()}) == 3


@pytest.mark.parametrize("temperature", ["0", "0.5"])
def test_models_without_a_conversation_take_the_prompt_as_it_is(clips, tmp_path, temperature):
    plain = tiny_language.build_captioner(tmp_path / "captioner", chat=False)
    writer = tiny_language.build_rewriter(tmp_path / "rewriter", chat=False)
    folder = Path(shutil.copytree(clips, tmp_path / "clips", ignore=shutil.ignore_patterns("*.txt", "[2-9].mp4")))
    flags = ("--caption_model", plain, "--rewrite_model", writer, "--batch_size", 2, "--temperature", temperature)
    assert run(folder, *flags) == 0
    rows = rows_of(folder / "captions.jsonl")
    assert all(row["caption"] and row["raw_caption"] for row in rows)
    assert rows[0]["raw_caption"] != rows[1]["raw_caption"]


def test_prompt_and_template_come_from_files(videos, talker, captioner, rewriter, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("What is seen?\n", encoding="utf-8")
    (tmp_path / "template.txt").write_text("Mend: {caption} {braces}", encoding="utf-8")
    prompts = []
    monkeypatch.setattr(Talker, "__exit__", lambda self, *_: prompts.append(self.prompt))
    flags = ("--caption_prompt", tmp_path / "prompt.txt", "--rewrite_template", tmp_path / "template.txt")
    assert run(videos, "--caption_model", captioner, "--rewrite_model", rewriter, *flags) == 0
    assert prompts == ["What is seen?", "Mend: {caption} {braces}"]


def test_one_model_is_in_memory_at_a_time(videos, captioner, rewriter, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    alive = []
    started = Rewriter.__init__

    def look(self, *arguments):
        alive.append(any(type(thing) is LlavaForConditionalGeneration for thing in gc.get_objects()))
        started(self, *arguments)

    monkeypatch.setattr(Rewriter, "__init__", look)
    gc.collect()
    assert run(videos, "--caption_model", captioner, "--rewrite_model", rewriter) == 0
    assert alive == [False]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("  A cat\n walks. ", "A cat walks."),
        ('"A cat walks."', "A cat walks."),
        ('"Stop" and "Go" are on signs', '"Stop" and "Go" are on signs'),
        ("<think>\nhm\n</think>\n\nA cat.", "A cat."),
        ("<think>it never ends", ""),
    ],
)
def test_an_answer_becomes_one_line_without_quotes_or_thoughts(text, caption):
    assert clean(text) == caption


# --- what the model sees


def test_frames_are_upright_with_square_pixels_and_not_larger_than_asked(tmp_path):
    from fractions import Fraction

    (tmp_path / "turned").mkdir()
    (tmp_path / "wide").mkdir()
    shown = {
        "turned": (str(write_kind("h264", tmp_path / "turned", rotation=(90, False))), None, None),
        "wide": (str(write_kind("h264", tmp_path / "wide", sample_aspect_ratio=Fraction(2, 1))), None, None),
    }
    with read_glimpses(shown, Look(1, 10_000, None), 1, 60, {}) as shown_frames:
        shapes = {name: frames.shape for name, frames in shown_frames}
    with read_glimpses(shown, Look(1, 32, None), 1, 60, {}) as shown_frames:
        small = {name: frames.shape for name, frames in shown_frames}
    turned, wide = shapes["turned"], shapes["wide"]
    assert (wide[1], wide[2]) == (turned[2], 2 * turned[1])
    assert {max(shape[1:3]) for shape in small.values()} == {32}


def test_segments_are_captioned_each_by_its_own_frames(tmp_path, talker, captioner):
    frames = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None, None], 3, axis=3)
    write_video(tmp_path / "long.mp4", np.broadcast_to(frames, (24, 64, 96, 3)).copy())
    table = "video,start,end\nlong.mp4,,\nlong.mp4,0,1\nlong.mp4,2,3\nlong.mp4,0,1\n"
    (tmp_path / "clips.csv").write_text(table, encoding="utf-8")
    flags = ["--dataset_name", str(tmp_path / "clips.csv"), "--caption_model", str(captioner), "--frames", "1"]
    assert main([*flags, "--output", str(tmp_path / "out.csv")]) == 0
    rows = rows_of(tmp_path / "out.csv")
    seen = [round(int(row["caption"].split()[1]) / (64 * 96 * 3)) for row in rows]
    assert seen == pytest.approx([120, 40, 200, 40], abs=3), "the frame in view at the middle of each"
    assert len(talker.heard) == 3, "a clip that stands there twice is captioned once"
    assert [(row["start_s"], row["end_s"]) for row in rows] == [
        ("", ""),
        ("0.0", "1.0"),
        ("2.0", "3.0"),
        ("0.0", "1.0"),
    ]
    assert main([*flags, "--output", str(tmp_path / "head.csv"), "--clip_seconds", "1"]) == 0
    head = [round(int(row["caption"].split()[1]) / (64 * 96 * 3)) for row in rows_of(tmp_path / "head.csv")]
    assert head == pytest.approx([40, 40, 200, 40], abs=3)


# --- stage 1 reads it


@pytest.mark.parametrize("output", ["captions.jsonl", "captions.csv", "captions.tsv"])
def test_stage_1_reads_the_manifest_as_it_is(videos, captioner, tiny_2b, tmp_path, output, capsys, monkeypatch):
    if output != "captions.jsonl":  # one of the three with real models
        use_stand_ins(monkeypatch)
    (videos / "1.txt").write_text('a "quoted", and\ttabbed caption 🐰', encoding="utf-8")
    assert run(videos, "--caption_model", captioner, output=output) == 0
    told = capsys.readouterr()
    assert "rejected  broken.mp4: unreadable (" in told.err
    (line,) = (line for line in told.out.splitlines() if line.startswith("next"))
    words = line.removeprefix("next      python -m preprocess ").split()
    assert words == ["--dataset_name", str(videos / output)]
    model = ["--pretrained_model_name_or_path", str(tiny_2b), "--buckets", "9x64x96,9x96x64"]
    assert preprocess([*words, *model, "--cache", str(tmp_path / "cache")]) == 0
    found = open_dataset(Cache(str(tmp_path / "cache")), "default").columns("source", "caption").to_pylist()
    assert {row["source"]: row["caption"] for row in found} == captions_of(videos / output)
    assert preprocess(["--dataset_name", str(videos), *model, "--cache", str(tmp_path / "cache")]) == 0, "by the folder"


def test_videos_outside_of_the_manifests_folder_are_found_with_the_flag_that_is_told(
    videos, talker, captioner, tiny_2b, tmp_path, capsys, monkeypatch
):
    use_stand_ins(monkeypatch)
    output = tmp_path / "elsewhere" / "captions.jsonl"
    flags = ["--dataset_name", str(videos), "--output", str(output), "--caption_model", str(captioner)]
    assert main(flags) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    words = line.removeprefix("next      python -m preprocess ").split()
    assert words[2:] == ["--instance_data_root", str(videos)]
    model = ["--pretrained_model_name_or_path", str(tiny_2b), "--buckets", "9x64x96,9x96x64"]
    assert preprocess([*words, *model, "--cache", str(tmp_path / "cache")]) == 0


def test_videos_within_and_outside_of_the_manifests_folder_are_found_together(
    videos, talker, captioner, tiny_2b, tmp_path, clips, capsys, monkeypatch
):
    use_stand_ins(monkeypatch)
    table = tmp_path / "all.jsonl"
    table.write_text("".join(f'{{"video": "{tmp_path}/videos/{number}.mp4"}}\n' for number in (0, 1)))
    flags = ["--caption_model", str(captioner), "--output", str(videos / "out.jsonl"), "--dataset_name", str(table)]
    assert main(flags) == 0
    assert list(captions_of(videos / "out.jsonl")) == ["0.mp4", "1.mp4"]
    shutil.copy(clips / "6.mp4", tmp_path)
    with table.open("a") as file:
        file.write(f'{{"video": "{tmp_path}/6.mp4"}}\n')
    capsys.readouterr()
    assert main(flags) == 0
    assert len(talker.heard) == 3, "the names have changed, the clips have not"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    words = line.removeprefix("next      python -m preprocess ").split()
    assert words[2:] == ["--instance_data_root", str(tmp_path)]
    model = ["--pretrained_model_name_or_path", str(tiny_2b), "--buckets", "9x64x96,9x96x64"]
    assert preprocess([*words, *model, "--cache", str(tmp_path / "cache")]) == 0


def test_a_folder_that_moves_takes_its_captions_and_its_journal_along(videos, talker, captioner, tmp_path):
    talker.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(videos, "--caption_model", captioner)
    talker.dies_at = None
    moved = videos.rename(tmp_path / "moved")
    assert run(moved, "--caption_model", captioner) == 0
    moved = moved.rename(tmp_path / "again")
    assert run(moved, "--caption_model", captioner) == 0
    assert len(talker.heard) == 3


def test_text_files_and_tables_without_captions_are_taken(videos, talker, captioner, tmp_path):
    (videos / "videos.txt").write_text("2.mp4\n0.mp4\n")
    output = str(videos / "a.jsonl")
    flags = ["--caption_model", str(captioner), "--output", output]
    assert main([*flags, "--instance_data_root", str(videos), "--video_column", "videos.txt"]) == 0
    assert list(captions_of(videos / "a.jsonl")) == ["2.mp4", "0.mp4"]
    (tmp_path / "t.jsonl").write_text('{"v": "videos/1.mp4", "c": null}\n{"v": "videos/2.mp4", "c": "mine"}\n')
    table = ["--dataset_name", str(tmp_path / "t.jsonl"), "--video_column", "v", "--caption_column", "c"]
    assert main([*table, "--caption_model", str(captioner), "--output", str(tmp_path / "b.jsonl")]) == 0
    told = captions_of(tmp_path / "b.jsonl")
    assert told["videos/2.mp4"] == "mine"
    assert told["videos/1.mp4"].startswith("frames ")


# --- what else the manifest holds


def clips_table(path: Path, rows: list[dict]) -> Path:
    """A manifest of the rows, without captions."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def caption_table(table, output, captioner, *flags) -> list[dict]:
    words = ["--dataset_name", str(table), "--output", str(output), "--caption_model", str(captioner)]
    assert main([*words, *map(str, flags)]) == 0
    return rows_of(output)


OWN = [{"scene": 'a "quoted", ü', "quality": 0.5, "end": None}, {"scene": "two\nlines", "quality": 2.0, "end": 0.5}]


@pytest.mark.parametrize("output", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("table", [".csv", ".jsonl", ".parquet"])
def test_the_columns_of_the_manifest_are_in_the_one_that_is_written(videos, talker, captioner, table, output):
    rows = [{"video": f"{number}.mp4", **own} for number, own in enumerate(OWN)]
    clips_table(videos / f"table{table}", rows)
    told = caption_table(videos / f"table{table}", videos / f"out{output}", captioner)
    assert [list(row) for row in told] == [[*COLUMNS, "scene", "quality"]] * 2
    assert [row["scene"] for row in told] == [own["scene"] for own in OWN]
    assert [float(row["quality"]) for row in told] == [0.5, 2.0]
    if output == ".jsonl" and table != ".csv":
        assert [row["quality"] for row in told] == [0.5, 2.0], "as a number"
    assert [row["end_s"] for row in told] in ([None, 0.5], ["", "0.5"]), "`end` is taken, and has its column"
    assert all(row["caption"].startswith("frames ") for row in told)


def test_what_only_json_can_hold_is_carried_as_json_or_as_its_text(videos, talker, captioner):
    day = datetime.datetime(2024, 5, 6, 7, 8)
    row = {"video": "0.mp4", "tags": ["a", "b"], "box": {"x": 1}, "day": day, "rate": float("nan"), "kept": True}
    clips_table(videos / "table.parquet", [row])
    (told,) = caption_table(videos / "table.parquet", videos / "out.jsonl", captioner)
    own = {name: value for name, value in told.items() if name not in COLUMNS}
    assert own == {"tags": ["a", "b"], "box": {"x": 1}, "day": "2024-05-06 07:08:00", "rate": None, "kept": True}
    (flat,) = caption_table(videos / "table.parquet", videos / "out.csv", captioner)
    assert (json.loads(flat["tags"]), json.loads(flat["box"])) == (["a", "b"], {"x": 1})
    assert (flat["day"], flat["rate"], flat["kept"]) == ("2024-05-06 07:08:00", "", "True")


def test_rows_keep_their_own_columns_through_every_way_that_a_caption_takes(videos, talker, captioner, rewriter):
    """By a model, rewritten, made anew, gone on from, and of a clip that the manifest names no more."""
    table = clips_table(videos / "table.jsonl", [{"video": f"{n}.mp4", f"only_{n}": n} for n in range(3)])
    out = videos / "out.csv"
    for flags in ([], ["--rewrite_model", rewriter], ["--rewrite_model", rewriter, "--overwrite"], []):
        told = caption_table(table, out, captioner, *flags)
        assert [[row[f"only_{n}"] for n in range(3)] for row in told] == [["0", "", ""], ["", "1", ""], ["", "", "2"]]
    clips_table(table, [{"video": "0.mp4", "only_0": 0}])
    before = captions_of(out)
    told = caption_table(table, out, captioner)
    assert captions_of(out) == before
    assert [[row[f"only_{n}"] for n in range(3)] for row in told] == [["0", "", ""], ["", "1", ""], ["", "", "2"]]


def test_what_was_written_into_output_by_hand_stays_and_what_is_new_in_the_manifest_comes(videos, talker, captioner):
    table = clips_table(videos / "table.jsonl", [{"video": "0.mp4", "scene": "hall", "note": None}])
    (row,) = caption_table(table, videos / "out.jsonl", captioner)
    mine = {**row, "scene": "garden", "note": "by hand", "mine": [1, 2]}
    (videos / "out.jsonl").write_text(json.dumps(mine) + "\n", encoding="utf-8")
    clips_table(table, [{"video": "0.mp4", "scene": "hall", "note": None, "more": "x"}])
    (told,) = caption_table(table, videos / "out.jsonl", captioner)
    own = {name: value for name, value in told.items() if name not in COLUMNS}
    assert own == {"scene": "garden", "note": "by hand", "more": "x", "mine": [1, 2]}


def test_columns_that_output_has_for_its_own_are_asked_to_be_renamed(videos, talker, captioner):
    table = clips_table(videos / "table.jsonl", [{"video": "0.mp4", "raw_caption": "mine"}])
    with pytest.raises(ManifestError, match=r"table.jsonl:1: has a column 'raw_caption', which OUTPUT has .*rename it"):
        caption_table(table, videos / "out.jsonl", captioner)
    clips_table(table, [{"video": "0.mp4", "text": "", "caption": "mine"}])
    with pytest.raises(ManifestError, match=r"table.jsonl:1: has a column 'caption'"):
        caption_table(table, videos / "out.jsonl", captioner, "--caption_column", "text")
    assert talker.heard == []


def test_a_manifest_of_this_command_is_captioned_into_another_one(videos, talker, captioner):
    table = clips_table(videos / "table.jsonl", [{"video": "0.mp4", "scene": "hall"}])
    caption_table(table, videos / "one.jsonl", captioner)
    (told,) = caption_table(videos / "one.jsonl", videos / "two.jsonl", captioner)
    assert (told["caption_source"], told["caption_model"], told["scene"]) == ("manifest", None, "hall")


def test_two_columns_of_one_name_are_refused_and_those_without_a_name_left_out(videos, talker, captioner):
    (videos / "table.csv").write_text("video,tag,tag\n0.mp4,a,b\n")
    with pytest.raises(ManifestError, match=r"table.csv: has more than one column 'tag'; rename"):
        caption_table(videos / "table.csv", videos / "out.csv", captioner)
    (videos / "table.csv").write_text("video,tag,,\n0.mp4,a,,\n")
    (told,) = caption_table(videos / "table.csv", videos / "out.csv", captioner)
    assert list(told) == [*COLUMNS, "tag"]


def test_what_no_text_can_hold_is_told_before_a_model_is_loaded(videos, talker, captioner, capsys):
    (videos / "half.jsonl").write_text('{"video": "0.mp4", "scene": ["\\ud83d"]}\n')
    with pytest.raises(ManifestError, match=r"half.jsonl:1: the column 'scene' is not text that UTF-8 can hold"):
        caption_table(videos / "half.jsonl", videos / "out.jsonl", captioner)
    assert talker.heard == []
    rows = [{"video": "0.mp4", "thumbnail": b"\xff\xd8", "views": [{"bytes": b"\xff", "path": "a"}], "scene": "hall"}]
    (told,) = caption_table(clips_table(videos / "t.parquet", rows), videos / "out.jsonl", captioner)
    assert list(told) == [*COLUMNS, "scene"]
    assert "t.parquet: the columns 'thumbnail', 'views' hold bytes" in capsys.readouterr().err


def test_a_hub_data_set_keeps_its_columns(videos, talker, captioner, tmp_path):
    (tmp_path / "clone" / "data").mkdir(parents=True)
    clips_table(tmp_path / "clone" / "data" / "train.jsonl", [{"video": "0.mp4", "scene": "hall", "tags": ["a"]}])
    flags = ("--instance_data_root", videos, "--cache_dir", tmp_path / "cache")
    (told,) = caption_table(tmp_path / "clone", videos / "out.jsonl", captioner, *flags)
    assert (told["scene"], told["tags"]) == ("hall", ["a"])


# --- what is there is not made again, nor lost


def test_a_second_run_makes_nothing_and_a_new_clip_alone_is_captioned(videos, talker, captioner, clips):
    assert run(videos, "--caption_model", captioner) == 0
    first = (videos / "captions.jsonl").read_bytes()
    assert run(videos, "--caption_model", captioner) == 0
    assert (videos / "captions.jsonl").read_bytes() == first
    shutil.copy(clips / "6.mp4", videos)
    assert run(videos, "--caption_model", captioner) == 0
    assert list(captions_of(videos / "captions.jsonl")) == ["0.mp4", "1.mp4", "2.mp4", "6.mp4"]
    assert len(talker.heard) == 4
    assert sorted(path.name for path in videos.glob("*captions*")) == [
        "captions.jsonl", "captions.jsonl.recipes", "captions.jsonl.rejected",
    ]  # fmt: skip


def test_captions_that_are_there_stay_without_overwrite(videos, talker, captioner, rewriter, capsys):
    (videos / "0.txt").write_text("mine", encoding="utf-8")
    models = ("--caption_model", captioner, "--rewrite_model", rewriter)
    assert run(videos, *models) == 0
    path = videos / "captions.jsonl"
    edited = path.read_text().replace("again frames", "edited by hand:")
    path.write_text(edited)
    (videos / "0.txt").write_text("mine, changed", encoding="utf-8")
    assert run(videos, *models) == 0
    assert path.read_text() == edited
    assert "kept      1 captions" in capsys.readouterr().out
    heard = len(talker.heard)
    assert run(videos, *models, "--overwrite") == 0
    assert len(talker.heard) == heard + 6
    assert [row["caption_source"] for row in rows_of(path)] == ["rewrite"] * 3


def test_overwrite_without_a_captioning_model_rewrites_what_is_there(videos, talker, captioner, rewriter):
    (videos / "0.txt").write_text("mine", encoding="utf-8")
    assert run(videos, "--caption_model", captioner) == 0
    before = captions_of(videos / "captions.jsonl")
    for _ in range(2):  # the second one is of the raw captions, too
        assert run(videos, "--rewrite_model", rewriter, "--overwrite") == 0
        rows = rows_of(videos / "captions.jsonl")
        assert {row["video"]: row["raw_caption"] for row in rows} == before
        assert {row["video"]: row["caption"] for row in rows} == {name: f"again {old}" for name, old in before.items()}
    assert [row["caption_model"] for row in rows] == [None, str(captioner), str(captioner)]


def test_a_clip_that_can_no_longer_be_read_keeps_its_caption(videos, talker, captioner):
    assert run(videos, "--caption_model", captioner) == 0
    before = captions_of(videos / "captions.jsonl")
    (videos / "1.mp4").write_bytes(b"gone bad")
    assert run(videos, "--caption_model", captioner, "--overwrite") == 0
    assert captions_of(videos / "captions.jsonl") == before
    rejected = [json.loads(line) for line in (videos / "captions.jsonl.rejected").read_text().splitlines()]
    assert [clip["video"] for clip in rejected] == ["1.mp4", "broken.mp4"]
    assert {clip["reason"] for clip in rejected} == {"unreadable"}


def test_rows_that_the_manifest_does_not_name_stay(videos, talker, captioner, capsys):
    assert run(videos, "--caption_model", captioner) == 0
    before = captions_of(videos / "captions.jsonl")
    (videos / "0.mp4").unlink()
    assert run(videos, "--caption_model", captioner) == 0
    assert captions_of(videos / "captions.jsonl") == before
    assert "kept      1 clips that the manifest does not name" in capsys.readouterr().out


@pytest.mark.parametrize("dies_at", range(6))
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_died_is_gone_on_from(videos, talker, captioner, rewriter, dies_at, overwrite):
    flags = ["--caption_model", captioner, "--rewrite_model", rewriter] + ["--overwrite"] * overwrite
    if overwrite:
        for number in range(3):
            (videos / f"{number}.txt").write_text(f"old {number}", encoding="utf-8")
    talker.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        run(videos, *flags)
    assert not (videos / "captions.jsonl").exists()
    with (videos / ".captions.jsonl.unfinished").open("ab") as file:
        file.write(b'{"clip": ["2.mp4", nu')  # and its last line was torn
    talker.dies_at = None
    assert run(videos, *flags) == 0
    assert set(Counter(talker.heard).values()) == {1}, "no text twice"
    assert len(talker.heard) == 6
    assert all(row["caption"] == f"again {row['raw_caption']}" for row in rows_of(videos / "captions.jsonl"))
    assert not (videos / ".captions.jsonl.unfinished").exists()


def test_an_unfinished_run_with_overwrite_is_not_taken_for_another(videos, talker, captioner):
    assert run(videos, "--caption_model", captioner) == 0
    talker.dies_at = 4
    with pytest.raises(KeyboardInterrupt):
        run(videos, "--caption_model", captioner, "--overwrite")
    talker.dies_at = None
    with pytest.raises(ConfigError, match="unfinished run with --overwrite; give --overwrite to go on"):
        run(videos, "--caption_model", captioner)
    assert run(videos, "--caption_model", captioner, "--overwrite") == 0
    assert len(talker.heard) == 6


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_captions_of_an_unfinished_run_are_there_for_one_that_only_rewrites(
    videos, talker, captioner, rewriter, overwrite
):
    talker.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(videos, "--caption_model", captioner, *overwrite)
    talker.dies_at = None
    assert run(videos, "--rewrite_model", rewriter, *overwrite) == 0
    rows = rows_of(videos / "captions.jsonl")
    assert [row["video"] for row in rows] == ["0.mp4", "1.mp4"]
    assert all(row["caption"] == f"again {row['raw_caption']}" for row in rows)
    assert all(row["caption_model"] == str(captioner) for row in rows)
    assert len(talker.heard) == 4


def test_with_overwrite_texts_by_other_settings_do_not_count(videos, talker, captioner):
    talker.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(videos, "--caption_model", captioner, "--overwrite")
    talker.dies_at = None
    assert run(videos, "--caption_model", captioner, "--overwrite", "--frames", 3) == 0
    assert len(talker.heard) == 2 + 3
    assert len({row["caption_recipe"] for row in rows_of(videos / "captions.jsonl")}) == 1


def test_what_the_models_do_not_say_is_told(videos, talker, captioner, rewriter, monkeypatch, capsys):
    monkeypatch.setattr(Talker, "rewrite", lambda self, captions, seeds: ["" for _ in captions])
    assert run(videos, "--caption_model", captioner, "--rewrite_model", rewriter) == 0
    rows = rows_of(videos / "captions.jsonl")
    assert [row["caption_source"] for row in rows] == ["model"] * 3
    assert "silent    3 captions" in capsys.readouterr().out
    (videos / "captions.jsonl").unlink()
    monkeypatch.setattr(Talker, "caption", lambda self, clips, seeds: ["" for _ in clips])
    with pytest.raises(UserError, match=r"all 4 clips were rejected, the first 0.mp4: empty_caption"):
        run(videos, "--caption_model", captioner, output="other.csv")


@pytest.mark.slow
def test_sigkill_at_any_instant_loses_nothing_and_repeats_nothing(clips, captioner, rewriter, tmp_path):
    """Killed whenever the journal has grown by a line, or while it starts; what was written is there once."""
    folder = Path(shutil.copytree(clips, tmp_path / "clips", ignore=shutil.ignore_patterns("*.txt")))
    words = ["-m", "preprocess.caption", "--dataset_name", str(folder), "--output", str(tmp_path / "captions.jsonl")]
    words += ["--caption_model", str(captioner), "--rewrite_model", str(rewriter), "--max_new_tokens", str(TOKENS)]
    whole = run_command(*words)
    assert whole.returncode == 0, whole.stderr
    expected = (tmp_path / "captions.jsonl").read_bytes()
    (tmp_path / "captions.jsonl").unlink()
    journal, rng, kills = tmp_path / ".captions.jsonl.unfinished", random.Random(0), 0

    def texts():
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        return [line for line in lines if line.endswith(b"\n") and b'"text"' in line]

    while not (tmp_path / "captions.jsonl").exists():
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        goal = len(texts()) + rng.randint(1, 4)
        while process.poll() is None and len(texts()) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        told = [json.loads(line) for line in texts()]
        assert len({(tuple(entry["clip"]), "of" in entry) for entry in told}) == len(told)
    assert kills >= 3
    assert run_command(*words).returncode == 0
    assert (tmp_path / "captions.jsonl").read_bytes() == expected
    assert not journal.exists()


# --- the journal


def test_a_journal_has_one_writer(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append({"a": 1})
        with pytest.raises(ManifestError, match="another process writes it"):
            Journal(tmp_path / "j")
    with Journal(tmp_path / "j") as journal:
        assert journal.entries == [{"a": 1}]


def test_a_journal_that_tells_nothing_is_removed_and_only_its_own(tmp_path):
    with Journal(tmp_path / "j") as first:
        (tmp_path / "j").unlink()
        (tmp_path / "j").write_bytes(b'{"of":"another"}\n')
        first.remove()
    assert (tmp_path / "j").read_bytes() == b'{"of":"another"}\n'
    with Journal(tmp_path / "k"):
        assert (tmp_path / "k").exists()
    assert not (tmp_path / "k").exists()


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(tmp_path / "j") as journal:
        journal.append({"a": 1})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ManifestError, match=r"j: cannot be written \(No space left on device\); make room"):
            journal.append({"b": 2})
        monkeypatch.undo()


@pytest.mark.parametrize("torn", [b'{"b"', b'{"b": 2}', b"\0" * 9, b"\0" * 9 + b"\n", b"[1]\n"])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "j"
    path.write_bytes(b'{"a":1}\n' + torn)
    with Journal(path) as journal:
        assert journal.entries == [{"a": 1}]
        journal.append({"c": 3})
    assert path.read_bytes() == b'{"a":1}\n{"c":3}\n'


def test_damage_within_a_journal_is_named(tmp_path):
    (tmp_path / "j").write_bytes(b'{"a":1}\n{"b"\n{"c":3}\n')
    with pytest.raises(ManifestError, match=r"j:2: is not as it was written"):
        Journal(tmp_path / "j")


# --- notes and mistakes


def test_captions_of_other_lengths_and_scripts_are_counted():
    lengths = {"short": 49, "least": 50, "most": 100, "long": 101}
    rows = [Row(name, " ".join(["word"] * count)) for name, count in lengths.items()]
    rows += [Row("foreign", "兔子 " * 60), Row("accent", "café naïve " * 30)]
    words, script = notes(rows)
    assert words == "words     2 of 6 captions have not 50 to 100: short (49), long (101)"
    assert script == "script    1 of 6 captions are not in Latin letters: foreign"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output", "captions.txt"], "--output 'captions.txt'; must be a file"),
        (["--output", "s3://b/captions.csv"], "must be a file"),
        (["--dataset_name", "c.jsonl"], "is the manifest itself"),
        (["--frames", "0"], "--frames 0; must be at least 1"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--clip_seconds", "0"], "--clip_seconds 0"),
        (["--decode_timeout", "0"], "--decode_timeout 0"),
        (["--dataloader_num_workers", "-1"], "must not be negative"),
        (["--caption_prompt", "nowhere.txt"], "--caption_prompt nowhere.txt: cannot be read"),
        (["--rewrite_template", str(ROOT / "configs" / "caption_prompt.txt")], r"has no \{caption\}"),
    ],
)
def test_mistakes_in_flags_are_named(flags, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(CaptionConfig, ["--output", "c.jsonl", "--caption_model", "m", *flags], "caption")


def test_a_model_is_asked_for():
    with pytest.raises(ConfigError, match="--caption_model is missing"):
        parse_config(CaptionConfig, ["--output", "c.jsonl"], "caption")


def test_other_mistakes_are_named(videos, talker, captioner, rewriter, tmp_path, clips):
    with pytest.raises(UserError, match=r"all 4 clips were rejected, the first 0.mp4: no_caption .*--caption_model"):
        run(videos, "--rewrite_model", rewriter)
    (videos / "mine.csv").write_text("video,caption\n0.mp4,hand-written\n")
    with pytest.raises(ConfigError, match=r"mine.csv: is there, and not of this command"):
        run(videos, "--caption_model", captioner, output="mine.csv")
    assert (videos / "mine.csv").read_text() == "video,caption\n0.mp4,hand-written\n"
    (videos / "mine.csv").write_text("prompt\na cat\n")
    with pytest.raises(ManifestError, match=r"--output .*mine.csv: is there, and cannot be gone on from \(.*no column"):
        run(videos, "--caption_model", captioner, output="mine.csv")


def test_a_mistake_in_the_manifest_or_the_output_is_told_before_a_model_is_fetched(videos, monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "fetch_model", lambda *_, **__: pytest.fail("a model was fetched"))
    with pytest.raises(ManifestError, match="nowhere"):
        run(tmp_path / "nowhere", "--caption_model", "m", output="../captions.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"--output .*/file/c\.csv: cannot be written \(.+\); give a path in a folder"
    ):
        main(["--dataset_name", str(videos), "--output", str(tmp_path / "file" / "c.csv"), "--caption_model", "m"])


def test_a_disk_that_fills_at_the_end_keeps_the_texts(videos, talker, captioner, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("preprocess.captions.write_atomically", full)
        with pytest.raises(ManifestError, match=r"captions\.jsonl: cannot be written \(No space left on device\)"):
            run(videos, "--caption_model", captioner)
    assert run(videos, "--caption_model", captioner) == 0
    assert len(talker.heard) == 3, "no text twice"


def test_what_is_no_such_model_is_named_in_one_line(videos, tiny_2b, rewriter, captioner, tmp_path):
    whole = ("--caption_model", captioner)
    for flags, said in (
        (("--caption_model", tmp_path / "nowhere"), "no such folder"),
        (("--caption_model", tiny_2b), "transformers cannot load it"),
        (("--caption_model", rewriter), "is a llama; must be an image-text-to-text model"),
        ((*whole, "--rewrite_model", tiny_2b / "text_encoder"), "is a t5; must be a causal language model"),
    ):
        with pytest.raises(ModelError, match=said) as error:
            run(videos, *flags)
        assert len(str(error.value).splitlines()) == 1
    assert not list(videos.glob(".captions*")), "nothing is left behind"


def test_weights_that_are_missing_or_pickled_are_not_loaded(videos, captioner, tmp_path):
    folder = Path(shutil.copytree(captioner, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="has no weights as safetensors"):
        run(videos, "--caption_model", folder)


def test_a_models_own_code_is_not_run(videos, captioner, tmp_path):
    """As of MiniCPM-V-2.6, whose repository brings it."""
    folder = Path(shutil.copytree(captioner, tmp_path / "model"))
    mark = tmp_path / "it-ran"
    (folder / "configuration_own.py").write_text(f"open({str(mark)!r}, 'w')\nclass OwnConfig: pass\n")
    told = {"model_type": "minicpmv", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="without code of its own"):
        run(videos, "--caption_model", folder)
    assert not mark.exists()


def test_a_hub_id_is_kept_with_its_commit(videos, captioner, rewriter, tmp_path):
    """In the hub's own cache: tests reach no hub."""
    for name, source, commit in (("tiny--seer", captioner, "a" * 40), ("tiny--writer", rewriter, "b" * 40)):
        repository = tmp_path / "hub" / f"models--{name}"
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    flags = ("--caption_model", "tiny/seer", "--rewrite_model", "tiny/writer", "--rewrite_revision", "b" * 40)
    assert run(videos, *flags, "--cache_dir", tmp_path / "hub") == 0
    row = rows_of(videos / "captions.jsonl")[0]
    assert (row["caption_model"], row["caption_revision"]) == ("tiny/seer", "a" * 40)
    assert (row["rewrite_model"], row["rewrite_revision"]) == ("tiny/writer", "b" * 40)
    with pytest.raises(ModelError, match="tiny/other: no such folder, and the hub did not give it"):
        run(videos, "--caption_model", "tiny/other", "--overwrite", "--cache_dir", tmp_path / "hub")


def test_a_processor_that_needs_torchvision_names_the_extra(videos, captioner, tmp_path):
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    folder = Path(shutil.copytree(captioner, tmp_path / "model"))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    with pytest.raises(ModelError, match=r"orchvision.*install the extra `caption`: pip install"):
        run(videos, "--caption_model", folder)


# --- the command


def test_the_file_of_flags_shows_every_flag_at_its_default():
    text = (ROOT / "configs" / "caption.toml").read_text(encoding="utf-8")
    fields = {field.name: field.default for field in dataclasses.fields(CaptionConfig)}
    assert sorted(re.findall(r"^#? ?(\w+) = ", text, re.MULTILINE)) == sorted(fields)
    values = {name: value for name, value in tomllib.loads(text).items() if fields[name] not in (None, "")}
    assert values == {name: fields[name] for name in values}


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom preprocess.caption import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = run_command("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--rewrite_template" in done.stdout


def test_the_command_runs_from_a_shell(videos, captioner):
    done = run_command(
        "-m", "preprocess.caption", "--config", "configs/caption.toml", "--dataset_name", str(videos), "--output",
        str(videos / "captions.csv"), "--caption_model", str(captioner), "--max_new_tokens", "8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "captions  3 written, 0 rewritten" in done.stdout
    assert "words     3 of 3 captions have not 50 to 100" in done.stdout
    assert len(rows_of(videos / "captions.csv")) == 3
