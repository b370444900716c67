"""The files of videos and manifests, on this machine or behind a URL: have they changed, their digest, a local copy.

`preprocess/sources.py` asks here in place of Path.stat and hashlib, with the same words for a local path and a URL:

    status(path)    -> (size, stamp), to compare with what is remembered; an OSError as Path.stat raises it
    statuses(paths) -> the same for many: URLs several at a time, in order
    digest(path)    -> sha256 in hex; an OSError where it cannot be read or fetched

`preprocess/decode.py` opens videos with `local(path)`: a decoder needs a real file. What fails there by the network is
a FetchError, which is never remembered against the video. A fetch is tried again as `shared/remote.py` does it.

A URL is fetched once for its digest, its probe and its frames while its copy stays: the copies are in a folder of this
process's own below $TMPDIR, COPY_BYTES at most (or half of what is free there) beside those in use, the least recently
used goes first. `forget_copies` ends that, as a DecodePool does when it is left.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from preprocess.copies import Copies, GivenUpError
from shared.errors import CacheError, ConfigError, VideoError
from shared.remote import Remote, check_url, status_of

Status = tuple[int, int]  # bytes; nanoseconds since 1970, of a URL a digest of what the store tells beside the size

IN_FLIGHT = 16  # requests for a status at a time
SCHEMES = {
    "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf", "http", "https", "ftp", "sftp", "ssh", "smb",
    "hdfs", "webhdfs", "webdav", "webdavs", "memory",
}  # fmt: skip
# What stores tell of a file's version, by fsspec's names: all of these that are there make the stamp.
VERSION_FACTS = (
    "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "crc32c", "generation", "blob_id", "LastModified",
    "Last-Modified", "last_modified", "mtime", "updated", "modified", "created",
)  # fmt: skip

_URL = re.compile(r"\s*[\w+.:-]+://")

T = TypeVar("T")


class FetchError(VideoError):
    """A video behind a URL that could not be fetched: nothing that is to be remembered of the video."""

    def __init__(self, detail: str) -> None:
        super().__init__("unreadable", detail)


def is_url(path: str) -> bool:
    """Whether this is meant as a URL, be it one that `check` refuses."""
    return _URL.match(path) is not None


def check(url: str) -> str:
    """A URL as it is opened: of a store that others hold, without credentials, and naming what it seems to name.

    Raises:
        ConfigError: it is not.
    """
    check_url(url)
    scheme, _, rest = url.partition("://")
    scheme = scheme.strip().lower()
    if scheme == "file":
        raise ConfigError("file://...: is on this machine; write the plain path")
    if scheme not in SCHEMES:
        raise ConfigError(f"{scheme}://...: is no store that videos are read from; give s3://, https://, hf://, ...")
    checked = f"{scheme}://{rest.strip()}"
    check_url(checked)
    if not rest.strip(" /"):
        raise ConfigError(f"{checked}: names nothing; write the whole URL")
    names = unquote(rest).split("/") if scheme.startswith(("http", "web")) else rest.split("/")
    if ".." in names:
        raise ConfigError(f"{checked}: holds '..'; write the URL without")
    return checked


def below(folder: str, name: str) -> str | None:
    """The URL of a relative path below a folder's URL; None where it leaves the folder."""
    path = posixpath.normpath(name)
    if path.startswith(("/", "../")) or path in ("..", "."):
        return None
    return f"{folder.rstrip('/')}/{path}"


def status(path: str) -> Status:
    """Size and stamp of a file, which stay the same as long as the file does.

    The stamp of a local file is its modification time; of a URL a digest of its ETag, modification time and the like.
    Where a server tells none of them, or no size, the file is fetched and its content's digest is the stamp: a run
    fetches such a video even when it is known.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be told; `strerror` says why.
        CacheError: there is no room for its copy.
    """
    if not is_url(path):
        stat = Path(path).stat()
        return stat.st_size, stat.st_mtime_ns
    size, stamp = _told(path)
    if size is not None and stamp is not None:
        _COPIES.drop_other(path, (size, stamp))
        return size, stamp
    with _COPIES.use(path) as copy:
        return copy.status


