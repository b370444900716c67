"""A configuration that tests/test_help.py reads; its source must be a file's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Early:
    """A field stands before the first heading."""

    rank: int = 4
    """Rank."""

    SIZES: ClassVar[str] = "Sizes"

    height: int = 16
    """Height."""
