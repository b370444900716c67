"""What `--help` prints of a configuration: its flags under their headings, each with its values, help and default.

All of it stands in the dataclass. A class variable among the fields is a heading, and what follows it is under it:

    LORA: ClassVar[str] = "LoRA"

    rank: int = 64
    \"\"\"Rank of the LoRA, at least 1.\"\"\"
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import sys
import textwrap
import types
import typing
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from shared.console import Terminal

COLUMN = 26  # where the help of a flag begins
MOST_COLUMNS = 110
PLAIN = "Flags"  # the heading of a configuration that has none
ARGUMENTS = "Arguments"
TERMINAL = "Terminal"
VALUES = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Flag:
    """A line of the help.

    Attributes:
        heading: that it stands under.
        usage: as it is given on the command line.
        help: what it does, with its default.
    """

    name: str
    heading: str
    usage: str
    help: str


def help_text(config_type: type, prog: str) -> str:
    """The whole help of a command."""
    columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    found = flags_of(config_type)
    places = " ".join(flag.usage for flag in found if flag.heading == ARGUMENTS)
    lines = [f"usage: {prog} {places + ' ' if places else ''}[--FLAG VALUE ...]", ""]
    for paragraph in (inspect.getdoc(config_type) or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, columns), ""]
    lines += ["--no_FLAG takes back a flag without a value; underscores and hyphens are the same."]
    for heading in dict.fromkeys(flag.heading for flag in found):
        lines += ["", _bold(heading)]
        for flag in found:
            if flag.heading == heading:
                lines += _entry(flag, columns)
    return "\n".join(lines) + "\n"


def flags_of(config_type: type) -> list[Flag]:
    """The flags of a configuration in its order, and at the end those of every command."""
    return [
        *_flags(config_type),
        Flag("config", TERMINAL, "--config FILE.toml", "Flags from a file; of several the later wins, and flags win."),
        *(dataclasses.replace(flag, heading=TERMINAL) for flag in _flags(Terminal)),
        Flag("help", TERMINAL, "--help, -h", "Print this."),
    ]  # fmt: skip


def _flags(config_type: type) -> list[Flag]:
    """The flags of a configuration.

    Raises:
        AssertionError: a field stands before the first heading of its class.
    """
    headings, told = _read_source(config_type)
    hints = typing.get_type_hints(config_type, include_extras=True)
    flags = []
    for field in dataclasses.fields(config_type):
        place = _is_place(hints[field.name])
        heading = ARGUMENTS if place else headings[field.name]
        flags.append(
            Flag(field.name, heading, _usage(field, hints[field.name], place), _with_default(field, told[field.name]))
        )
    return sorted(flags, key=lambda flag: flag.heading != ARGUMENTS)


def _read_source(config_type: type) -> tuple[dict[str, str], dict[str, str]]:
    """Of each field its heading and its help; dataclasses do not keep what stands between their fields."""
    headings: dict[str, str] = {}
    told: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        module = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        (definition,) = (
            node for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node.name == base.__name__
        )
        has_headings = any(_heading(node) for node in definition.body)
        heading = "" if has_headings else PLAIN
        for node, after in zip_longest(definition.body, definition.body[1:]):
            heading = _heading(node) or heading
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _heading(node):
                name = node.target.id
                assert heading, f"{base.__name__}.{name} stands before the first heading"
                headings.setdefault(name, heading)
                told[name] = _docstring(after)
    return headings, told


def _heading(node: ast.stmt) -> str | None:
    """The heading that a class variable is."""
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "ClassVar[str]":
        assert isinstance(node.value, ast.Constant)
        return str(node.value.value)
    return None


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def _is_place(hint: Any) -> bool:
    """Whether it is given by its place, without a flag: `tyro.conf.Positional`."""
    return _is_marked(hint, "Positional")


def _is_marked(hint: Any, name: str) -> bool:
    """Whether a type has one of tyro's marks; by its name, as tyro takes time to import."""
    return any(repr(mark) == name for mark in getattr(hint, "__metadata__", ()))


def _usage(field: dataclasses.Field[Any], hint: Any, place: bool) -> str:
    if place:
        return field.name.upper() + (" ..." if "tuple" in str(hint) else "")
    if hint is bool:
        return f"--{field.name}" + (f", --no_{field.name}" if field.default else "")
    values = _values(hint)
    return f"--{field.name} {values.removesuffix(' ...') if _is_marked(hint, 'UseAppendAction') else values}"


def _values(hint: Any) -> str:
    """What a flag takes: its choices, or the kind of its value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _values(args[0])
    if origin is typing.Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return "|".join(_values(arg) for arg in args if arg is not types.NoneType)
    if origin in (tuple, list):
        return " ".join("..." if arg is Ellipsis else _values(arg) for arg in args)
    return VALUES.get(hint, getattr(hint, "__name__", "VALUE").upper())


def _with_default(field: dataclasses.Field[Any], told: str) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return f"{told} (required)"
    if default in (None, "", ()):
        return told if "default: " in told.lower() else f"{told} (default: none)"
    if isinstance(default, bool):
        return f"{told} (default: {'on' if default else 'off'})"
    return f"{told} (default: {default:g})" if isinstance(default, float) else f"{told} (default: {default})"


def _entry(flag: Flag, columns: int) -> list[str]:
    """The lines of a flag: its usage, and its help beside it where there is room, else below."""
    told = textwrap.wrap(flag.help, max(columns - COLUMN, 20))
    usage = f"  {flag.usage}"
    if len(usage) + 2 > COLUMN:
        return [usage, *(" " * COLUMN + line for line in told)]
    return [usage.ljust(COLUMN) + told[0], *(" " * COLUMN + line for line in told[1:])]


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
