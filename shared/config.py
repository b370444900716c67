"""One schema for the command line and for TOML files: a frozen dataclass per stage.

Defaults < `--config FILE.toml` < flags. A file's keys are the flags' names; they are turned into the flags that they
stand for and read by the same parser, so that a value means the same in both. The environment changes nothing.

The flags of every command (shared/console.py) are about the terminal: they are no keys of
files, and no record has them.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import tomllib
import typing
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

from shared.console import Terminal, configure, fail
from shared.errors import ConfigError
from shared.help import flags_of, help_text

Config = TypeVar("Config")


def parse_config(config_type: type[Config], argv: list[str], prog: str) -> Config:
    """The configuration that `argv` asks for.

    Args:
        config_type: a frozen dataclass; each field is a flag, its docstring the help.
        argv: the arguments after the program's name; `--config FILE.toml` may stand anywhere.
        prog: how the command is called, for the help.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value that `__post_init__` refuses.
        SystemExit: a flag that does not parse (status 2), which was said in one line; or `--help` (status 0).
    """
    argv = _take_terminal_flags(argv, prog)
    if {"--help", "-h"} & set(argv):
        print(help_text(config_type, prog), end="")
        raise SystemExit(0)
    files, flags = _split_config_files(argv)
    told = {_name(word) for word in flags if word.startswith("--")}
    merged = [flag for file in files for flag in _flags_of(config_type, file, told)] + flags
    return _parse(config_type, _lower_choices(config_type, merged), prog)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for the records that each output carries; of secrets, None."""
    return {
        field.name: None if field.metadata.get("secret") else getattr(config, field.name)
        for field in dataclasses.fields(config)
    }


def secret() -> Any:
    """A field for what no record, log or message may hold: by default None."""
    return dataclasses.field(default=None, repr=False, metadata={"secret": True})


def check_name(name: str) -> str:
    """The name of a data set, when it can be a folder's.

    Raises:
        ConfigError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"--dataset {name!r}: use letters, digits, '.', '_' and '-', at most 100")
    return name


def _take_terminal_flags(argv: list[str], prog: str) -> list[str]:
    """Set the terminal as its flags say, wherever they stand. Returns the other words."""
    names = {field.name for field in dataclasses.fields(Terminal)}
    given = {_name(word): word for word in argv if word.startswith("--") and _name(word) in names}
    configure(Terminal(**dict.fromkeys(given, True)), prog.removeprefix("python -m "))
    for name, word in given.items():
        if "=" in word:
            raise ConfigError(f"{word}: --{name} takes no value; give it alone, or leave it out")
    return [word for word in argv if word not in given.values()]


def _name(word: str) -> str:
    """The name of the flag that a word gives."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _parse(config_type: type[Config], words: list[str], prog: str) -> Config:
    import tyro  # late: those that only read a configuration do not pay for the parser

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(config_type, args=words, prog=prog, use_underscores=True)
    except SystemExit:
        fail(_one_line(config_type, said.getvalue(), words, prog))
        raise


def _one_line(config_type: Any, said: str, words: list[str], prog: str) -> str:
    """What the parser said in a box of several parts: the first of them, and the flags that may have been meant."""
    rows = [line.strip("│ ") for line in said.splitlines() if line[:1] not in ("╭", "╰")]
    bars = [place for place, row in enumerate(rows) if re.fullmatch("[─-]{3,}", row)]
    if "╭" not in said and bars:  # a terminal of ASCII has no box: the title comes first, and a bar below it
        rows, bars = rows[bars[0] + 1 :], [place - bars[0] - 1 for place in bars[1:]]
    what = " ".join(" ".join(rows[: bars[0] if bars else None]).split()).rstrip(".")
    if parsed := re.match(r"(?:Error parsing|invalid choice .* for argument) '?--(\w+)", what):
        what = _refusal(config_type, parsed[1], words) or what
    elif lacking := re.match(r"Missing value for argument '(--\w+)'", what):
        what = f"{lacking[1]}: its value is missing"
    names = [field.name for field in (*dataclasses.fields(config_type), *dataclasses.fields(Terminal))]
    unknown = [word for word in words if word.startswith("--") and _name(word).removeprefix("no_") not in names]
    close = [name for word in unknown for name in difflib.get_close_matches(_name(word), names, n=1)]
    if set(close) & _secrets(config_type):  # what follows the name may be one
        for word in unknown:
            value = word.partition("=")[2] or next(iter(words[words.index(word) + 1 :]), "")
            what = what.replace(value, "***") if value else what
    hint = f"; did you mean {' or '.join(f'--{name}' for name in dict.fromkeys(close))}?" if close else ""
    return f"{what}{hint}{'' if close else ';'} see {prog} --help"


