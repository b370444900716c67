"""A folder of files, on this machine or behind any fsspec URL, and what makes writing to it safe.

What exists under its final name is complete: a file is written elsewhere, flushed to the disk, and renamed (local) or
put in one piece (remote: `shared/remote.py`).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from shared.errors import CacheError
from shared.remote import Remote, check_url, status_of

OPEN_FILES = 64  # file descriptors that one reader keeps open


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8; NaN is refused. Digests are taken of this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any, size: int = 32) -> bytes:
    """The first `size` bytes of the sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).digest()[:size]


def fsync_folder(folder: Path) -> None:
    """Make the names in a local folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a local file so that it is either the old one or complete."""
    with open_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A local file to write, which takes its name when the block has ended well: the old one, or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


class FileLock:
    """A lock that the operating system frees when its process dies. Local file systems only.

    Args:
        shared: many may hold it together, none beside one who holds it exclusively.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting; False when another process holds it."""
        file = self.path.open("ab")
        try:
            fcntl.flock(file, self._kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Free the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> FileLock:
        """Wait for the lock and take it."""
        self._file = self.path.open("ab")
        fcntl.flock(self._file, self._kind)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _OpenFile:
    """A descriptor that is closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Storage:
    """A root folder; paths are relative to it, with `/` between names.

    Args:
        url: a local path, or any URL that fsspec opens (`s3://bucket/prefix`).
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.is_local = "://" not in url or url.startswith("file://")
        path = Path(url.removeprefix("file://")).expanduser()
        self.url = str(path.resolve()) if self.is_local else url.rstrip("/")
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:  # spawned workers open their own files
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    @functools.cached_property
    def _remote(self) -> Remote:
        return Remote(self.url)

    def local(self, path: str = "") -> Path:
        """The path on this machine. Only for local storage."""
        assert self.is_local, self.url
        return Path(self.url, path)

    def full(self, path: str) -> str:
        """The path as a user would write it, for messages."""
        return f"{self.url}/{path}" if path else self.url

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        if self.is_local:
            return self.local(path).exists()
        return self._remote.ask(path, lambda system, full: bool(system.exists(full)))

    def names(self, path: str) -> list[str]:
        """The sorted names in a folder; none when it does not exist."""
        if self.is_local:
            folder = self.local(path)
            return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        try:
            return self._remote.ask(path, _list)
        except FileNotFoundError:
            return []

    def size(self, path: str) -> int:
        """Bytes of a file."""
        if self.is_local:
            return self.local(path).stat().st_size
        return self._remote.ask(path, lambda system, full: int(system.size(full)))

    def modified(self, path: str) -> float:
        """When a file was last written: seconds since 1970."""
        if self.is_local:
            return self.local(path).stat().st_mtime
        return self._remote.ask(path, lambda system, full: float(system.modified(full).timestamp()))

    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self.is_local:
            return self.local(path).read_bytes()
        return self._remote.ask(path, lambda system, full: bytes(system.cat_file(full)))

    def read_range(self, path: str, offset: int, size_bytes: int) -> bytes:
        """`size_bytes` bytes of a file from `offset` on.

        Raises:
            FileNotFoundError: it is not there.
            CacheError: it is shorter.
        """
        data = b""
        if offset < 0 or size_bytes < 0:
            pass  # of a hostile index; fsspec would count from the end
        elif self.is_local:
            file = self._open_file(path)
            held = os.fstat(file.descriptor).st_size - offset  # pread sets aside what it is asked for, petabytes too
            data = os.pread(file.descriptor, min(size_bytes, held), offset) if held > 0 else b""
        else:
            data = self._remote.ask(path, lambda system, full: _cut(system, full, offset, size_bytes))
        if len(data) != size_bytes:
            raise CacheError(
                f"{self.full(path)}: holds {len(data)} of the {size_bytes} bytes at {offset} that its index "
                f"promises; run `python -m preprocess.verify {self.url} --repair`"
            )
        return data

    def publish(self, finished: Path, path: str) -> None:
        """Move a finished local file, already flushed to the disk, to its final name. An existing file is replaced."""
        if self.is_local:
            target = self.local(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            finished.replace(target)
            fsync_folder(target.parent)
            self._forget(path)
        else:
            self._remote.put(finished, path)
            finished.unlink()

    def write(self, path: str, data: bytes, writer: Path) -> None:
        """Write a small file atomically, by way of the writer's folder: nothing unfinished is anywhere else."""
        finished = writer / path.rpartition("/")[2]
        write_atomically(finished, data)
        self.publish(finished, path)

    def remove(self, path: str) -> None:
        """Remove a file, for good before this returns; one that is not there any more is no mistake."""
        if self.is_local:
            target = self.local(path)
            target.unlink(missing_ok=True)
            if target.parent.is_dir():
                fsync_folder(target.parent)
            self._forget(path)
            return
        with suppress(FileNotFoundError):
            self._remote.ask(path, lambda system, full: system.rm_file(full))

    def _forget(self, path: str) -> None:
        """Let go of the descriptor of a file that was replaced or removed: it still shows the old one."""
        with self._lock:
            self._open.pop(path, None)

    def _open_file(self, path: str) -> _OpenFile:
        """An open file; the least recently used one is let go when there are too many."""
        with self._lock:
            file = self._open.pop(path, None) or _OpenFile(self.local(path))
            self._open[path] = file
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            return file


def _list(system: Any, folder: str) -> list[str]:
    """The sorted names in a remote folder; an object that stands for the folder itself is not in it."""
    found = (str(name).rstrip("/") for name in system.ls(folder, detail=False))
    return sorted(name.rpartition("/")[2] for name in found if name.strip("/") != folder.strip("/"))


def _cut(system: Any, path: str, offset: int, size_bytes: int) -> bytes:
    """A range of a remote file, or what it holds of it."""
    if not size_bytes:
        return b""  # HTTP has no empty range
    try:
        return bytes(system.cat_file(path, start=offset, end=offset + size_bytes))
    except OSError as error:
        if status_of(error) == 416:  # it starts behind the end
            return b""
        raise
