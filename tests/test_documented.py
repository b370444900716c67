"""Every command of README and docs runs as it stands, on tiny models, or its page says why it does not.

A page's commands run in its order, in a folder that has what a user has: clips, the configs, and a run. A checkpoint's
name becomes a tiny model's folder, capitals such as CACHE a path, and flags that keep it small follow.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT, moving_square, write_video
from tests.documented import PAGES, Command, commands

NAMES = {"THUDM/CogVideoX-2b": "2b", "THUDM/CogVideoX-5b": "5b", "models/CogVideoX-5b": "5b"}  # of models, in the world
WORDS = {"CACHE": ["cache"], "NAME": ["default"], "RUN": ["runs/mine"], "runs/*": ["runs/a", "runs/b"]}
SMALL = {
    "preprocess": ["--height", "64", "--width", "96", "--max_num_frames", "9"],
    "train": ["--max_train_steps", "3", "--rank", "4", "--lora_alpha", "4", "--validation_inference_steps", "2"],
    "infer": ["--num_inference_steps", "2"],
}
ELLIPSIS = {  # what `...` stands for: the flags of the run
    "preprocess": ["--pretrained_model_name_or_path", "THUDM/CogVideoX-2b", "--dataset_name", "my_clips"],
    "train": ["--output_dir", "runs/other"],
    "infer": ["--lora", "runs/mine"],
}
OPTIONAL = re.compile(r" \[-[^\]]*\]")  # [--flag VALUE]: may be left out
RUN_ELSEWHERE = {"make": "by tests/test_demo.py and CI", "pip": "an installation"}


def of_modules(command: Command) -> list[str]:
    """The words of a command of ours from its module on; none: it is another program's."""
    words = shlex.split(OPTIONAL.sub("", command.text), comments=True)
    return words[words.index("-m") + 1 :] if "-m" in words else []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_names_what_is_there(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for command in commands(page):
        words = of_modules(command)
        if words:
            assert importlib.util.find_spec(words[0]), command
        elif command.words[0] == "make":
            assert re.search(rf"^{command.words[1]}:", makefile, re.MULTILINE), command
        elif command.words[0] == "pip":
            for extra in re.findall(r"\[(\w+)\]", command.text):
                assert extra in extras, command
        else:
            assert command.why_not, command
        for word in command.words:
            if word.startswith(("configs/", "docs/", "constraints")):
                assert (ROOT / word).exists(), command


@pytest.fixture(scope="module")
def begin(tmp_path_factory, tiny_2b, tiny_5b):
    """Makes a user's folder: clips with captions, lists of prompts, and the configs of the checkout."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("world")
        for name, model in (("2b", tiny_2b), ("5b", tiny_5b)):
            (folder / name).symlink_to(model)
        shutil.copytree(ROOT / "configs", folder / "configs")
        for path in (folder / "configs").rglob("*.toml"):
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub("|".join(NAMES), lambda match: NAMES[match[0]], text), encoding="utf-8")
        (folder / "my_clips").mkdir()
        for number in range(5):
            write_video(folder / "my_clips" / f"{number}.mp4", moving_square(number))
            (folder / "my_clips" / f"{number}.txt").write_text(f"square number {number} moves over a dark ground")
        (folder / "prompts.txt").write_text("a dog runs\na cat sleeps\n")
        (folder / "rows.csv").write_text('prompt,seed\n"a dog, running",7\na cat,\n')
        (folder / "validation.jsonl").write_text('{"prompt": "a dog runs", "seed": 7}\n')
        return folder

    return make


@pytest.fixture(scope="module")
def world(begin):
    """A user's folder after README's commands, and with other runs."""
    folder = begin()
    run_page(folder, ROOT / "README.md")
    runs = folder / "runs"
    run_words(folder, "train", "--cache", "cache", "--output_dir", "runs/motion", "--seed", "7", *SMALL["train"])
    for name in ("a", "b", "c", "lora", "style"):
        shutil.copytree(runs / "mine", runs / name)
    return folder


def run_page(folder: Path, page: Path) -> int:
    """Run what is a page's to run, in its order. Returns how many that were."""
    told = [command for command in commands(page) if not command.why_not and command.words[0] not in RUN_ELSEWHERE]
    for command in told:
        module, *given = of_modules(command)
        words: list[str] = []
        for word in given:
            if word == "...":
                words += ELLIPSIS.get(module, [])
            elif word.endswith(".json") and word.startswith("videos/"):  # one of those that were made
                words.append(str(sorted((folder / "videos").glob("*-scale1-*.json"))[0]))
            else:
                words += WORDS.get(word, [word])
        launcher = command.words[1 : command.words.index("-m")] if command.words[0] == "torchrun" else None
        small = [] if "--recipe" in words else SMALL.get(module, [])
        run_words(folder, module, *words, *small, launcher=launcher, told=f"{command.page}:{command.line}")
    return len(told)


def run_words(folder: Path, module: str, *words: str, launcher: list[str] | None = None, told: str = "") -> None:
    """Run a command of ours in a folder; on several processes by torchrun's words."""
    start = ["-m"] if launcher is None else ["-m", "torch.distributed.run", *launcher, "-m"]
    done = subprocess.run(
        [sys.executable, *start, module, *(NAMES.get(word, word) for word in words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{told}: {module} {words}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_readme_is_run_by_the_world(world):
    assert [path.suffix for path in sorted((world / "videos").glob("*.mp4"))] == [".mp4"]
    assert (world / "runs" / "mine" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_the_quick_start_leads_from_clips_to_a_lora(begin):
    folder = begin()
    assert run_page(folder, ROOT / "docs" / "quick_start.md") >= 10
    for made in ("runs/mine/report.html", "runs/mine/README.md", "runs/mine/export/comfyui", "videos/index.html"):
        assert (folder / made).exists(), made


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("README.md", "CONTRIBUTING.md", "quick_start.md")],
    ids=lambda page: page.name,
)
def test_a_pages_commands_run_as_they_stand(world, page):
    if not run_page(world, page):
        pytest.skip("gives no command that is run here")