def _refusal(config_type: type, name: str, words: list[str]) -> str | None:
    """The value that a flag was given and what it must be; None: it takes other values than numbers and choices."""
    values = [
        word.partition("=")[2] if "=" in word else following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.startswith("--") and _name(word) == name
    ]
    kinds = {flag.name: flag.usage.partition(" ")[2] for flag in flags_of(config_type)}
    kind = kinds.get(name, "")
    must = {"N": "a whole number", "X": "a number"}.get(
        kind, f"one of {', '.join(kind.split('|'))}" if "|" in kind else ""
    )
    return f"--{name} {values[-1]}; must be {must}" if values and must else None


def _split_config_files(argv: list[str]) -> tuple[list[Path], list[str]]:
    files, flags, words = [], [], iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name != "--config":
            flags.append(word)
            continue
        path = value if given else next(words, None)
        if path is None:
            raise ConfigError("--config needs a TOML file, such as configs/train.toml")
        files.append(Path(path))
    return files, flags


def _flags_of(config_type: type, file: Path, told: set[str]) -> list[str]:
    """The flags that a TOML file stands for.

    Args:
        told: the flags of the command line; one that may be repeated takes the place of the file's.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read ({error.strerror}); give a TOML file's path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not valid TOML: {error}") from error
    types = _types(config_type)
    flags: list[str] = []
    for key, value in table.items():
        if key in {field.name for field in dataclasses.fields(Terminal)}:
            raise ConfigError(f"{file}: {key} is about the terminal, not the run; give --{key} on the command line")
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see --help for the keys"
            raise ConfigError(f"{file}: unknown key {key!r}{hint}")
        if typing.get_origin(types[key]) is tuple:
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(one, str) for one in values):
                raise ConfigError(f"{file}: {key} = {value!r}; must be a string, or a list of strings")
            flags += [] if key in told else [f"--{key}={one}" for one in values]
        elif isinstance(value, bool):
            if types[key] is not bool:
                raise ConfigError(f"{file}: {key} = {str(value).lower()}; must not be a boolean")
            flags.append(f"--{key}" if value else f"--no_{key}")
        elif types[key] is bool:
            raise ConfigError(f"{file}: {key} = {value!r}; must be true or false")
        elif isinstance(value, int | float | str):
            flags.append(f"--{key}={value}")
        else:
            shown = "***" if key in _secrets(config_type) else repr(value)
            raise ConfigError(f"{file}: {key} = {shown}; must be a string, a number or a boolean")
    return flags


def _secrets(config_type: Any) -> set[str]:
    """The names of the fields that no message may tell."""
    return {field.name for field in dataclasses.fields(config_type) if field.metadata.get("secret")}


def _types(config_type: Any) -> dict[str, Any]:
    """The types of a configuration's fields."""
    hints = typing.get_type_hints(config_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def _lower_choices(config_type: type, argv: list[str]) -> list[str]:
    """`argv` with the values of choices in lower case: `--optimizer Adam` is `--optimizer adam`."""
    choices = {}
    for name, hint in _types(config_type).items():
        words = [word for part in (hint, *typing.get_args(hint)) for word in typing.get_args(part)]
        choices[name] = {word for word in words if isinstance(word, str)}
    lowered = list(argv)
    for place, word in enumerate(argv):
        name, given, value = word.removeprefix("--").replace("-", "_").partition("=")
        if not word.startswith("--") or name not in choices:
            continue
        if given and value.lower() in choices[name]:
            lowered[place] = f"--{name}={value.lower()}"
        elif place + 1 < len(argv) and argv[place + 1].lower() in choices[name]:
            lowered[place + 1] = argv[place + 1].lower()
    return lowered
