"""Where the files that a manifest names may lie: below its root, and nowhere else unless the user says so.

A root is a folder of this machine or a URL. A manifest may also name videos by URLs of their own, of stores that others
hold (`files.SCHEMES`): what it reaches on this machine stays below the root.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from preprocess import files
from shared.errors import ConfigError, ManifestError

_COMMAND = re.compile(r"\s*(pipe|exec|shell):", re.IGNORECASE)


class DataRoot:
    """The folders, or the URLs of folders, that a manifest's paths must stay in; relative ones start from the first.

    A snapshot of the hub's cache is made of links to its `blobs` folder: those may be followed.
    """

    def __init__(self, *roots: str | Path, follow_links: bool) -> None:
        first = str(roots[0])
        self._url = files.check(first).rstrip("/") if files.is_url(first) else None
        folders = [Path(root) for root in roots if not files.is_url(str(root))]
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
        """The absolute path of a file, with links left in it, and its path below the root.

        Of a URL both are the URL, or its path below the root; whether there is such a file is not asked here: stage 1
        asks for many at a time when it learns of its videos.
        """
        if not isinstance(name, str) or not name:
            raise ManifestError(f"{origin}: the video {name!r} is not a path; write one, or remove the clip")
        if _COMMAND.match(name):
            scheme = name.partition(":")[0].strip()
            raise ManifestError(f"{origin}: {scheme}:... is a command; name the file, or a plain URL")
        if files.is_url(name) or (self._url and (name[0] != "/" or not self._folders)):
            return self._remote(origin, name)
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

    def _remote(self, origin: str, name: str) -> tuple[str, str]:
        try:
            if files.is_url(name):
                url = files.check(name)
                return url, url
            assert self._url
            joined = files.below(self._url, name)
            if joined is None:
                raise ManifestError(f"{origin}: {name!r} leaves the data root {self._url}; use a path below it")
            url = files.check(joined)
        except ConfigError as error:
            raise ManifestError(f"{origin}: {error}") from error
        return url, url.removeprefix(f"{self._url}/")


def _repository(folder: str) -> str | None:
    """The folder above `snapshots/<revision>`, where the folder is in a snapshot of the hub's cache."""
    match = re.fullmatch(r"(.*)/snapshots/[^/]+(/.*)?", folder)
    return match[1] if match else None
