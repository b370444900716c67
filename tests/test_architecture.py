"""The rule of imports, and what every module of the house owes to a stranger."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

STAGES = ("preprocess", "train", "infer")
PACKAGES = (*STAGES, "shared")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))


def imported(path):
    """The top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").partition(".")[0]


def test_the_house_has_its_rooms():
    assert {path.parent.name for path in MODULES} == set(PACKAGES)
    assert len(MODULES) > 25


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_stages_import_shared_and_themselves_only(path):
    others = set(STAGES) - {path.parent.name}
    assert not others & set(imported(path))
    assert "tests" not in set(imported(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_modules_and_public_names_say_what_they_are(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_pickled_and_no_shell_is_run(path):
    text = path.read_text(encoding="utf-8")
    for word in ("import pickle", "torch.load(", "torch.save(", "allow_pickle=True", "shell=True", "os.system"):
        assert word not in text


@pytest.mark.parametrize("stage", STAGES)
def test_help_and_typos_load_no_torch(stage):
    code = (
        "import sys\n"
        f"from {stage}.__main__ import main\n"
        "for argv in (['--help'], ['--no_such_flag']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: print(end.code, file=sys.stderr)\n"
        "assert not {'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line in "012"] == ["0", "2"]
