"""Digests of large files, computed once and remembered by (path, size, modification time).

The memory is a folder of small JSON files in the user's cache folder (`$XDG_CACHE_HOME/latentreel/digests`, else
`~/.cache/...`): facts about this machine's files do not belong into a cache that travels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from shared.storage import write_atomically


def file_digest(path: Path, *, rehash: bool = False) -> str:
    """sha256 of a file's bytes, hex.

    Args:
        rehash: trust neither the hub's name for the file nor the memory; read it.
    """
    known = None if rehash else known_digest(path)
    if known is not None:
        return known
    target = path.resolve()
    facts = _facts(target)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    memory = _memory(target)
    with suppress(OSError):  # a home that cannot be written to costs time, not the run
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({**facts, "sha256": digest}))
    return digest


def known_digest(path: Path) -> str | None:
    """sha256 of a file where it costs nothing: by the name that the hub's cache gives it, or remembered; else None."""
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    try:
        remembered = json.loads(_memory(target).read_text(encoding="utf-8"))
        facts = _facts(target)
    except (OSError, ValueError):
        return None
    known = isinstance(remembered, dict) and all(remembered.get(name) == value for name, value in facts.items())
    return remembered.get("sha256") if known else None


def _facts(target: Path) -> dict[str, str | int]:
    stat = target.stat()
    return {"path": str(target), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _memory(target: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentreel" / "digests"
    return folder / f"{hashlib.sha256(str(target).encode()).hexdigest()[:32]}.json"
