"""A journal: a file of JSON objects, a line each, that a killed process leaves whole but for its last line.

What was appended is on the disk before `append` returns. One process at a time may have a journal.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from shared.errors import ManifestError
from shared.storage import canonical_json, fsync_folder


class Journal:
    """An open journal, made where there is none; a last line that was torn is cut off. Closed empty, it is removed.

    Attributes:
        entries: what stood in it when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _locked(path)
        try:
            self.entries = self._whole_lines()
        except BaseException:
            self._file.close()
            raise
        fsync_folder(path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file.tell() == 0:  # it tells nothing
            self.remove()
        self._file.close()

    def append(self, *entries: dict[str, Any]) -> None:
        """Add entries, for good before this returns.

        Raises:
            ManifestError: the disk is full, or fails.
        """
        try:
            self._file.write(b"".join(canonical_json(entry) + b"\n" for entry in entries))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            way = "make room and run the same command again: what it has stays"
            raise ManifestError(f"{self.path}: cannot be written ({error.strerror}); {way}") from error

    def remove(self) -> None:
        """Remove the file: what it tells is elsewhere now."""
        if self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            self.path.unlink()
            fsync_folder(self.path.parent)

    def _whole_lines(self) -> list[dict[str, Any]]:
        entries, end = [], 0
        data = self._file.read()
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                if number < len(lines):
                    raise ManifestError(f"{self.path}:{number}: is not as it was written; remove that line")
                break  # torn: its append had not returned
            entries.append(entry)
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)
        return entries


def _locked(path: Path) -> BinaryIO:
    """The file, opened by this process alone."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.seek(0)
                return file
        except BlockingIOError as error:
            file.close()
            raise ManifestError(f"{path}: another process writes it; wait until it is done, or end it") from error
        file.close()  # removed by the process that had it, between the two: the next one is new
