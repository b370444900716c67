"""The packages that the project asks for in pyproject.toml: tested as constraints.txt has them, and as they are here.

Needs the standard library alone: it is read where packages are missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@dataclass(frozen=True)
class Package:
    """A package that is asked for: the oldest release that will do, the tested one, what is installed."""

    name: str
    least: str
    tested: str | None
    found: str | None

    @property
    def is_too_old(self) -> bool:
        """Whether a release is installed that will not do."""
        return self.found is not None and release(self.found) < release(self.least)

    @property
    def is_untested(self) -> bool:
        """Whether another release is installed than the tested one; a local part as in 2.13.0+cpu does not count."""
        return self.found is not None and self.tested not in (None, self.found.partition("+")[0])


def release(version: str) -> tuple[int, ...]:
    """A version's numbers, to compare: 2.0 is 2.0.0, and what follows them does not count."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def read_packages(wanted: list[str]) -> list[Package]:
    """The packages that requirements name, such as `torch>=2.9`."""
    tested = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("==")
        if pinned:
            tested[_canonical(name)] = version.strip()
    packages = []
    for text in wanted:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]*\])?(?:>=([\w.]+))?", text.replace(" ", ""))
        assert match, f"pyproject.toml: {text}"  # a defect of ours: only >= is used
        try:
            found: str | None = importlib.metadata.version(match[1])
        except importlib.metadata.PackageNotFoundError:
            found = None
        packages.append(Package(match[1], match[2] or "0", tested.get(_canonical(match[1])), found))
    return packages


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def install_command(packages: list[Package]) -> str:
    """The command that installs packages as they are tested; with their lower bound where they are not."""
    names = [package.name if package.tested else f"{package.name}>={package.least}" for package in packages]
    return shlex.join([sys.executable, "-m", "pip", "install", "-c", str(ROOT / "constraints.txt"), *names])
