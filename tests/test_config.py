"""One schema for flags and files: which wins, what a value means, and what is said of a mistake."""

import ast
import dataclasses
import importlib
import itertools
import re
import tomllib
from dataclasses import dataclass
from typing import Literal

import pytest

from shared.config import parse_config, to_dict
from shared.errors import ConfigError
from tests.conftest import ROOT, run_command


@dataclass(frozen=True)
class Config:
    """A stage."""

    rank: int = 64
    """Rank."""
    learning_rate: float = 1e-4
    """Rate."""
    gradient_checkpointing: bool = True
    """On."""
    rehash: bool = False
    """Off."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """Choice."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Choice or none."""
    id_token: str | None = None
    """Text."""
    fps: str = "auto"
    """Number or word."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"--rank {self.rank}; must be at least 1")


def parse(*flags: str) -> Config:
    return parse_config(Config, list(flags), "python -m stage")


@pytest.fixture
def file(tmp_path):
    """Writes a TOML file and returns its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "stage.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_without_flags_every_value_is_its_default():
    assert parse() == Config()


def test_files_win_over_defaults_and_flags_over_files(file):
    path = file("rank = 8\nlearning_rate = 0.5\n")
    for flags in (["--config", path, "--rank", "4"], ["--rank", "4", f"--config={path}"]):
        config = parse(*flags)
        assert (config.rank, config.learning_rate, config.optimizer) == (4, 0.5, "adamw")


def test_of_two_files_the_later_wins(file, tmp_path):
    later = tmp_path / "later.toml"
    later.write_text("rank = 2\n")
    config = parse("--config", file("rank = 8\nfps = '4'\n"), "--config", str(later))
    assert (config.rank, config.fps) == (2, "4")


def test_the_environment_changes_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("rank", "3")
    assert parse() == Config()


@pytest.mark.parametrize("flags", [["--learning_rate", "0.5"], ["--learning-rate", "0.5"], ["--learning-rate=0.5"]])
def test_flags_are_taken_with_underscores_and_with_hyphens(flags):
    assert parse(*flags) == Config(learning_rate=0.5)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("gradient_checkpointing = false", ["--no_gradient_checkpointing"]),
        ("gradient_checkpointing = false", ["--no-gradient-checkpointing"]),
        ("gradient_checkpointing = true", ["--gradient_checkpointing"]),
        ("rehash = true", ["--rehash"]),
        ("rehash = false", ["--no_rehash"]),
        ("learning_rate = 1", ["--learning_rate", "1"]),
        ("learning_rate = 1e-5", ["--learning_rate", "1e-5"]),
        ("fps = 8", ["--fps", "8"]),
        ("id_token = ''", ["--id_token", ""]),
        ("id_token = 'a  b=c \U0001f430\"'", ["--id_token", 'a  b=c \U0001f430"']),
        ("id_token = '--rank'", ["--id_token=--rank"]),
        ("optimizer = 'Adam'", ["--optimizer", "Adam"]),
    ],
)
def test_a_key_means_what_its_flag_means(file, text, flags):
    key, value = tomllib.loads(text).popitem()
    config = parse("--config", file(text))
    assert config == parse(*flags)
    given = getattr(config, key)
    assert str(given) == str(value) or given == value or (key, given) == ("optimizer", "adam")


def test_a_flag_takes_back_a_boolean_of_the_file(file):
    assert parse("--config", file("gradient_checkpointing = false"), "--gradient_checkpointing").gradient_checkpointing
    assert not parse("--config", file("rehash = true"), "--no_rehash").rehash


@pytest.mark.parametrize("word", ["Adam", "ADAM", "adam"])
@pytest.mark.parametrize("form", ["--optimizer {}", "--optimizer={}", "file"])
def test_choices_are_taken_in_any_case(file, word, form):
    flags = ["--config", file(f"optimizer = '{word}'")] if form == "file" else form.format(word).split()
    assert parse(*flags).optimizer == "adam"


def test_a_choice_that_may_be_left_out_is_taken_in_any_case():
    assert parse("--mixed-precision", "BF16").mixed_precision == "bf16"


