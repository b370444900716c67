"""An S3 server for tests: moto's, a process of its own on the loopback, behind a network that can be made bad."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY_ID, SECRET = "AKIAOFTHETESTS", "kept/for+nobody/else"
Fault = Callable[[str, str], str | None]  # of a request's method and path: "drop", "busy", "lost" or None


class Network(ThreadingHTTPServer):
    """A proxy in front of an HTTP server on this machine.

    Attributes:
        fault: what happens to a request: the connection is dropped in mid-upload, the server is too busy (503), or
            the request is carried out and its reply is lost.
        latency_s: added to each request.
        seen: method and path of each request, in order.
        most_at_once: the most requests that were on their way at a time.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.target = port
        self._counting = threading.Lock()
        self._at_once = 0
        self.be_well()

    def be_well(self) -> None:
        """No faults and no delay from now on."""
        self.fault: Fault = lambda method, path: None
        self.latency_s = 0.0
        self.seen: list[tuple[str, str]] = []
        self.most_at_once = 0

    def count(self, step: int) -> None:
        """One more request is on its way, or (-1) one less."""
        with self._counting:
            self._at_once += step
            self.most_at_once = max(self.most_at_once, self._at_once)

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that were dropped on purpose, or by a client that was killed."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Network

    def relay(self) -> None:
        self.server.count(1)
        try:
            self.relay_one()
        finally:
            self.server.count(-1)

    def relay_one(self) -> None:
        self.server.seen.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path)
        time.sleep(self.server.latency_s)
        if fault == "drop":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)) // 2))
            self.hang_up()
            return
        body = self.body()
        if fault == "busy":
            told = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self.reply(503, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else told)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        skipped = {"transfer-encoding", "content-length", "expect", "connection"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost":
            self.hang_up()
        else:
            self.reply(answer.status, answer.getheaders(), content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay  # noqa: N815 (as http.server calls them)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def reply(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length") or (
                name.lower() == "content-length" and self.command == "HEAD"
            ):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self) -> None:
        """Reset the connection, as a router that restarts does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


@contextmanager
def server(log: Path) -> Iterator[Network]:
    """A running server, reached through the network that is returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        moto = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if moto.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(log.read_text()) from None
                time.sleep(0.1)
        with Network(port) as network:
            thread = threading.Thread(target=network.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield network
            finally:
                network.shutdown()
                thread.join()
    finally:
        moto.kill()
        moto.wait()


@contextmanager
def reached(log: Path) -> Iterator[Network]:
    """A running server with an empty bucket `lab`, and the environment that leads to it."""
    import fsspec
    import pytest

    with server(log) as network, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{network.server_port}")
        patch.setenv("NO_PROXY", "127.0.0.1")
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("lab")
        yield network
        fsspec.filesystem("s3").clear_instance_cache()
