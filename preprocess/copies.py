"""Copies of remote files on this machine, for as long as they are used and there is room."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import secrets
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.cache import dead_writers
from shared.errors import CacheError
from shared.storage import FileLock

COPY_BYTES = 8 << 30  # at most, beside the copies in use

# Fetches a URL to a path: is told how to make room for so many bytes, and what raises GivenUpError once nobody waits.
Fetch = Callable[[str, Path, Callable[[int], None], Callable[..., None]], tuple[int, int]]


class GivenUpError(Exception):
    """The copies were cleared while one was fetched."""


@dataclass
class Copy:
    """A file's copy.

    Attributes:
        status: of `files.status`, from just before it was fetched.
        digest: sha256 of its bytes, in hex.
        users: who hold it now.
        is_kept: it is to stay when nobody does.
    """

    path: Path
    size: int
    status: tuple[int, int]
    digest: str
    users: int = 0
    is_kept: bool = True


class Copies:
    """Copies by URL, each fetched once however many threads ask for it. The least recently used goes first."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._changed = threading.Condition()  # held over all that follows
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._fetching: dict[str, int] = {}  # bytes on their way, by URL
        self._held = 0  # bytes of the copies, and of those on their way
        self._numbers = itertools.count()
        self._folder: _Folder | None = None

    @contextmanager
    def use(self, url: str) -> Iterator[Copy]:
        """The copy of a file, which stays as long as the context.

        Raises:
            GivenUpError: cleared meanwhile.
            OSError, CacheError: of the fetch.
        """
        copy = self._take(url)
        try:
            yield copy
        finally:
            with self._changed:
                copy.users -= 1
                self._make_room()
                if not copy.users and not copy.is_kept:
                    copy.path.unlink(missing_ok=True)

    def drop_other(self, url: str, status: tuple[int, int]) -> None:
        """Let go of the copy of a file that now has another status."""
        with self._changed:
            if url in self._copies and self._copies[url].status != status:
                self._drop(url)

    def clear(self) -> None:
        """Remove all copies, those in use when they are let go of, and the folder."""
        with self._changed:
            folder, self._folder = self._folder, None
            for url in list(self._copies):
                self._drop(url)
        if folder:
            folder.remove()

    def _take(self, url: str) -> Copy:
        with self._changed:
            while url in self._fetching:
                self._changed.wait()
            if url in self._copies:
                self._copies.move_to_end(url)
                self._copies[url].users += 1
                return self._copies[url]
            self._folder = folder = self._folder or _Folder()
            self._fetching[url] = 0
        copy: Copy | None = None
        try:
            copy = self._fetched(url, folder)
        finally:
            with self._changed:
                self._held -= self._fetching.pop(url)
                if copy and folder is self._folder:
                    self._copies[url] = copy
                    self._held += copy.size
                elif copy:
                    copy.is_kept = False
                self._changed.notify_all()
        return copy

    def _fetched(self, url: str, folder: _Folder) -> Copy:
        def check_wanted(*_: object) -> None:
            if folder is not self._folder:
                raise GivenUpError

        def make_room(size: int) -> None:
            with self._changed:
                self._held += size - self._fetching[url]
                self._fetching[url] = size
                self._make_room()

        suffix = re.search(r"\.\w{1,8}$", url)  # FFmpeg looks at it too
        path = folder.path / f"{next(self._numbers)}{suffix[0] if suffix else ''}"
        unfinished = path.with_name(f"{path.name}.tmp")
        try:
            status = self._fetch(url, unfinished, make_room, check_wanted)
            with unfinished.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = unfinished.stat().st_size
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return Copy(path, size, status, digest, users=1)

    def _make_room(self) -> None:
        """Remove copies that nobody uses until the others, and what is being fetched, are within the bound."""
        limit = self._folder.limit if self._folder else 0
        while self._held > limit:
            unused = next((url for url, copy in self._copies.items() if not copy.users), None)
            if unused is None:
                return
            self._drop(unused)

    def _drop(self, url: str) -> None:
        copy = self._copies.pop(url)
        copy.is_kept = False
        self._held -= copy.size
        if not copy.users:
            copy.path.unlink(missing_ok=True)


class _Folder:
    """A folder of this process's own; those of dead processes are removed on the way."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir(), f"latentreel-videos-{os.getuid()}")
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.stat().st_uid != os.getuid():
            raise CacheError(f"{parent}: belongs to another user; set TMPDIR to a folder of your own")
        for dead in dead_writers(parent):
            shutil.rmtree(dead, ignore_errors=True)
        unnamed = Path(tempfile.mkdtemp(prefix=".", dir=parent))
        self._lock = FileLock(unnamed / "lock")
        self._lock.acquire()
        self.path = unnamed.rename(parent / f"{os.getpid()}-{secrets.token_hex(4)}")
        self.limit = min(COPY_BYTES, shutil.disk_usage(self.path).free // 2)
        self._end = weakref.finalize(self, functools.partial(shutil.rmtree, self.path, ignore_errors=True))

    def remove(self) -> None:
        """Remove it with all that is in it."""
        self._end()
        self._lock.release()
