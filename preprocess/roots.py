"""Where the files that a manifest names may lie: below its root, and nowhere else unless the user says so."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from shared.errors import ManifestError

_URL = re.compile(r"\s*(pipe:|[\w+.:-]+://)", re.IGNORECASE)


class DataRoot:
    """The folders that a manifest's paths must stay in; relative ones start from the first.

    A snapshot of the hub's cache is made of links to its `blobs` folder: those may be followed.
    """

    def __init__(self, *folders: Path, follow_links: bool) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise ManifestError(f"{folder}: is no folder; --instance_data_root must be that of the videos")
        real = [str(folder.resolve()) for folder in folders]
        given = [os.path.normpath(folder.absolute()) for folder in folders]
        blobs = [f"{repository}/blobs" for repository in map(_repository, real) if repository]
        self._folders = [folder.rstrip("/") + "/" for folder in given + real]
        self._allowed = tuple(folder.rstrip("/") + "/" for folder in real + blobs)
        self._follow_links = follow_links
        self._real: dict[str, str] = {}  # by folder: a video costs one system call, not one a folder above it

    def file(self, origin: str, name: object) -> tuple[str, str]:
        """The absolute path of a file, with links left in it, and its path below the root."""
        if not isinstance(name, str) or not name:
            raise ManifestError(f"{origin}: the video {name!r} is not a path; write one, or remove the clip")
        if _URL.match(name):
            raise ManifestError(f"{origin}: {name!r} is a URL or a command; fetch the video and name the file")
        path = os.path.normpath(name if name[0] == "/" else self._folders[0] + name)
        folder = next((folder for folder in self._folders if path.startswith(folder)), None)
        if folder is None:
            raise ManifestError(f"{origin}: {name!r} leaves the data root {self._folders[0]}; use a path below it")
        above, base = os.path.split(path)
        try:
            if above not in self._real:
                self._real[above] = os.path.realpath(above)
            real = f"{self._real[above]}/{base}"
            status = os.lstat(real)
            if stat.S_ISLNK(status.st_mode):
                real = os.path.realpath(real)
                status = Path(real).stat()
            found = stat.S_ISREG(status.st_mode)
        except (OSError, ValueError):  # ValueError: a NUL or half a surrogate pair
            found = False
        if not found:
            raise ManifestError(f"{origin}: there is no file {path!r}; correct the line, or give --instance_data_root")
        if not self._follow_links and not real.startswith(self._allowed):
            way = f"{name!r} leads out of the data root {folder} by a link, to {real!r}"
            raise ManifestError(f"{origin}: {way}; copy the file, or give --follow_links")
        return path, path.removeprefix(folder)


def _repository(folder: str) -> str | None:
    """The folder above `snapshots/<revision>`, where the folder is in a snapshot of the hub's cache."""
    match = re.fullmatch(r"(.*)/snapshots/[^/]+(/.*)?", folder)
    return match[1] if match else None
