"""The commands that README and docs give, as a reader would copy them.

A command is a line of a block (indented by four, or fenced) that starts with a program, with the lines that it goes on
in. Where the tests do not run a block, a comment above it says why: <!-- not run: needs a Slurm cluster -->
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "torchrun", "accelerate", "make", "pip", "ray", "sbatch", "aws")
PROGRAM = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) (?!.* -> )")  # an arrow: a picture of what goes where
MARK = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        why_not: why the tests do not run it, as its page says; None: they do.
    """

    page: str
    line: int
    text: str
    why_not: str | None

    @property
    def words(self) -> list[str]:
        """As a shell splits it, without its comment."""
        return shlex.split(self.text, comments=True)


def commands(page: Path) -> list[Command]:
    """The commands of a page, in order."""
    found: list[Command] = []
    why_not, fenced, begun = None, False, ""
    start = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if mark := MARK.fullmatch(line.strip()):
            why_not = mark[1]
            continue
        if line.startswith("```"):
            fenced = not fenced
            why_not = why_not if fenced else None
            continue
        if not fenced and not line.startswith("    "):
            why_not = None if line.strip() else why_not
            continue
        text = line.strip()
        if not begun and not PROGRAM.match(text):
            continue
        start = start if begun else number
        begun += text.removesuffix("\\")
        if not text.endswith("\\"):
            found.append(Command(page.name, start, begun, why_not))
            begun = ""
    return found


def all_commands() -> list[Command]:
    """The commands of all pages."""
    return [command for page in PAGES for command in commands(page)]
