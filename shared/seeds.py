"""Seeds of generators: a function of what the draw is for, never of what was drawn before.

So a draw is the same on one rank or eight, in whatever worker, after a resume or without one.
"""

from __future__ import annotations

import hashlib


def seed_for(*facts: int | str) -> int:
    """A seed of 63 bits from (seed, step, place in the global batch, purpose), or whatever tells draws apart."""
    text = "/".join(str(fact) for fact in facts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
