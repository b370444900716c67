"""Every message that a mistake of a user's is told in, read from the source: what docs/troubleshooting.md must hold.

`python -m tests.messages` brings the lists below the page's headings up to date.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from shared import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
STAGES = ("preprocess", "train", "infer", "shared")
KINDS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.UserError) and value is not errors.UserError
}
HOLE = "…"  # in place of what is known when it is told


def messages() -> dict[str, set[str]]:
    """The messages of each kind of mistake, with HOLE for each value."""
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for stage in STAGES:
        for path in sorted((ROOT / stage).rglob("*.py")):
            for kind, message in _raised(ast.parse(path.read_text(encoding="utf-8"))):
                if re.search(r"[a-z]{3}", message):  # else it is another's words, passed on
                    found[kind].add(message)
    return found


def _raised(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The kind and message of each mistake that is made in a module, raised there or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in KINDS:
                for message in _texts(node.args[-1]):
                    yield name, message


def _texts(node: ast.expr) -> list[str]:
    """What an expression may read as."""
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _texts(node.left) for right in _texts(node.right)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [_one_line(node.value)]
    if isinstance(node, ast.JoinedStr):
        return [_one_line("".join(p.value if isinstance(p, ast.Constant) else HOLE for p in node.values))]  # type: ignore[misc]
    return [HOLE]


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def listed() -> dict[str, list[str]]:
    """The messages that the page holds, by kind: the fenced lines below the heading that names it."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^## [^\n]*\((\w+Error)\)$(?:(?!^## ).)*?^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return {kind: lines.splitlines() for kind, lines in found}


def main() -> None:
    """Bring the lists of the page up to date."""
    text = PAGE.read_text(encoding="utf-8")
    for kind, told in messages().items():
        lines = "".join(f"{message}\n" for message in sorted(told, key=_order))
        text = re.sub(
            rf"(^## [^\n]*\({kind}\)$(?:(?!^## ).)*?^```text\n).*?(^```$)",
            lambda match, lines=lines: match[1] + lines + match[2],  # type: ignore[misc]
            text,
            count=1,
            flags=re.DOTALL | re.MULTILINE,
        )
    PAGE.write_text(text, encoding="utf-8")


def _order(message: str) -> tuple[str, str]:
    return message.lstrip(f"{HOLE}:-/. ").lower(), message


if __name__ == "__main__":
    main()
