"""Stage 1 over manifests and videos behind URLs: S3 as moto speaks it, over a bad network, and a plain HTTP server."""

from __future__ import annotations

import csv
import hashlib
import http.server
import shutil
import socket
import struct
import threading
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from preprocess import files
from preprocess.__main__ import main
from preprocess.decode import DecodePool
from preprocess.manifest import iter_manifest
from shared import remote
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import ManifestError
from tests import s3
from tests.decoding import StandInTextEncoder, StandInVideoEncoder

COUNT = 3


@pytest.fixture(scope="module")
def s3_network(tmp_path_factory):
    """An S3 server with an empty bucket `lab`, and the environment that leads to it."""
    files._remote.cache_clear()
    with s3.reached(tmp_path_factory.mktemp("moto") / "log") as network:
        yield network
    files._remote.cache_clear()


@pytest.fixture(autouse=True)
def no_copies(tmp_path, monkeypatch):
    """Copies go below `tmp_path`; what fails is tried again sooner than usual."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.05,) * 6)
    files.forget_copies()
    yield
    files.forget_copies()


@pytest.fixture
def network(s3_network):
    s3_network.be_well()
    yield s3_network
    s3_network.be_well()


@pytest.fixture(scope="module")
def folder(clips, tmp_path_factory):
    """Videos with a table of them."""
    target = tmp_path_factory.mktemp("videos")
    for number in range(COUNT):
        shutil.copy(clips / f"{number}.mp4", target)
    write_table(target / "clips.csv", [f"{number}.mp4" for number in range(COUNT)])
    return target


@pytest.fixture(scope="module")
def bucket(s3_network, folder):
    """The same in S3; the URL of the folder."""
    aws = fsspec.filesystem("s3", use_listings_cache=False)
    for file in folder.iterdir():
        aws.pipe_file(f"lab/videos/{file.name}", file.read_bytes())
    return "s3://lab/videos"


def write_table(path, videos):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "caption"])
        rows.writerows((video, f"a square, number {number}") for number, video in enumerate(videos))
    return path


@pytest.fixture
def stage_1(tiny_2b, monkeypatch):
    """Stage 1 with stand-ins for the models, and its rows; decoding is real."""
    from preprocess import encode

    monkeypatch.setattr(encode, "TextEncoder", StandInTextEncoder)
    monkeypatch.setattr(encode, "VideoEncoder", StandInVideoEncoder)

    def run(cache, table, *flags, status=0):
        words = [
            "--cache",
            cache,
            "--dataset",
            "d",
            "--pretrained_model_name_or_path",
            tiny_2b,
            "--dataset_name",
            table,
        ]
        words += ["--height", "64", "--width", "96", "--max_num_frames", "9", "--dataloader_num_workers", "2", *flags]
        assert main([str(word) for word in words]) == status
        folder = Path(cache, open_dataset(Cache(str(cache)), "d").folder)
        return [pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("samples", "rejected")]

    return run


def without_source(rows):
    """A sample's id is a digest of its source too."""
    return [{name: value for name, value in row.items() if name not in ("source", "sample_id")} for row in rows]


@pytest.mark.slow
def test_stage_1_over_s3_equals_stage_1_over_local_files(network, bucket, folder, stage_1, tmp_path):
    samples, _ = stage_1(tmp_path / "local", folder / "clips.csv")
    assert len(samples) == COUNT
    requests = iter(range(10**6))
    network.fault = lambda method, path: "drop" if next(requests) % 5 == 4 else None
    assert stage_1(tmp_path / "remote", f"{bucket}/clips.csv")[0] == samples, (
        "relative names: the source is the same too"
    )
    network.be_well()
    named = write_table(tmp_path / "named.csv", [f"{bucket}/{number}.mp4" for number in range(COUNT)])
    by_url, _ = stage_1(tmp_path / "named", named)
    assert without_source(by_url) == without_source(samples)
    assert [row["source"] for row in by_url] == [f"{bucket}/{number}.mp4" for number in range(COUNT)]
    gets = [path for method, path in network.seen if method == "GET" and path.split("?")[0].endswith(".mp4")]
    assert len(gets) == COUNT, "digest, probe and frames of one fetch"

    network.be_well()
    assert stage_1(tmp_path / "named", named)[0] == by_url
    asked = [(method, path.split("?")[0]) for method, path in network.seen if path.split("?")[0].endswith(".mp4")]
    assert sorted(asked) == [("HEAD", f"/lab/videos/{number}.mp4") for number in range(COUNT)]
    for cache in ("remote", "named"):
        for file in (tmp_path / cache).rglob("*"):
            assert not file.is_file() or s3.SECRET.encode() not in file.read_bytes(), file
    assert list(tmp_path.glob("latentreel-videos-*/*")) == []


