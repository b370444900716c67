"""shared/help.py: every flag under one heading, with what it takes, what it does, and its default."""

from __future__ import annotations

import dataclasses
import importlib
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
from tyro.conf import Positional, UseAppendAction

from shared.console import Terminal
from shared.errors import ConfigError
from shared.help import PLAIN, TERMINAL, flags_of, help_text

STAGES = {"preprocess": "PreprocessConfig", "train": "TrainConfig", "infer": "InferConfig"}


@dataclass(frozen=True)
class Small:
    """What it does."""

    SIZES: ClassVar[str] = "Sizes"

    run: Positional[str]
    """The run."""
    height: int | None = None
    """Height in pixels; default: the checkpoint's."""
    rate: Annotated[float, "a note"] = 1e-4
    """Rate a step."""

    HOW: ClassVar[str] = "How"

    optimizer: Literal["adam", "prodigy"] = "adam"
    """Which optimizer."""
    fast: bool = True
    """Be fast."""
    rules: tuple[str, ...] = ()
    """Rules, several."""
    added: UseAppendAction[tuple[str, ...]] = ()
    """Added, one at a time."""


def test_flags_are_under_the_heading_before_them():
    found = {flag.name: (flag.heading, flag.usage, flag.help) for flag in flags_of(Small)}
    assert found["run"] == ("Arguments", "RUN", "The run. (required)")
    assert found["height"] == ("Sizes", "--height N", "Height in pixels; default: the checkpoint's.")
    assert found["rate"] == ("Sizes", "--rate X", "Rate a step. (default: 0.0001)")
    assert found["optimizer"] == ("How", "--optimizer adam|prodigy", "Which optimizer. (default: adam)")
    assert found["fast"] == ("How", "--fast, --no_fast", "Be fast. (default: on)")
    assert found["rules"] == ("How", "--rules TEXT ...", "Rules, several. (default: none)")
    assert found["added"] == ("How", "--added TEXT", "Added, one at a time. (default: none)")
    assert found["quiet"][0] == found["config"][0] == found["help"][0] == TERMINAL


def test_the_text_has_each_heading_once_in_its_order(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(Small, "python -m small")
    assert text.startswith("usage: python -m small RUN [--FLAG VALUE ...]\n\nWhat it does.\n")
    assert re.findall(r"^(\w+)$", text, re.MULTILINE) == ["Arguments", "Sizes", "How", "Terminal"]
    assert max(map(len, text.splitlines())) <= 85


def test_a_field_before_the_first_heading_is_a_defect():
    from tests import help_cases

    with pytest.raises(AssertionError, match=r"Early\.rank stands before the first heading"):
        flags_of(help_cases.Early)


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_a_stage_is_under_one_heading_of_its_own(stage):
    config_type = getattr(importlib.import_module(f"{stage}.config"), STAGES[stage])
    found = flags_of(config_type)
    names = [flag.name for flag in found]
    fields = [field.name for field in dataclasses.fields(config_type)]
    terminal = [field.name for field in dataclasses.fields(Terminal)]
    assert sorted(names) == sorted([*fields, *terminal, "config", "help"])
    assert len(names) == len(set(names))
    headings = [flag.heading for flag in found]
    assert PLAIN not in headings
    assert len(set(headings)) >= 6
    changes = [one for one, before in zip(headings, ["", *headings], strict=False) if one != before]
    assert len(changes) == len(set(changes)), "each heading stands once"
    for flag in found:
        assert "default" in flag.help.lower() or flag.name in ("config", "help"), flag


# --- ranges: what the help of a number says of its range is what the configuration holds it to

RANGES = {  # how a range is said: whether its lower and its upper end are in it
    r"at least (\d+)\b": (True, True),
    r"above (\d+) and below (\d+)\b": (False, False),
    r"above (\d+)\b": (False, True),
    r"\b(\d+) to below (\d+)\b": (True, False),
    r"\b(\d+) to (\d+)\b": (True, True),
}
ELSEWHERE = ("a multiple of 16", "4k + 1", "any whole number", "any finite number")  # the checkpoint's, or none
NEEDED: dict[str, dict[str, Any]] = {  # flags that a stage cannot do without
    "preprocess": {"pretrained_model_name_or_path": "m"},
    "train": {},
    "infer": {"lora": ("l",), "prompt": "p"},
}
BESIDE: dict[str, dict[str, Any]] = {  # flags that another one needs
    "clip_stride": {"clips": "slide"},
    "prodigy_beta3": {"optimizer": "prodigy"},
}


def numbers():
    for stage, name in STAGES.items():
        config_type = getattr(importlib.import_module(f"{stage}.config"), name)
        for flag in flags_of(config_type):
            if flag.usage.endswith((" N", " X")) and not any(words in flag.help for words in ELSEWHERE):
                yield pytest.param(stage, config_type, flag, id=f"{stage}-{flag.name}")


@pytest.mark.parametrize(("stage", "config_type", "flag"), list(numbers()))
def test_a_number_is_held_to_the_range_that_its_help_says(stage, config_type, flag):
    told = [(found.start(), pattern, found) for pattern in RANGES if (found := re.search(pattern, flag.help))]
    assert told, f"its help says no range: {flag.help}"
    _, pattern, found = min(told, key=lambda one: (one[0], -one[2].end()))  # the first, and the whole of it
    low, high, *_ = (*map(float, found.groups()), None)
    with_low, with_high = RANGES[pattern]
    assert low is not None
    whole = flag.usage.endswith(" N")
    little = 1 if whole else 1e-3

    def take(value):
        settings = {**NEEDED[stage], **BESIDE.get(flag.name, {}), flag.name: int(value) if whole else value}
        return getattr(config_type(**settings), flag.name)

    inside = [low if with_low else low + little]
    outside = [low - little if with_low else low]
    if high is not None:
        inside.append(high if with_high else high - little)
        outside.append(high + little if with_high else high)
    for value in inside:
        assert take(value) == value
    for value in outside:
        with pytest.raises(ConfigError, match=f"--{flag.name} "):
            take(value)
