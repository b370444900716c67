"""Every message of a mistake has its line in docs/troubleshooting.md, and every line there is of one that is told."""

from __future__ import annotations

import ast

from tests.messages import KINDS, _raised, listed, messages


def test_each_message_has_its_line_and_each_line_its_message():
    told, found = listed(), messages()
    for kind in KINDS:
        missing = found[kind] - set(told.get(kind, ()))
        gone = set(told.get(kind, ())) - found[kind]
        assert not missing, f"{kind}: run `python -m tests.messages`: {sorted(missing)}"
        assert not gone, f"{kind}: run `python -m tests.messages`: {sorted(gone)}"
    assert sum(map(len, found.values())) > 200  # they are found at all


def test_messages_are_read_whatever_they_are_built_of():
    tree = ast.parse(
        'raise ConfigError(f"--x {x}: " + ("low" if x else f"{a}\\n high"))\n'
        'e = errors.VideoError("too_short", f"{n} frames")\n'
        'raise ValueError("not a user\'s")'
    )
    assert sorted(_raised(tree)) == [
        ("ConfigError", "--x …: low"),
        ("ConfigError", "--x …: … high"),
        ("VideoError", "… frames"),
    ]