def statuses(paths: Iterable[str]) -> Iterator[tuple[str, Status | OSError]]:
    """Each path with its status, or the OSError that `status` raises; in order, of URLs IN_FLIGHT at a time."""
    threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="status")
    waiting: deque[tuple[str, Future[Status | OSError]]] = deque()
    try:
        for path in paths:
            if is_url(path) or waiting:
                waiting.append((path, threads.submit(_status_or_error, path)))
                if len(waiting) >= IN_FLIGHT:
                    first, future = waiting.popleft()
                    yield first, future.result()
            else:
                yield path, _status_or_error(path)
        for path, future in waiting:
            yield path, future.result()
    finally:
        threads.shutdown(cancel_futures=True)


def _status_or_error(path: str) -> Status | OSError:
    try:
        return status(path)
    except OSError as error:
        return error


def digest(path: str) -> str:
    """The sha256 of a file's bytes, in hex.

    Raises:
        OSError: it cannot be read or fetched; `strerror` says why.
        CacheError: there is no room for its copy.
    """
    if is_url(path):
        with _COPIES.use(path) as copy:
            return copy.digest
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def local(path: str) -> Iterator[str]:
    """The absolute path of a file on this machine with these bytes, which stays as long as the context.

    Raises:
        FetchError: it cannot be fetched.
        CacheError: there is no room for its copy.
    """
    if not is_url(path):
        yield str(Path(path).absolute())
        return
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(_COPIES.use(path))
        except OSError as error:
            raise FetchError(f"{error.strerror or error}") from error
        yield str(copy.path)


def fetch(url: str, target: Path) -> None:
    """Copy a file from a URL to a local path.

    Raises:
        OSError: it cannot be fetched; `strerror` says why.
    """
    _ask(url, lambda system, full: system.get_file(full, str(target)))


def forget_copies() -> None:
    """Remove the copies and their folder; what is being fetched is given up."""
    _COPIES.clear()


def _fetch_copy(url: str, target: Path, make_room: Callable[[int], None], check_wanted: Callable[..., None]) -> Status:
    """Fetch a URL for its copy; returns the status that it had just before."""
    from fsspec.callbacks import Callback

    class Watch(Callback):
        def relative_update(self, inc: int = 1) -> None:
            check_wanted()

    def get(system: Any, full: str) -> None:
        check_wanted()
        system.get_file(full, str(target), callback=Watch())
        held = target.stat().st_size
        if size is not None and held != size:
            raise ConnectionError(f"{held} of its {size} bytes came")

    size, stamp = _told(url)
    make_room(size or 0)
    _ask(url, get)
    held = target.stat().st_size
    if size is not None and stamp is not None:
        return size, stamp
    with target.open("rb") as file:
        return held, _stamp(hashlib.file_digest(file, "sha256").hexdigest())


def _told(url: str) -> tuple[int | None, int | None]:
    """The size of a file behind a URL and a stamp of its version, as far as they are told."""
    facts = _ask(url, _info)
    if facts.get("type") == "directory":
        raise FileNotFoundError(errno.ENOENT, "is a folder", url)
    told = [[name, str(facts[name])] for name in VERSION_FACTS if facts.get(name) is not None]
    return facts.get("size"), _stamp(told) if told else None


def _info(system: Any, path: str) -> dict[str, Any]:
    try:
        return dict(system.info(path))
    except FileNotFoundError as error:  # fsspec says so of HTTP whatever has happened
        cause = error.__cause__
        if isinstance(cause, Exception) and status_of(cause) not in (404, 410) and "aiohttp" in type(cause).__module__:
            raise cause from None
        raise


def _stamp(told: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(told).encode()).digest()[:8]) >> 1  # a column of int64 holds it


def _ask(url: str, operation: Callable[[Any, str], T]) -> T:
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    try:
        return _remote(f"{scheme}://{host}").ask(path, operation)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file", url) from error
    except CacheError as error:
        cause = error.__cause__
        if isinstance(cause, GivenUpError):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(f"no room for a copy of {url} ({cause.strerror}); set TMPDIR to a larger disk") from error
        raise OSError(errno.EREMOTEIO, str(error).removeprefix(f"{url}: "), url) from error


@functools.lru_cache(64)
def _remote(base: str) -> Remote:
    return Remote(base)


_COPIES = Copies(_fetch_copy)
