"""One way to print a figure beside its limit."""

from __future__ import annotations


def show(title: str, figures: list[tuple[str, float, float | None, str]]) -> bool:
    """Print figures; returns whether all are within their limits.

    Args:
        figures: name, value, the most that it may be (None: no limit) and unit.
    """
    print(f"\n{title}")
    within = True
    for name, value, limit, unit in figures:
        verdict = "" if limit is None else f"  limit {limit:g}{unit}  {'ok' if value <= limit else 'OVER'}"
        print(f"  {name:<58} {value:8.3f}{unit}{verdict}", flush=True)
        within &= limit is None or value <= limit
    return within
