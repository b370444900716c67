"""Copies of what is read of a remote cache, on a disk of this machine: within a limit, shared by processes and runs.

    DIR/<xx>/<part>.<offset>.<size>   the bytes of a member; its modification time is when it was last used
    DIR/<xx>/.<name>.<random>         one that is being written, already of its full size, locked by its writer
    DIR/used                          bytes of all of these
    DIR/lock  DIR/in_use              held for a moment by whoever changes them; shared by each process that reads

A part is named by the digest of its tar, so a name stands for the same bytes whatever URL they came from. A copy is
compared with the crc32 of its member at each read: it lies on a scratch disk, and is not flushed to it.

`used` is trusted while a process holds `in_use`; whoever finds it free counts the files first. Room is taken before a
byte is written, under the lock, so that the files never hold more than the limit, whoever writes or is killed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError
from shared.storage import FileLock

if TYPE_CHECKING:
    from shared.shards import Location

UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
}  # fmt: skip
ROOM = 10  # one part in so many of the limit is freed at a time: each time costs a look at every file

_FOLDER = re.compile(r"[0-9a-f]{2}")
_COPY = re.compile(r"[0-9a-f]{32}\.\d+\.\d+")
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.\d+\.\d+\.[0-9a-f]{8}")


def parse_size(text: str, flag: str = "--local_cache_size") -> int:
    """Bytes of `500MB`, `20GB`, `1.5TB`, `64GiB` or a plain number of bytes.

    Raises:
        ConfigError: it is none of these, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE | re.ASCII)
    size_bytes = int(float(match[1]) * UNITS[(match[2] or "").lower()]) if match else 0
    if size_bytes < 1:
        raise ConfigError(f"{flag} {text}; must be a size such as 500MB, 20GB or 1.5TB")
    return size_bytes


class LocalCache:
    """The copies in a folder of a local file system. Opened, and made, at its first use.

    Args:
        limit_bytes: that the copies may hold; where file systems round sizes up, that comes on top.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._opening = threading.Lock()
        self._in_use: FileLock | None = None

    def __getstate__(self) -> dict[str, Any]:  # spawned workers take locks of their own
        return {"folder": self._folder, "limit_bytes": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def open(self) -> None:
        """Make the folder, count what is in it when no other process has, and take it into use.

        Raises:
            ConfigError: it cannot be written to.
        """
        with self._opening, self._told():
            if self._in_use is not None:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                alone = FileLock(self._folder / "in_use")
                if alone.acquire():
                    self._make_room(0, count=True)
                    alone.release()
                in_use = FileLock(self._folder / "in_use", shared=True)
                taken = in_use.acquire()
                assert taken, "only who holds `lock` takes it alone"
                weakref.finalize(self, in_use.release)
                self._in_use = in_use

    def get(self, location: Location) -> bytes | None:
        """A member's bytes, if there is a copy of them; one that has changed is removed.

        Raises:
            ConfigError: the folder cannot be read or written to.
        """
        self.open()
        path = self._path(location)
        with self._told():
            try:
                payload = path.read_bytes()
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                payload = b""  # a sector of the disk is gone
            if len(payload) == location.size_bytes and zlib.crc32(payload) == location.crc32:
                with suppress(FileNotFoundError):  # evicted meanwhile
                    os.utime(path)
                return payload
            with self._locked():
                self._remove(path)
        return None

    def add(self, location: Location, payload: bytes) -> None:
        """Keep a copy of a member's bytes, which the caller has checked, where the limit and the disk have room for it.

        The least recently used ones make room. On a disk that others have filled a tenth of the limit is given back.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        self.open()
        with self._told():
            try:
                self._write(self._path(location), payload)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                with self._locked():
                    self._evict(self._used() - self._limit // ROOM)

    def _write(self, path: Path, payload: bytes) -> None:
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        writing = FileLock(unfinished)
        with self._locked():
            if path.exists() or not self._make_room(len(payload)):
                return
            path.parent.mkdir(exist_ok=True)
            writing.acquire()
            os.truncate(unfinished, len(payload))
            self._set_used(self._used() + len(payload))
        try:
            with unfinished.open("r+b") as file:
                file.write(payload)
            with self._locked():
                if path.exists():  # another process was faster
                    self._remove(unfinished)
                else:
                    unfinished.rename(path)
        except OSError:
            with self._locked():
                self._remove(unfinished)
            raise
        finally:
            writing.release()

    def _path(self, location: Location) -> Path:
        part = location.part
        return self._folder / part[:2] / f"{part}.{location.offset}.{location.size_bytes}"

    def _locked(self) -> FileLock:
        return FileLock(self._folder / "lock")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the disk refuses is a mistake of the flag's."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"--local_cache {self._folder}: {error}; give a folder of a local disk") from error

    # What follows is called by who holds the lock.

    def _used(self) -> int:
        return int((self._folder / "used").read_bytes())

    def _set_used(self, size_bytes: int) -> None:
        path = self._folder / "used"
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(b"%020d" % size_bytes)  # of one length: there is no instant at which it is empty

    def _remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self._set_used(max(0, self._used() - size))

    def _make_room(self, size: int, *, count: bool = False) -> bool:
        """Whether there is room for `size` more bytes, now that some was made where there was none."""
        if count:
            self._set_used(sum(size_bytes for _, size_bytes, _ in self._files()))
        if size <= self._limit < self._used() + size:
            self._evict(self._limit - max(size, self._limit // ROOM))
        return self._used() + size <= self._limit

    def _evict(self, goal: int) -> None:
        """Remove the least recently used copies until all files hold at most `goal` bytes."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used <= goal:
                break
            if not path.name.startswith("."):
                path.unlink()
                used -= size
        self._set_used(used)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Last use, size and path of each copy, and of each that is being written; those of the dead are removed."""
        for folder in self._folder.iterdir():
            if not _FOLDER.fullmatch(folder.name) or not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if _UNFINISHED.fullmatch(entry.name):
                        dead = FileLock(path)
                        if dead.acquire():
                            path.unlink()
                            dead.release()
                            continue
                    elif not _COPY.fullmatch(entry.name):
                        continue
                    told = entry.stat()
                    yield told.st_mtime_ns, told.st_size, path