def test_text_keeps_its_case_where_it_is_no_choice():
    assert parse("--id_token", "Adam", "--optimizer", "AdamW") == Config(id_token="Adam")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lerning_rate = 1", r"stage\.toml: unknown key 'lerning_rate'; did you mean learning_rate\?"),
        ("learning-rate = 1", r"unknown key 'learning-rate'; did you mean learning_rate\?"),
        ("xyzzy = 1", r"unknown key 'xyzzy'; see --help"),
        ("[rank]\nvalue = 1", r"rank = \{'value': 1\}; must be a string, a number or a boolean"),
        ("rank = [1, 2]", r"rank = \[1, 2\]; must be"),
        ("fps = 1979-05-27", r"fps = .*; must be"),
        ("rank = true", r"rank = true; must not be a boolean"),
        ("rehash = 1", r"stage\.toml: rehash = 1; must be true or false"),
        ("rehash = 'yes'", r"rehash = 'yes'; must be true or false"),
        ("rank = ", r"stage\.toml: not valid TOML"),
        (b"id_token = '\xff'", r"stage\.toml: not valid TOML"),
        ("rank = 0", r"--rank 0; must be at least 1"),
    ],
)
def test_a_mistake_in_a_file_is_named(file, text, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse("--config", file(text))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["nowhere.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, path):
    with pytest.raises(ConfigError, match=f"--config {re.escape(str(tmp_path / path))}: cannot be read"):
        parse("--config", str(tmp_path / path))


def test_config_needs_a_file():
    with pytest.raises(ConfigError, match="needs a TOML file"):
        parse("--rank", "3", "--config")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lerning_rate", "1"], "did you mean --learning_rate? see"),
        (["--rank", "x"], "error: --rank x; must be a whole number; see"),
        (["--rank=1.5"], "error: --rank 1.5; must be a whole number; see"),
        (["--learning_rate", "fast"], "error: --learning_rate fast; must be a number; see"),
        (["--rank"], "error: --rank: its value is missing; see"),
        (["--optimizer", "sgd"], "error: --optimizer sgd; must be one of "),
        (["--rehash", "False"], "False"),  # never read as True
        (["stray"], "stray"),
    ],
)
def test_a_flag_that_does_not_parse_ends_with_2_and_a_hint(capsys, flags, said):
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert said in printed.err
    assert (len(printed.err.splitlines()), printed.out) == (1, "")


def test_a_terminal_that_knows_only_ascii_is_told_the_same():
    code = "from tests.test_config import parse\nparse('--optimizer', 'sgd')"
    told = [run_command("-c", code, PYTHONIOENCODING=encoding) for encoding in ("utf-8", "ascii")]
    assert [done.returncode for done in told] == [2, 2]
    assert told[0].stderr == told[1].stderr
    assert told[0].stderr.startswith("error: --optimizer sgd; must be one of ")


def test_a_wrong_type_in_a_file_is_said_as_of_the_flag(file, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--config", file("rank = 1.5"))
    assert ended.value.code == 2
    assert "--rank" in capsys.readouterr().err


def test_help_tells_each_flag_and_its_docstring(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    for field in dataclasses.fields(Config):
        assert re.search(rf"--(no_)?{field.name}\b", printed)
    assert "Choice or none." in printed


def test_records_hold_every_value():
    config = Config(rank=3, id_token="X")
    assert Config(**to_dict(config)) == config
    assert list(to_dict(config)) == [field.name for field in dataclasses.fields(Config)]


# The files and the stages of the house.

STAGES = {"preprocess": "PreprocessConfig", "train": "TrainConfig", "infer": "InferConfig"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_the_stage_s_file_is_a_field_and_every_field_a_key(stage):
    """A field without a default stands there with an example, behind a `#` unless the stage cannot do without it."""
    path = ROOT / "configs" / f"{stage}.toml"
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet")
    config_type = getattr(importlib.import_module(f"{stage}.config"), STAGES[stage])
    text = path.read_text(encoding="utf-8")
    written = re.findall(r"^#? ?(\w+) = ", text, re.MULTILINE)
    fields = {field.name: field.default for field in dataclasses.fields(config_type)}
    assert sorted(written) == sorted(fields)
    values = {name: value for name, value in tomllib.loads(text).items() if fields[name] not in (None, "")}
    assert values == {name: fields[name] for name in values}, "what has a default shows it"


HELPED = {**{f"{stage}/config": name for stage, name in STAGES.items()}, "preprocess/data_flags": "DataFlags"}


@pytest.mark.parametrize("module", HELPED)
def test_every_field_of_a_stage_has_its_help(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    (config_type,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == HELPED[module])
    for field, after in itertools.pairwise(config_type.body):
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) != "ClassVar[str]":
            assert isinstance(after, ast.Expr), ast.unparse(field)
            assert isinstance(after.value, ast.Constant), ast.unparse(field)
            assert re.fullmatch(r"[^\n]{10,}\.", str(after.value.value)), ast.unparse(field)
