"""`index.html` of a folder of videos: what it reads, what it shows in a browser, what its commands do."""

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from infer.gallery import AGAIN, group_videos, read_recipes, weights, write_gallery
from tests.chromium import chromium, needs_chromium
from tests.conftest import ROOT, moving_square, write_video
from tests.test_infer import PROMPT, make, recipe_of
from tests.test_lora_inference import random_lora

EVIL = "<script>document.title = 'stolen'</script> \"over\" 'a' </script><!-- \u2028 valley"
LORA = {"path": "/runs/mine/pytorch_lora_weights.safetensors", "weight": 0.5, "latentreel": {"step": 20}}
RECIPE = {"prompt": f"clouds {EVIL}", "effective_prompt": "", "seed": 7, "fps": 8, "frames": 9, "height": 72}
RECIPE = {**RECIPE, "width": 104, "lora_scale": 1.0, "loras": [LORA]}
VIDEOS = "[...document.querySelectorAll('video')]"
SHOWN = "[...document.querySelectorAll('.group:not([hidden]) q')].map((prompt) => prompt.textContent)"


def put(folder, name, recipe, video=True):
    text = recipe if isinstance(recipe, str | bytes) else json.dumps(recipe)
    (folder / f"{name}.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if video:
        write_video(folder / f"{name}.mp4", moving_square(1))


@pytest.fixture
def videos(tmp_path):
    """A folder whose name must be escaped, with a prompt at two strengths and side by side, and one at two seeds."""
    folder = tmp_path / """it's "<b>mine" & more"""
    folder.mkdir()
    for name, scale in (("a", 1.0), ("b", 0.0)):
        put(folder, name, {**RECIPE, "lora_scale": scale})
    both = [{"name": "b", "label": "base"}, {"name": "a", "label": "LoRA 1"}]
    put(folder, "both", {"prompt": RECIPE["prompt"], "seed": 7, "fps": 8, "compare": both})
    for seed in (10, 9):
        put(folder, f"hill{seed}", {"prompt": "a hill", "seed": seed, "fps": 8, "loras": []})
    return folder


# --- what it reads


def test_prompts_are_in_order_and_in_a_row_the_base_comes_first(videos):
    prompts = group_videos(read_recipes(videos)[0], videos / "index.html")
    assert [prompt["prompt"] for prompt in prompts] == ["a hill", RECIPE["prompt"]]
    hill, clouds = (prompt["rows"] for prompt in prompts)
    assert [(row["seed"], [one["seed"] for one in row["videos"]]) for row in hill] == [(None, [9, 10])]
    assert [(row["seed"], [one["weights"] for one in row["videos"]]) for row in clouds] == [
        (7, ["base model", "mine, step 20, weight 0.5", "side by side: base, LoRA 1"])
    ]


@pytest.mark.parametrize(
    ("path", "hub", "name"),
    [
        ("/runs/mine/pytorch_lora_weights.safetensors", None, "mine"),
        ("/runs/mine/checkpoint-20/pytorch_lora_weights.safetensors", None, "mine"),
        ("/loras/style.safetensors", None, "style"),
        ("/h/01ab/pytorch_lora_weights.safetensors", "me/squares/pytorch_lora_weights.safetensors@01ab", "me/squares"),
        ("/h/01ab/style.safetensors", "me/squares/style.safetensors@01ab", "me/squares/style.safetensors"),
    ],
)  # fmt: skip
def test_a_lora_is_called_by_the_name_that_people_know(path, hub, name):
    assert weights({**RECIPE, "loras": [{**LORA, "path": path, "hub": hub}]}) == f"{name}, step 20, weight 0.5"
    assert (
        weights({**RECIPE, "loras": [{**LORA, "path": path, "hub": hub, "latentreel": None}]}) == f"{name}, weight 0.5"
    )


FOREIGN = {
    "empty": "",
    "torn": json.dumps(RECIPE)[:90],
    "no-utf8": b'{"prompt": "\xff"}',
    "deep": "[" * 100_000,
    "list": "[]",
    "no-prompt": {"seed": 1},
    "prompt-is-none": {**RECIPE, "prompt": None},
    "seed-is-a-list": {**RECIPE, "seed": [1]},
    "rate-is-text": {**RECIPE, "fps": "8"},
    "width-is-css": {**RECIPE, "width": "1; background: url(//evil)"},
    "nan": {**RECIPE, "guidance_scale": float("nan")},
    "endless": {**RECIPE, "frames": 10**400},
    "loras-are-numbers": {**RECIPE, "loras": [1]},
    "no-strength": {"prompt": "a", "loras": [LORA]},
    "lora-without-weight": {**RECIPE, "loras": [{"path": "a"}]},
    "lora-without-path": {**RECIPE, "loras": [{"weight": 1}]},
    "step-is-text": {**RECIPE, "loras": [{**LORA, "latentreel": {"step": "20"}}]},
    "facts-are-text": {**RECIPE, "loras": [{**LORA, "latentreel": "20"}]},
    "compare-is-text": {**RECIPE, "compare": "base"},
    "compare-without-labels": {**RECIPE, "compare": [{}]},
}


def test_what_is_no_recipe_is_left_out_and_named(tmp_path):
    for name, recipe in FOREIGN.items():
        put(tmp_path, name, recipe, video=False)
        (tmp_path / f"{name}.mp4").touch()
    put(tmp_path, "without-video", "{", video=False)
    (tmp_path / "folder.json").mkdir()
    put(tmp_path, "whole", RECIPE)
    recipes, unread = read_recipes(tmp_path)
    assert list(recipes) == [tmp_path / "whole.mp4"]
    assert unread == sorted(f"{name}.mp4" for name in FOREIGN)
    html = write_gallery(tmp_path).read_text("utf-8")
    assert html.count("<video ") == 1
    assert f"no recipe lies beside them: {', '.join(unread)}.</p>" in html


def test_names_and_prompts_that_are_no_utf8_have_a_page(tmp_path):
    name = os.fsdecode(b"caf\xe9 #1")
    put(tmp_path, name, {**RECIPE, "prompt": "half \ud83d of it"})
    html = write_gallery(tmp_path).read_text("utf-8")
    assert "half ? of it" in html
    assert 'src="caf%E9%20%231.mp4"' in html


# --- its commands


def test_the_copied_command_makes_the_same_frames_again_and_leaves_the_first(tiny_2b, tmp_path):
    path = random_lora(tiny_2b, tmp_path / "lora")[1]
    folder = tmp_path / """it's "<b>mine" & more"""
    base, strong = make(folder, lora=str(path), prompt=PROMPT, compare="base,1.0")[:2]
    before = strong.stat().st_mtime_ns
    html = write_gallery(folder).read_text("utf-8")
    commands = [unescape(command) for command in re.findall(r'data-command="([^"]*)"', html)]
    assert len(commands) == 2, "none of what stands side by side"
    (command,) = [command for command in commands if strong.stem in command]
    found = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env={**os.environ, **found}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "are those of the recipe, to the last bit" in done.stdout
    again = recipe_of(folder / AGAIN / strong.name)
    assert again["frames_sha256"] == recipe_of(strong)["frames_sha256"] != recipe_of(base)["frames_sha256"]
    assert strong.stat().st_mtime_ns == before


# --- in a browser


@needs_chromium
def test_base_and_lora_play_side_by_side_on_desk_and_phone(videos, tmp_path):
    put(videos, "damaged", "{")
    put(videos, "torn", {"prompt": "a torn file", "width": 104, "height": 72}, video=False)
    (videos / "torn.mp4").write_bytes(b"no video")
    page = write_gallery(videos)
    with chromium() as browser:
        for width, height in ((1280, 900), (390, 844)):
            browser.resize(width, height)
            browser.open(page)
            assert browser.ask("document.documentElement.scrollWidth") == width, "nothing sticks out"
            assert browser.ask("document.title") == f"{videos.name} · videos"
            assert browser.ask("document.scripts.length") == 1
            assert browser.ask("document.querySelectorAll('b').length") == 6, "a label a video"
            assert browser.ask(SHOWN) == ["a hill", "a torn file", RECIPE["prompt"]]
            labels = browser.ask("[...document.querySelectorAll('figcaption b')].map((label) => label.textContent)")
            assert labels[-3:] == ["base model", "mine, step 20, weight 0.5", "side by side: base, LoRA 1"]
            browser.ask(f"for (const video of {VIDEOS}) video.preload = 'metadata'")
            browser.wait_until("document.querySelectorAll('figure .missing').length")
            browser.wait_until(f"{VIDEOS}.every((video) => video.duration > 1)")  # 9 frames at 8 a second
            sizes = f"{VIDEOS}.map((video) => [video.videoWidth, video.videoHeight, video.getAttribute('width')])"
            assert browser.ask(sizes) == [[104, 72, None]] * 2 + [[104, 72, "104"]] * 2 + [[104, 72, None]]
            browser.ask("[...document.querySelectorAll('.together')].at(-1).click()")
            browser.wait_until(f"{VIDEOS}.slice(-3).every((video) => !video.paused && video.currentTime > 0)")
            assert browser.ask(f"{VIDEOS}.filter((video) => !video.paused).length") == 3
            if width == 390:
                assert browser.ask(f"{VIDEOS}.filter((video) => video.controls).length") == 3, "of those that play"
                browser.ask("document.querySelector('video').click()")
                browser.wait_until("document.querySelector('video').currentTime > 0")
                assert browser.ask("document.querySelector('video').controls"), "to stop it"
            browser.screenshot(tmp_path / f"{width}.png")
            assert [told for told in browser.complaints if "ERR_" not in told] == []
        assert {request.partition(":")[0] for request in browser.requests} <= {"file", "data"}


@needs_chromium
def test_prompts_are_found_and_commands_are_copied(videos):
    page = write_gallery(videos)
    with chromium() as browser:
        browser.resize(1280, 900)
        browser.allow("clipboardReadWrite", "clipboardSanitizedWrite")
        browser.open(page)

        def find(words):
            browser.ask(f"text.value = {json.dumps(words)}; text.dispatchEvent(new Event('input'))")
            told = browser.ask("document.getElementById('count').value"), browser.ask("none.hidden")
            return browser.ask(SHOWN), *told

        assert find("") == (["a hill", RECIPE["prompt"]], "2 prompts", True)
        assert find("VALLEY clouds") == ([RECIPE["prompt"]], "1 of 2", True)
        assert find("step 20") == ([RECIPE["prompt"]], "1 of 2", True)
        assert find("seed 10") == (["a hill"], "1 of 2", True)
        assert find("hill clouds") == ([], "0 of 2", False)
        find("clouds")

        wanted = browser.ask("document.querySelectorAll('.copy')[3].dataset.command")
        assert str(videos / "a.json").replace("'", "'\"'\"'") in wanted
        button = "document.querySelectorAll('.copy')[3]"
        browser.ask("window.board = navigator.clipboard; window.said = []")
        browser.ask(
            "new MutationObserver((changes) => said.push(...changes.map((change) => change.target.textContent)))"
            ".observe(document.querySelector('main'), { childList: true, subtree: true })"
        )
        browser.click(button)
        browser.wait_until("said.includes('copied')")
        assert browser.ask("board.readText()") == wanted

        browser.ask("board.writeText(''); said.length = 0")
        browser.ask(
            "Object.defineProperty(navigator, 'clipboard', { value: undefined })"
        )  # a page that is served by http
        button = "document.querySelectorAll('.copy')[2]"
        wanted = browser.ask(f"{button}.dataset.command")
        browser.click(button)
        browser.wait_until("said.includes('copied')")
        assert browser.ask("board.readText()") == wanted

        browser.ask("document.execCommand = () => false")
        button = "document.querySelectorAll('.copy')[3]"
        browser.click(button)
        browser.wait_until("said.some((words) => words.startsWith('not allowed'))")
        assert browser.ask("getSelection().toString()") == browser.ask(f"{button}.dataset.command")
        assert browser.complaints == []
