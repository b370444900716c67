"""Does a test fail when a formula is wrong? Each formula of training is changed, one at a time.

    python -m benchmarks.mutants [--jobs 2] [--groups factors]

copies the checkout, changes one place in the copy as mutants.toml says, runs the tests that are about it, and prints a
table in Markdown (docs/mutants.md keeps one); status 1 when a mutant lives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import show

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One change: what it breaks, where, and which tests ought to see it."""

    what: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutants(groups: Sequence[str] = ()) -> list[Mutant]:
    """What mutants.toml says.

    Args:
        groups: of tests, by their names there; none: all.
    """
    told = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return [
        Mutant(**{**one, "tests": tuple(told["tests"][one["tests"]])})
        for one in told["mutant"]
        if not groups or one["tests"] in groups
    ]


def copy_checkout(folder: Path) -> None:
    """The files of the checkout that git knows or would take."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def passes(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether the tests pass in a copy, and the first that fails.

    Raises:
        SystemExit: they could not be run.
    """
    words = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "--tb=no", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"the tests could not be run:\n{done.stdout}{done.stderr}")
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return done.returncode == 0, failed[0].partition("::")[2].partition("[")[0] if failed else ""


def try_mutant(mutant: Mutant) -> tuple[bool, str]:
    """Whether a mutant lives, and the first test that fails."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        folder = Path(temporary)
        copy_checkout(folder)
        path = folder / mutant.path
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.what}: {mutant.path} has {text.count(mutant.old)} places {mutant.old!r}; need 1")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return passes(folder, mutant.tests)


def main(jobs: int = 2, groups: Sequence[str] = ()) -> bool:
    """Try all, or those of some groups of tests, and print the table; returns whether each was seen by a test."""
    mutants = read_mutants(groups)
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        copy_checkout(Path(temporary))
        healthy, failed = passes(Path(temporary), tuple(dict.fromkeys(test for one in mutants for test in one.tests)))
    if not healthy:
        raise SystemExit(f"{failed} fails without any change: no mutant could be told from that")
    print("| what is changed | in | seen by |\n|---|---|---|", flush=True)
    living = 0
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, (lives, test) in zip(mutants, pool.map(try_mutant, mutants), strict=True):
            living += lives
            print(f"| {mutant.what} | `{mutant.path}` | {'**nothing**' if lives else f'`{test}`'} |", flush=True)
    return show(
        f"formulas of training, {len(mutants)} changed by hand, one at a time",
        [("changes that no test sees", living, 0, "")],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--groups", nargs="*", default=(), help="of tests, as mutants.toml names them; default: all")
    told = parser.parse_args()
    raise SystemExit(0 if main(told.jobs, told.groups) else 1)
