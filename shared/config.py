"""One schema for the command line and for TOML files: a frozen dataclass per stage.

Defaults < `--config FILE.toml` < flags. A file's keys are the flags' names; they are turned into the flags that they
stand for and read by the same parser, so that a value means the same in both. The environment changes nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigError

Config = TypeVar("Config")


def parse_config(config_type: type[Config], argv: list[str], prog: str) -> Config:
    """The configuration that `argv` asks for.

    Args:
        config_type: a frozen dataclass; each field is a flag, its docstring the help.
        argv: the arguments after the program's name; `--config FILE.toml` may stand anywhere.
        prog: how the command is called, for the help.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value that `__post_init__` refuses.
        SystemExit: a flag that does not parse (status 2), or `--help` (status 0); the parser has said why.
    """
    import tyro  # late: those that only read a configuration do not pay for the parser

    files, flags = _split_config_files(argv)
    merged = [flag for file in files for flag in _flags_of(config_type, file)] + flags
    return tyro.cli(config_type, args=_lower_choices(config_type, merged), prog=prog, use_underscores=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for the records that each output carries."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def check_name(name: str) -> str:
    """The name of a data set, when it can be a folder's.

    Raises:
        ConfigError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"--dataset {name!r}: use letters, digits, '.', '_' and '-', at most 100")
    return name


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


def _flags_of(config_type: type, file: Path) -> list[str]:
    """The flags that a TOML file stands for."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read ({error.strerror}); give a TOML file's path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not valid TOML: {error}") from error
    types = typing.get_type_hints(config_type)
    flags: list[str] = []
    for key, value in table.items():
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see --help for the keys"
            raise ConfigError(f"{file}: unknown key {key!r}{hint}")
        if isinstance(value, bool):
            if types[key] is not bool:
                raise ConfigError(f"{file}: {key} = {str(value).lower()}; must not be a boolean")
            flags.append(f"--{key}" if value else f"--no_{key}")
        elif types[key] is bool:
            raise ConfigError(f"{file}: {key} = {value!r}; must be true or false")
        elif isinstance(value, int | float | str):
            flags.append(f"--{key}={value}")
        else:
            raise ConfigError(f"{file}: {key} = {value!r}; must be a string, a number or a boolean")
    return flags


def _lower_choices(config_type: type, argv: list[str]) -> list[str]:
    """`argv` with the values of choices in lower case: `--optimizer Adam` is `--optimizer adam`."""
    choices = {}
    for name, hint in typing.get_type_hints(config_type).items():
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
