"""A folder behind a URL, reached through fsspec: which URLs are taken, and an operation that a bad network may disturb.

Credentials come from the environment, as each file system reads them itself; none is in a URL, so none is in a file or
a message of ours. What fails for the moment is tried again, here and nowhere else; what fails for good is one line.
"""

from __future__ import annotations

import errno
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigError, NetworkError

RETRY_SECONDS = (0.5, 1, 2, 4, 8, 16)  # pauses between tries, half as much again or less at random
UPLOAD_PART_BYTES = 16 << 20  # larger files go up in parts of this size, each tried again by itself
CONNECTIONS = 64  # of a process to one S3 at a time; botocore's own 10 would hold up readers that read ahead
UPLOADS = 4  # parts on their way at a time: what a writer holds in memory of a file
MOST_PARTS = 10_000  # that S3 takes for one object
PUT_IS_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf", "memory"}  # seen when whole
TRANSIENT_STATUS = {408, 425, 429}  # of HTTP; and all from 500 on
TRANSIENT_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}  # S3 says 400 to them
TRANSIENT_ERRNO = {
    errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
# Of Python, botocore, aiohttp and requests: known by name, as a cache may be reached without any of the latter.
TRANSIENT_CLASSES = {
    "ConnectionError", "TimeoutError", "HTTPClientError", "IncompleteRead", "IncompleteReadError",
    "ResponseStreamingError", "ResponseParserError", "ClientConnectionError", "ClientPayloadError",
}  # fmt: skip

_WITH_USER = re.compile(r"://[^@\s]*@")
_WITH_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")

T = TypeVar("T")


def check_url(url: str) -> None:
    """Refuse what fsspec or webdataset would run or chain (`pipe:`, `a::b`), and URLs that hold credentials."""
    scheme, is_url, rest = url.partition("://")
    if "::" in url or (scheme if is_url else url.partition(":")[0]).strip().lower() in {"pipe", "exec", "shell"}:
        shown = _WITH_USER.sub("://...@", url).partition("?")[0]
        raise ConfigError(f"{shown}: commands and chained URLs are refused; give a folder or a plain URL")
    if not is_url or scheme == "file":
        return
    host = rest.partition("/")[0]
    user, at, _ = host.rpartition("@")
    password = ":" in user or (at and scheme in ("s3", "s3a", "http", "https"))
    password = password or not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?|arn:.*", host.rpartition("@")[2])  # `KEY:a/b@`
    if password or "?" in rest or "#" in rest:
        raise ConfigError(
            f"{scheme}://...: credentials and queries are refused in a URL; credentials come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE, ...), see docs/s3.md"
        )


class Remote:
    """A folder behind a URL. Opened at its first use.

    Args:
        url: without a slash at its end.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # late: local caches do not need it

        self.url = url
        protocol = url.partition("://")[0]
        # listings are not kept: other processes publish too
        options: dict[str, Any] = {"use_listings_cache": False}
        self._is_s3 = protocol in ("s3", "s3a")
        if self._is_s3:
            # botocore's own tries, times those of s3fs, times ours, would keep a wrong endpoint from being told
            own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
            settings = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}
            settings |= {"max_pool_connections": CONNECTIONS, **own}
            options |= {"config_kwargs": settings, "max_concurrency": UPLOADS}
        elif protocol in ("http", "https"):
            options |= {"client_kwargs": {"trust_env": True}, "get_client": _http_client}
        try:
            self._system, self._root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:  # the protocol's package is missing, or there is no such protocol
            hint = "; run `pip install '.[s3]' -c constraints.txt` in the checkout" if self._is_s3 else ""
            raise ConfigError(f"{url}: cannot be opened: {error}{hint}") from error
        self.put_is_atomic = protocol in PUT_IS_ATOMIC

    def ask(self, path: str, operation: Callable[[Any, str], T], *, writing: bool = False) -> T:
        """What an operation on a path gives; tried again, with growing pauses, while its failure may pass by itself.

        Args:
            operation: takes the fsspec file system and the full path; doing it twice must do no harm.

        Raises:
            FileNotFoundError: there is no such path, and nothing is written.
            NetworkError: it failed for good, or too often.
        """
        for pause in (*RETRY_SECONDS, None):
            try:
                return operation(self._system, f"{self._root}/{path}" if path else self._root)
            except Exception as error:  # each file system has classes of its own, which cannot be named here
                if isinstance(error, FileNotFoundError) and not writing:
                    raise
                if type(error).__module__ == "builtins" and not isinstance(error, OSError):
                    raise  # a defect of ours
                if pause is None or not is_transient(error):
                    raise NetworkError(self._told(path, error, tries=len(RETRY_SECONDS) + 1)) from error
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))  # many writers do not come back at once
        raise AssertionError("the last pause is None")

    def _told(self, path: str, error: Exception, tries: int) -> str:
        where = f"{self.url}/{path}" if path else self.url
        what = _WITH_USER.sub("://...@", str(error)) or type(error).__name__  # an endpoint's URL may hold a password
        what = _WITH_QUERY.sub(r"\1?...", what)  # where a server sends readers on to, with a signature
        if is_transient(error):
            return f"{where}: {what} (tried {tries} times); run the same command again when the network is well"
        if isinstance(error, FileNotFoundError):
            return f"{where}: cannot be written ({what}); make the bucket first"
        if isinstance(error, PermissionError) or "redentials" in type(error).__name__:
            return f"{where}: access denied ({what}); credentials come from the environment, see docs/s3.md"
        return f"{where}: {what} ({type(error).__name__})"

    def put(self, file: Path, path: str) -> None:
        """Copy a local file to a path, where it is seen only when it is whole."""
        size_bytes = file.stat().st_size
        options = {"chunksize": max(UPLOAD_PART_BYTES, math.ceil(size_bytes / MOST_PARTS))} if self._is_s3 else {}

        def put(system: Any, target: str) -> None:
            if self.put_is_atomic:
                system.put_file(str(file), target, **options)
                return
            folder, _, name = target.rpartition("/")
            system.makedirs(folder, exist_ok=True)
            system.put_file(str(file), f"{folder}/.{name}.tmp")
            system.mv(f"{folder}/.{name}.tmp", target)

        self.ask(path, put, writing=True)


async def _http_client(**settings: Any) -> Any:
    """A session of HTTP whose time limits are those of S3: a long download is right while bytes come."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    return aiohttp.ClientSession(**{"timeout": timeout, **settings})


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of a file system tells of, or its cause does."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = (
                getattr(response, "status_code", None) or getattr(one, "status", None) or getattr(one, "code", None)
            )
        if isinstance(status, int):
            return status
    return None


def is_transient(error: BaseException) -> bool:
    """Whether an error may pass by itself: a dropped connection, a timeout, a server that is busy or out of order."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    if code in TRANSIENT_CODES or {kind.__name__ for kind in type(error).__mro__} & TRANSIENT_CLASSES:
        return True
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT_STATUS or status >= 500
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO
