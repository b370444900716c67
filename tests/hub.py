"""A hub for tests, on the loopback: what huggingface_hub needs to make a repository and commit files to it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_aTokenOfTheTests0123456789"
OWNER = "me"


class Hub(ThreadingHTTPServer):
    """The hub.

    Attributes:
        repositories: the files of each, by path, as commits have left them.
        commits: how many there were.
        objects: large files by sha256, uploaded before they are committed.
        fails: status by the end of a path: what the hub answers there.
        seen: method and path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits = 0
        self.objects: dict[str, bytes] = {}
        self.fails: dict[str, int] = {}
        self.seen: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that pushes here. Xet is another protocol, binary and to another server, which is not stood
        in for; the hub takes LFS too."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub, until the end of the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, path))
        status = next((status for end, status in self.server.fails.items() if path.endswith(end)), 200)
        if status != 200:
            self.reply(status, {"error": f"told to fail, whoever asks with {self.headers.get('Authorization')}"})
        elif path.startswith("/objects/"):  # its address was signed
            self.put(path.rpartition("/")[2], body)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials"})
        else:
            self.reply(*self.take(path, body))

    def take(self, path: str, body: bytes) -> tuple[int, Any]:
        hub, parts = self.server, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return 200, {"name": OWNER, "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            is_new = name not in hub.repositories
            hub.repositories.setdefault(name, {})
            return 200 if is_new else 409, {"url": f"{hub.url}/{name}"}
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)
            uploads = [
                {**thing, "actions": {"upload": {"href": f"{hub.url}/objects/{thing['oid']}"}}}
                for thing in asked["objects"]
            ]
            return 200, {"transfer": "basic", "objects": uploads}
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repositories and parts[5:] == ["main"]:
            if parts[4] == "preupload":
                return 200, {"files": [self.mode(file) for file in json.loads(body)["files"]]}
            if parts[4] == "commit":
                return self.commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        return 404, {"error": "Repository not found"}

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        is_large = file["path"].endswith((".safetensors", ".mp4"))
        return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self.server.repositories[repository] |= files
        self.server.commits += 1
        address = f"{self.server.url}/{repository}/commit/{'0' * 40}"
        return 200, {"success": True, "commitUrl": address, "commitOid": "0" * 40}

    def put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.reply(400, {"error": "not what its digest says"})
            return
        self.server.objects[oid] = body
        self.reply(200, {})

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""
