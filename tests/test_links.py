"""The pages of the house lead to each other: no link is dead, and each page is reached from the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.documented import PAGES

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/.<-])(?:docs/)?(\w+\.md)\b")  # a page that is named without a link, as in the tree
PATH = re.compile(r"`((?:shared|preprocess|train|infer|tests|benchmarks|configs|docs)/[\w./-]+)`")


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def local_links(page: Path) -> list[tuple[Path, str]]:
    """The files that a page links to, each with its anchor."""
    found = [link.partition("#") for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    return [(page.parent / file if file else page, anchor) for file, _, anchor in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead_and_no_path_is_gone(page):
    for file, anchor in local_links(page):
        assert file.is_file(), file
        assert not anchor or anchor in anchors(file), f"{file}#{anchor}"
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_readmes_tree_or_a_link_of_it():
    """A page names others by their file names; those that a run writes, such as a card, are no pages."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {file.name for file, _ in local_links(ROOT / "README.md")} | set(NAMED.findall(readme))
    assert {page.name for page in PAGES} - {"README.md"} <= told


def test_the_tree_names_what_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^## The house\n\n((?:    .*\n)+)", readme, re.MULTILINE)
    folders = re.findall(r"^    (\w+)/ ", tree, re.MULTILINE)
    assert all((ROOT / name).is_dir() for name in folders), folders
    assert {path.parent.name for path in ROOT.glob("*/*.py")} <= set(folders)
    for page in re.findall(r"docs/\w+\.md", tree):
        assert (ROOT / page).is_file(), page
