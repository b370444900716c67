"""Advice: when each line appears, when it does not, and what a run is told of its own data."""

import re
from dataclasses import replace

import pytest

from shared.config import parse_config
from tests.conftest import ROOT
from tests.training import train_here
from train.advice import Facts, advice, is_foreign
from train.config import TrainConfig

RECIPES = ROOT / "configs" / "recipes"
GUIDE = Facts(clips=50, words=[70] * 50, foreign=0, epochs=30, steps=1500)
PRODIGY = {"optimizer": "prodigy", "learning_rate": 0.5}


def config_of(**flags):
    guide = {"optimizer": "adam", "learning_rate": 1e-3, "lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 200}
    return TrainConfig(**{**guide, **flags})


def lines(flags=None, **facts):
    return list(advice(config_of(**(flags or {})), replace(GUIDE, **facts)))


@pytest.mark.parametrize(
    ("flags", "facts", "said"),
    [
        ({**PRODIGY, "learning_rate": 1e-3}, {}, "--learning_rate 0.001 is low for prodigy"),
        ({**PRODIGY, "learning_rate": 0.099}, {}, "--learning_rate 0.099 is low for prodigy"),
        ({"rank": 15, "lora_alpha": 15.0}, {}, "--rank 15 is low"),
        ({"lora_alpha": 1.0}, {}, "--lora_alpha 1 is neither the rank, 64, nor half of it"),
        ({"lora_alpha": 128.0}, {}, "--lora_alpha 128 is neither"),
        ({}, {"clips": 24}, "24 clips are few: 25 and more"),
        ({}, {"words": [49] * 13 + [50] * 37}, "13 of 50 captions are not of 50 to 100 words"),
        ({}, {"words": [101] * 13 + [100] * 37}, "13 of 50 captions are not of 50 to 100 words"),
        ({}, {"foreign": 1}, r"1 of 51 captions do not look like English.*a guess"),
        ({}, {"epochs": 80.5}, "80.5 epochs are more than the 80 that the guide went to"),
        ({"lr_scheduler": "constant"}, {}, "--lr_warmup_steps 200: constant has no warm-up; constant_with_warmup has"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:5,0.1"}, {}, "piecewise_constant has no warm-up"),
        ({}, {"steps": 200}, "--lr_warmup_steps 200 of 200 steps: the learning rate never"),
    ],
)
def test_what_departs_from_the_guide_is_one_line(flags, facts, said):
    (line,) = lines(flags, **facts)
    assert "\n" not in line
    assert re.search(said, line)


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ({}, {}),
        (PRODIGY, {}),
        ({**PRODIGY, "learning_rate": 0.1}, {}),
        ({"optimizer": "adamw", "learning_rate": 1e-4}, {}),
        ({"rank": 16, "lora_alpha": 16.0}, {}),
        ({"rank": 17, "lora_alpha": 8.0}, {}),  # the guide's rank // 2
        ({"lora_alpha": 32.0}, {}),
        ({"lora_alpha": 8.0, "use_rslora": True}, {}),
        ({}, {"clips": 25}),
        ({}, {"words": [50] * 25 + [100] * 25}),
        ({}, {"words": [10] * 25 + [70] * 75}),
        ({}, {"words": []}),
        ({}, {"epochs": 80.0}),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 0}, {}),
        ({}, {"steps": 201}),
    ],
)
def test_a_run_that_follows_the_guide_is_told_nothing(flags, facts):
    assert lines(flags, **facts) == []


@pytest.mark.parametrize("optimizer", ["adam", "prodigy"])
@pytest.mark.parametrize(("clips", "least", "most"), [(25, 2000, 2000), (50, 1500, 2000), (100, 4000, 4000)])
def test_the_recipes_are_the_guides(clips, least, most, optimizer):
    files = ["guide", *(["prodigy"] if optimizer == "prodigy" else []), f"{clips}_clips"]
    words = [word for name in files for word in ("--config", str(RECIPES / f"{name}.toml"))]
    config = parse_config(TrainConfig, words, "python -m train")
    assert config.optimizer == optimizer
    assert (config.rank, config.lora_alpha) == (64, 64)
    assert (config.lr_scheduler, config.lr_warmup_steps) == ("cosine_with_restarts", 200)
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)
    assert config.learning_rate == 0.5 if optimizer == "prodigy" else 1e-4 <= config.learning_rate <= 1e-3
    assert config.max_train_steps is not None
    assert least <= config.max_train_steps <= most
    epochs = config.max_train_steps / clips
    assert not list(advice(config, Facts(clips, [70] * clips, 0, epochs, config.max_train_steps)))


def test_every_recipe_is_of_the_table():
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert names == {"guide", "prodigy", "25_clips", "50_clips", "100_clips"}
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert all(f"{name}.toml" in text for name in names)


@pytest.mark.parametrize(
    ("caption", "foreign"),
    [
        ("A panda plays a guitar.", False),
        ("Un café à Zürich, 12:30 — naïve", False),  # not English: the guess is of letters
        ("一只熊猫在竹林里弹吉他", True),
        ("Панда играет на гитаре", True),
        ("a sign that says 熊猫", False),
        ("ok 一只熊猫在竹林里弹吉他", True),
        ("\U0001f43c 123 !", False),  # no letters
        ("", False),
    ],
)
def test_a_caption_is_foreign_when_most_of_its_letters_are_not_latin(caption, foreign):
    assert is_foreign(caption) == foreign


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice")]


def test_a_run_is_advised_once_before_its_first_step(cache, tmp_path, capsys):
    """Of seven clips, whose captions have six words, at rank 4 and alpha 2."""
    train_here(cache, tmp_path / "run", max_train_steps=2)
    out = capsys.readouterr().out.splitlines()
    found = [line for line in out if line.startswith("advice")]
    assert out.index(found[0]) == next(place for place, line in enumerate(out) if line.startswith("steps ")) + 1
    assert [line.split()[1:3] for line in found] == [["--rank", "4"], ["7", "clips"], ["7", "of"]]


def test_what_is_held_out_does_not_count(cache, tmp_path, capsys):
    train_here(cache, tmp_path / "run", max_train_steps=1, holdout=0.3)
    assert any("5 clips are few" in line for line in told(capsys))


def test_epochs_are_those_of_the_whole_run(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.advice.MOST_EPOCHS", 2)
    train_here(cache, tmp_path / "run", num_train_epochs=3, train_batch_size=7)
    assert any("3 epochs are more than the 2" in line for line in told(capsys))
