"""What a check of this machine finds, in words that a user can act on."""

from __future__ import annotations

from dataclasses import dataclass

FAULTS = ("missing", "wrong")  # the statuses of what must be mended


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        status: `ok`; `note`, nothing that must be mended; `missing` or `wrong`, which must.
        mend: a command for what is missing or wrong.
    """

    name: str
    status: str
    detail: str
    mend: str | None = None


def import_status(error: ImportError) -> str:
    """`missing` for a package that is not there, `wrong` for one that is and cannot be imported."""
    return "missing" if isinstance(error, ModuleNotFoundError) else "wrong"


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