@pytest.mark.slow
def test_a_video_that_cannot_be_fetched_is_rejected_and_tried_again_by_the_next_run(
    network, bucket, stage_1, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,))
    network.fault = lambda method, path: "drop" if method == "GET" and path.split("?")[0].endswith("/1.mp4") else None
    samples, rejected = stage_1(tmp_path / "cache", f"{bucket}/clips.csv")
    assert len(samples) == COUNT - 1
    assert [(row["source"], row["reason"]) for row in rejected] == [("1.mp4", "unreadable")]
    assert "tried 2 times" in rejected[0]["detail"]
    network.be_well()
    samples, rejected = stage_1(tmp_path / "cache", f"{bucket}/clips.csv")
    assert (len(samples), rejected) == (COUNT, [])


@pytest.mark.slow
def test_a_video_that_is_not_there_stops_the_run(network, bucket, stage_1, tmp_path):
    table = write_table(tmp_path / "clips.csv", [f"{bucket}/0.mp4", f"{bucket}/none.mp4"])
    with pytest.raises(ManifestError, match=r"s3://lab/videos/none\.mp4"):
        stage_1(tmp_path / "cache", table)


@pytest.mark.parametrize("fault", ["drop", "busy"])
def test_a_fetch_over_a_bad_network_is_made_again(network, bucket, folder, fault):
    faults = iter([fault] * 3)
    network.fault = lambda method, path: next(faults, None) if path.split("?")[0].endswith("/0.mp4") else None
    size, _ = files.status(f"{bucket}/0.mp4")
    network.fault = lambda method, path: next(faults, None) if method == "GET" else None
    content = (folder / "0.mp4").read_bytes()
    assert (size, files.digest(f"{bucket}/0.mp4")) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_table_in_s3_that_cannot_be_had_is_one_line(network, bucket, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.05,))
    columns: dict[str, Any] = {"instance_data_root": None, "caption_column": "caption", "video_column": "video"}
    with pytest.raises(ManifestError, match=r"--dataset_name s3://lab/none\.csv: cannot be fetched \(No such file\)"):
        list(iter_manifest(dataset_name="s3://lab/none.csv", **columns))
    network.fault = lambda method, path: "busy"
    with pytest.raises(ManifestError, match=r"--dataset_name s3://lab/videos/clips\.csv: .*tried 2 times"):
        list(iter_manifest(dataset_name=f"{bucket}/clips.csv", **columns))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_table_is_read_from_s3_and_named_by_its_url(network, tmp_path, suffix):
    from tests.test_manifest import write_table as write

    rows = [{"video": f"{number}.mp4", "caption": f"a dog {number}"} for number in range(2)]
    aws = fsspec.filesystem("s3", use_listings_cache=False)
    aws.pipe_file(f"lab/tables/t{suffix}", write(tmp_path / f"t{suffix}", rows).read_bytes())
    columns: dict[str, Any] = {"instance_data_root": None, "caption_column": "caption", "video_column": "video"}
    records = list(iter_manifest(dataset_name=f"s3://lab/tables/t{suffix}", **columns))
    assert [(record.source, record.path, record.caption) for record in records] == [
        (row["video"], f"s3://lab/tables/{row['video']}", row["caption"]) for row in rows
    ]
    assert all(record.origin.startswith(f"s3://lab/tables/t{suffix}") for record in records)
    assert list(tmp_path.glob("latentreel-manifest-*")) == []


