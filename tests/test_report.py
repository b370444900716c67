"""`python -m train.report`: the page says what the runs' files say, and is drawn by a browser. Runs: tests/runs.py."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote

import pytest

from shared import page
from tests.chromium import chromium, needs_chromium
from tests.conftest import run_command
from tests.runs import FACTS, plausible_holdout, plausible_rows, write_lora, write_rows, write_run, write_validation
from tests.training import only_line
from train.page import compare, duration, names_apart, video_grid
from train.record import read_record
from train.report import main

EVIL = """<script>document.title = "stolen"</script>'"&<b>"""
PROMPTS = ("a person walks along a ridge", f"clouds {EVIL} over a valley")


class Page(HTMLParser):
    """The elements of a page, its text outside of scripts and styles, and the data for its script."""

    def __init__(self, path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data: dict[str, Any] = {}
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = "data" if ("id", "data") in attrs else tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "data":
            self.data = json.loads(data)
        elif self._inside not in ("script", "style"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three runs: two finished, one with a name that must be escaped still going on; and a page of them."""
    folder = tmp_path_factory.mktemp("lab")
    first = write_run(
        folder / "r64", plausible_rows(1, 2000), plausible_holdout(1, 2000, floor=0.12), FACTS, max_train_steps=2000
    )
    second = write_run(
        folder / "r128",
        plausible_rows(2, 2000, floor=0.105, rate=3e-4, skipped=(412, 413, 1377)),
        plausible_holdout(2, 2000, floor=0.108, climbs=0.02),
        replace(FACTS, rank=128, alpha=128.0),
        rank=128,
        lora_alpha=128.0,
        learning_rate=3e-4,
        max_train_steps=2000,
    )
    third = write_run(folder / "r16 <b>#1&", plausible_rows(3, 640, floor=0.135), rank=16, max_train_steps=2000)
    write_lora(third / "checkpoint-90", replace(FACTS, rank=8, step=90))
    write_lora(third / "checkpoint-500", replace(FACTS, rank=16, step=500))
    for hue, (run, steps) in enumerate([(first, (1000, 2000)), (second, (1000, 2000)), (third, (500,))]):
        for step in steps:
            for seed, prompt in enumerate(PROMPTS):
                write_validation(run, step, f"p{seed}-step{step} #{seed}", prompt, seed, hue)
    (second / "validation" / "step-2000" / "p1-step2000 #1.mp4").unlink()
    assert main([str(first), str(second), str(third), "--output", str(folder / "report.html")]) == 0
    return folder


# --- configurations, names, times


def test_differences_are_the_flags_that_differ_also_where_one_run_lacks_them():
    a = {"output_dir": "a", "rank": 64, "seed": 42, "gradient_checkpointing": True, "max_train_steps": None}
    b = {"output_dir": "b", "rank": 64, "seed": 7, "gradient_checkpointing": False, "max_train_steps": None, "ema": 0.9}
    differing, same = compare([a, b, a])
    assert differing == [
        ("seed", ["42", "7", "42"]),
        ("gradient_checkpointing", ["true", "false", "true"]),
        ("ema", ["—", "0.9", "—"]),
    ]
    assert same == [
        ("output_dir", ["a", "b", "a"]),
        ("rank", ["64"] * 3),
        ("max_train_steps", ["not given"] * 3),
    ]
    assert compare([a])[0] == []


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    records = []
    for name in ("ada/lora", "bob/lora"):
        records.append(read_record(write_run(tmp_path / name, plausible_rows(1, 3))))
    assert names_apart(records) == ["ada/lora", "bob/lora"]
    assert names_apart(records[:1]) == ["lora"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_a_duration_is_told_in_two_units(seconds, told):
    assert duration(seconds) == told


def test_a_run_is_finished_when_the_lora_of_its_last_step_is_there(tmp_path):
    run = write_run(tmp_path, plausible_rows(1, 30), None, replace(FACTS, step=20))
    assert not read_record(run).finished, "the LoRA is of an earlier end"
    write_lora(run, replace(FACTS, step=30))
    assert read_record(run).finished
    assert read_record(run).lora == replace(FACTS, step=30)


# --- the page


def test_the_page_tells_what_the_files_of_the_runs_tell(lab):
    seen = Page(lab / "report.html")
    assert "finished" in seen.text
    for words in (
        "3 runs, side by side", "ridges, version 9f31c08a77d2", "rank 128, alpha 128", "rank 16, alpha 64",
        "640 of 2,000", "at step 640, written 20", "skipped steps 3", "flag that differs", "step 2,000",
    ):  # fmt: skip
        assert words in seen.text, words
    runs = seen.data["runs"]
    assert [run["name"] for run in runs] == ["r64", "r128", "r16 <b>#1&"]
    assert [(run["width"], len(run["steps"]), run["steps"][-1]) for run in runs] == [
        (2, 1000, 2000),
        (2, 1000, 2000),
        (1, 640, 640),
    ]
    assert runs[1]["skipped"] == [412, 414, 1378]  # the last steps of the points that hold steps 412, 413 and 1377
    rows = [json.loads(line) for line in (lab / "r16 <b>#1&" / "metrics.jsonl").read_text().splitlines()]
    assert runs[2]["means"]["loss"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    holdout = [json.loads(line) for line in (lab / "r64" / "holdout.jsonl").read_text().splitlines()]
    assert runs[0]["holdout"]["loss"] == pytest.approx([row["loss"] for row in holdout], rel=1e-5)
    best = min(holdout, key=lambda row: row["loss"])
    assert f"{holdout[-1]['loss']:.4f} held-out loss" in seen.text
    assert f"best {best['loss']:.4f} at step {best['step']:,}" in seen.text or best is holdout[-1]


def test_prompts_and_names_are_text_and_nothing_is_asked_of_a_network(lab):
    html = (lab / "report.html").read_text(encoding="utf-8")
    seen = Page(lab / "report.html")
    assert EVIL not in html
    assert PROMPTS[1] in seen.text
    assert "r16 <b>#1&" in seen.text
    assert len(seen.all("script")) == 2
    assert len(seen.all("b")) == 2 * 3, "two numbers a run, and none of a prompt's or a name's"
    for _, attributes in seen.elements:
        for name in ("src", "href"):
            assert not re.match(r"\w+:(?!,$)|//", attributes.get(name) or ""), attributes
    assert not re.search(r"url\((?!#)|@import|https?:(?!//www\.w3\.org/2000/svg)", html)


def test_videos_are_named_by_paths_from_the_page_and_missing_ones_are_shown(lab, tmp_path):
    records = [read_record(lab / name) for name in ("r64", "r128", "r16 <b>#1&")]
    elsewhere = tmp_path / "pages" / "report.html"
    elsewhere.parent.mkdir()
    for place in (lab / "report.html", lab / "r64" / "report.html", elsewhere):
        first, second = video_grid(records, place)
        assert [(entry["prompt"], entry["seed"], entry["steps"]) for entry in (first, second)] == [
            (prompt, seed, [500, 1000, 2000]) for seed, prompt in enumerate(PROMPTS)
        ]
        shown = [[cell is not None for cell in run["cells"]] for run in second["runs"]]
        assert shown == [[False, True, True], [False, True, False], [True, False, False]]
        urls = [cell["url"] for entry in (first, second) for run in entry["runs"] for cell in run["cells"] if cell]
        assert len(urls) == 9
        for url in urls:
            assert (place.parent / unquote(url)).resolve().is_file()
            assert not set("#?:&<") & set(url)


def test_a_large_video_is_a_link(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGE_BYTES", 100)
    main([str(lab / "r64"), "--output", str(tmp_path / "report.html")])
    seen = Page(tmp_path / "report.html")
    assert seen.all("video") == []
    assert len(seen.all("a")) == 4


@pytest.mark.parametrize(
    "recipe",
    ["{", "[1]", "[" * 100_000, '{"prompt": 1, "seed": "a"}', '{"seed": NaN}', '{"prompt": "half \\ud83d"}', b"\xff",
     '{"width": "1; background: red", "height": [1]}'],
    ids=lambda recipe: repr(recipe[:20]),
)  # fmt: skip
def test_a_video_beside_something_else_than_its_recipe_is_shown_by_its_name(tmp_path, recipe):
    run = write_run(tmp_path / "run", plausible_rows(1, 3))
    video = write_validation(run, 1, "the name", "a prompt", 1)
    video.with_suffix(".json").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    assert main([str(run)]) == 0
    seen = Page(run / "report.html")
    assert "the name" in seen.text
    (shown,) = seen.all("video")
    assert shown["src"] == "validation/step-1/the%20name.mp4"
    assert "width" not in shown


def test_a_video_is_as_wide_and_high_as_its_recipe_says(tmp_path):
    run = write_run(tmp_path / "run", plausible_rows(1, 3))
    told = write_validation(run, 1, "a", "a prompt", 1).with_suffix(".json")
    told.write_text(json.dumps({**json.loads(told.read_text()), "width": 480, "height": 720}))
    main([str(run)])
    (shown,) = Page(run / "report.html").all("video")
    assert (shown["width"], shown["height"]) == ("480", "720")


def test_a_run_of_an_older_version_has_a_page_too(tmp_path):
    """Rows as they were before there were timesteps, norms and phases; no config.json, no LoRA, no held-out loss."""
    rows = [{"step": step, "loss": 1 / step, "lr": 1e-4, "seconds": 2.0} for step in (1, 2, 3)]
    write_rows(tmp_path / "metrics.jsonl", rows)
    assert main([str(tmp_path)]) == 0
    seen = Page(tmp_path / "report.html")
    (run,) = seen.data["runs"]
    assert sorted(run["means"]) == ["loss", "lr", "seconds"]
    assert run["means"]["loss"] == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-5)
    assert "at step 3, written" in seen.text


def test_a_run_that_has_taken_no_step_yet_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert main([str(tmp_path)]) == 0
    assert "no step yet" in Page(tmp_path / "report.html").text


def test_values_that_json_cannot_hold_do_not_reach_the_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity, "lr": 1}\n')
    main([str(tmp_path)])
    (run,) = Page(tmp_path / "report.html").data["runs"]
    assert run["means"] == {"lr": [1]}


# --- the command


def test_the_page_lies_in_the_run_or_of_several_in_the_current_folder(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "one", plausible_rows(1, 3))
    assert main([str(run)]) == 0
    assert f"{run}/report.html" in only_line(capsys.readouterr().out)
    assert main([str(run), str(lab / "r64")]) == 0
    assert "report.html: 2 runs" in only_line(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "report.html"]
    assert not list(run.glob(".*"))


def test_mistakes_are_one_line_each_and_no_torch_is_loaded(tmp_path):
    done = run_command("-m", "train.report", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert only_line(done.stderr) == f"error: {tmp_path}: holds no metrics.jsonl; give the --output_dir of a run"
    run = write_run(tmp_path / "run", plausible_rows(1, 3))
    done = run_command("-m", "train.report", str(run), "--output", str(tmp_path / "none" / "a.html"))
    assert done.returncode == 2
    assert "must be a file in a folder that exists" in only_line(done.stderr)
    code = (
        f"import sys; from train.report import main; main([{str(run)!r}]); "
        "sys.exit(bool({'torch', 'diffusers', 'accelerate'} & set(sys.modules)))"
    )
    assert run_command("-c", code).returncode == 0


# --- in a browser

CHARTS = 1 + 1 + 4 + 3 + 1 + 3  # held-out, loss, quartiles, optimizer, samples a second, a time split for each run
PATHS = "document.querySelectorAll('svg path:not(.skip)').length"
# Of three runs, of which one has no held-out loss, and two have points of two steps and so a band.
DRAWN = 2 + (3 + 3 + 2) + 4 * (3 + 2) + (3 + (3 + 3 + 2) + 3) + (3 + 3) + 3 * 5


@needs_chromium
def test_a_browser_draws_the_page_on_desk_and_phone(lab, tmp_path):
    with chromium() as browser:
        for width, height in ((1280, 900), (390, 844)):
            browser.resize(width, height)
            browser.open(lab / "report.html")
            assert browser.complaints == []
            assert browser.ask("document.title") != "stolen"
            assert browser.ask("document.documentElement.scrollWidth") == width, "nothing sticks out"
            assert browser.ask("document.querySelectorAll('svg').length") == CHARTS
            assert browser.ask(PATHS) == DRAWN
            assert browser.ask("document.querySelectorAll('svg path.skip').length") == 2 * 3
            assert "NaN" not in browser.ask("[...document.querySelectorAll('svg')].map((svg) => svg.innerHTML).join()")
            browser.screenshot(tmp_path / f"{width}.png")
        browser.resize(1280, 900, dark=True)
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert {request.partition(":")[0] for request in browser.requests} <= {"file", "data"}
    for width in (1280, 390):
        assert (tmp_path / f"{width}.png").stat().st_size > 50_000


@needs_chromium
def test_many_short_old_and_empty_runs_are_drawn_too(tmp_path):
    runs = [write_run(tmp_path / f"run{number}", plausible_rows(number, 30 * number)) for number in range(9)]
    write_rows(runs[8] / "metrics.jsonl", [{"step": step, "loss": 1 / step, "lr": 1e-4} for step in (1, 2, 3)])
    write_rows(runs[7] / "metrics.jsonl", [{"step": 1, "loss": None, "lr": 0.0, "skipped": True}])
    main([*map(str, runs), "--output", str(tmp_path / "report.html")])
    with chromium() as browser:
        browser.resize(390, 844)
        browser.open(tmp_path / "report.html")
        assert browser.complaints == []
        assert browser.ask("document.documentElement.scrollWidth") == 390
        assert browser.ask("document.querySelectorAll('svg path.line.run-1.dashed').length") == 2, "loss, learning rate"
        assert "NaN" not in browser.ask("[...document.querySelectorAll('svg')].map((svg) => svg.innerHTML).join()")
        assert "Not measured" in browser.ask("document.getElementById('curves').innerText")
        browser.screenshot(tmp_path / "many.png")


@needs_chromium
def test_videos_play_and_the_pointer_tells_step_and_values(lab, tmp_path):
    holdout = [json.loads(line) for line in (lab / "r64" / "holdout.jsonl").read_text().splitlines()]
    with chromium() as browser:
        browser.resize(1280, 900)
        browser.open(lab / "report.html")
        left, top, width, _ = browser.ask(
            "(() => { document.querySelector('svg').scrollIntoView({ block: 'center' });"
            " const box = document.querySelector('svg').getBoundingClientRect();"
            " return [box.left, box.top, box.width, box.height]; })()"
        )
        browser.move_to(left + 52 + (width - 62) * 0.5 + 3, top + 100)  # the middle of the steps, from 0 to 2,000
        told = browser.ask("document.querySelector('.tip:not([hidden])').innerText").split()
        assert told[:2] == ["step", "1,000"]
        assert told[told.index("r64") + 1] == f"{holdout[10]['loss']:#.4g}"
        assert "r128" in told

        browser.ask("document.querySelector('[data-run=\"1\"]').click()")
        assert browser.ask("document.querySelectorAll('svg path.run-1').length") == 0
        browser.ask("document.querySelector('[data-run=\"1\"]').click()")
        assert browser.ask(PATHS) == DRAWN
        linear = browser.ask("document.querySelector('svg path.line').getAttribute('d')")
        browser.ask("document.getElementById('log').click()")
        assert browser.ask("document.querySelector('svg path.line').getAttribute('d')") != linear

        browser.ask("document.getElementById('videos').scrollIntoView()")
        browser.ask("document.querySelector('.together').click()")
        playing = "[...document.querySelectorAll('details:first-of-type video')].filter((video) => video.videoWidth)"
        browser.wait_until(f"{playing}.length >= 5")
        assert browser.ask("document.querySelectorAll('.missing').length") == 4 + 5
        assert browser.complaints == []
        browser.screenshot(tmp_path / "videos.png", whole=False)