# A plain HTTP server.


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; with faults, by request."""

    server: Server

    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults and self.command == "GET" else None
        if "?" in self.path or self.path == "/moved.mp4":
            self.do_HEAD()
        elif fault == "drop":
            self.send_response_only(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(bytes(1000))
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault:
            self.send_error(int(fault))
        else:
            super().do_GET()

    def do_HEAD(self):
        if "?" in self.path:
            self.send_error(403)
        elif self.path == "/moved.mp4":
            self.send_response_only(302)
            self.send_header("Location", "/signed.mp4?X-Amz-Signature=hidden")
            self.end_headers()
        elif self.server.head:
            self.send_error(self.server.head)
        else:
            super().do_HEAD()

    def send_header(self, name, value):
        if name not in self.server.untold:
            super().send_header(name, value)

    def log_message(self, *words):
        self.server.seen.append(words[1])


class Server(http.server.ThreadingHTTPServer):
    """A web server.

    Attributes:
        faults: of the next GETs: "drop", a status, or None.
        head: a status that every HEAD is answered with.
        untold: headers that are left out.
        seen: each request.
    """

    daemon_threads = True
    faults: list[str | int | None]
    head: int | None
    untold: tuple[str, ...]
    seen: list[str]
    url: str

    def handle_error(self, request, client_address):
        """Connections that were dropped on purpose."""


@pytest.fixture
def web(folder, monkeypatch):
    """A plain web server of the folder, and its URL."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        server.faults, server.head, server.untold, server.seen = [], None, (), []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()
        thread.join()


def test_a_video_over_http_is_fetched_probed_and_read_once(web, folder):
    from preprocess.frames import Placement
    from preprocess.probe import probe
    from preprocess.video import read_frames

    content = (folder / "0.mp4").read_bytes()
    url, placement = f"{web.url}/0.mp4", Placement(64, 96, 0, 0, 64, 96)
    assert files.status(url)[0] == len(content)
    web.faults[:] = ["drop", 503]
    assert files.digest(url) == hashlib.sha256(content).hexdigest()
    web.seen.clear()
    with DecodePool(1, 60) as pool:
        found = pool.probe(url).result()
        clip = pool.read(url, found, [0, 4], placement, preview=False).result()
    local = str(folder / "0.mp4")
    assert found == probe(local)
    assert (clip.frames == read_frames(local, found, [0, 4], placement)).all()
    assert web.seen == []


@pytest.mark.parametrize(("status", "missing"), [(404, True), (410, True), (403, False), (503, False)])
def test_what_a_web_server_refuses_is_missing_only_where_it_says_so(web, monkeypatch, status, missing):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,))
    web.head, web.faults[:] = status, [status] * 9
    with pytest.raises(OSError, match=r"/0\.mp4") as caught:
        files.status(f"{web.url}/0.mp4")
    assert isinstance(caught.value, FileNotFoundError) is missing
    assert caught.value.strerror
    assert ("tried 2 times" in str(caught.value)) is (status == 503)


def test_a_web_server_that_tells_no_version_is_read_for_the_stamp(web, folder):
    web.untold = ("Last-Modified",)
    url = f"{web.url}/0.mp4"
    size, stamp = files.status(url)
    assert size == (folder / "0.mp4").stat().st_size
    files.forget_copies()
    assert files.status(url) == (size, stamp)
    assert files.status(f"{web.url}/1.mp4")[1] != stamp


def test_where_a_server_sends_readers_on_to_is_told_without_its_signature(web):
    with pytest.raises(OSError, match=r"/signed\.mp4\?\.\.\.") as caught:
        files.status(f"{web.url}/moved.mp4")
    assert "403" in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_server_that_is_not_there_is_no_missing_video(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="tried 2 times") as caught:
            files.status(f"http://127.0.0.1:{unused.getsockname()[1]}/0.mp4")
    assert not isinstance(caught.value, FileNotFoundError)
