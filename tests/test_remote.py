"""A cache behind a URL: S3 as moto speaks it, over a network that drops, delays and refuses; and fsspec's memory."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
import torch

from preprocess.__main__ import main
from preprocess.verify import main as verify
from shared import remote
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, ConfigError
from shared.models import open_checkpoint
from shared.remote import Remote, check_url, is_transient
from shared.storage import Storage
from tests import s3
from tests.conftest import ROOT
from tests.training import facts_of, train_here
from train.data import DrawSettings, Requests, Samples, micro_batches
from train.reading import LatentDataset
from train.sampler import Deal, Sampler

STORES = ("latents", "embeddings")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """An S3 server with an empty bucket `lab`, and the environment that leads to it."""
    with s3.reached(tmp_path_factory.mktemp("moto") / "log") as network:
        yield network


@pytest.fixture
def bad_network(network, monkeypatch):
    """The same, to be made bad by a test; what fails is tried again sooner than usual."""
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.05,) * 6)
    network.be_well()
    yield network
    network.be_well()


@pytest.fixture(scope="module")
def uploaded(network, cache):
    """The cache of the session, copied to S3 file by file by another program; not to be changed."""
    aws = fsspec.filesystem("s3", use_listings_cache=False)
    for path in sorted(file for file in cache.rglob("*") if file.is_file()):
        aws.pipe_file(f"lab/uploaded/{path.relative_to(cache)}", path.read_bytes())
    return "s3://lab/uploaded"


@pytest.fixture
def memory():
    """An empty file system of fsspec's, in this process."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


@pytest.fixture
def writer(tmp_path):
    folder = tmp_path / "writer"
    folder.mkdir()
    return folder


def stage_1_words(url, model, clips, *flags):
    words = ["--cache", url, "--dataset", "squares", "--pretrained_model_name_or_path", model, "--dataset_name", clips]
    words += ["--buckets", "9x64x96,9x96x64", "--id_token", "SQR", "--random_flip", "0.5"]
    words += ["--validation_prompt", "a blue square:::a red square", *flags]
    return [str(word) for word in words]


def parts_of(url):
    """Name and bytes of each file in the stores of a cache."""
    storage = Storage(str(url))
    found: dict[str, bytes] = {}
    for kind in STORES:
        for store in storage.names(kind):
            folder = f"{kind}/{store}"
            found |= {f"{folder}/{name}": storage.read(f"{folder}/{name}") for name in storage.names(folder)}
    return found


def digest_and_encoded(url):
    """The current version of the data set, and what the last run encoded for it."""
    dataset = open_dataset(Cache(str(url)), "squares")
    report = json.loads(dataset.cache.storage.read(f"{dataset.folder}/report.json"))
    return dataset.digest, sum(report["encoded"].values())


# Stage 1 and stage 2.


def test_stage_1_makes_the_same_cache_behind_a_url_and_again_encodes_nothing(
    memory, tiny_2b, clips, cache, monkeypatch
):
    put, order = Remote.put, []

    def record(self, file, path):
        put(self, file, path)
        order.append(path)

    monkeypatch.setattr(Remote, "put", record)
    assert main(stage_1_words("memory://lab/cache", tiny_2b, clips)) == 0
    assert parts_of("memory://lab/cache") == parts_of(cache)
    digest, encoded = digest_and_encoded("memory://lab/cache")
    assert (digest, encoded > 0) == (digest_and_encoded(cache)[0], True)
    assert main(stage_1_words("memory://lab/cache", tiny_2b, clips)) == 0
    assert digest_and_encoded("memory://lab/cache") == (digest, 0)
    assert not [name for name in memory.store if "writers" in name]
    assert order.pop().endswith("/preview.html")  # a page for people: the data set stands before it
    assert order[-1].endswith("/CURRENT")
    tars = [place for place, path in enumerate(order) if path.endswith(".tar")]
    assert [order[place + 1] for place in tars] == [order[place].replace(".tar", ".parquet") for place in tars]
    first_of_dataset = next(place for place, path in enumerate(order) if path.startswith("datasets/"))
    assert max(tars) < first_of_dataset
    assert order[: order.index(next(path for path in order if path.endswith("/CURRENT")))][-1].endswith("dataset.json")


@pytest.mark.slow
def test_a_run_over_a_bad_network_equals_the_local_one(bad_network, tiny_2b, clips, cache, capfd):
    count = {"all": 0, "PUT": 0}

    def fault(method, path):
        count["all"] += 1
        count["PUT"] += method == "PUT"
        if method == "PUT" and count["PUT"] % 3 == 1:
            return "drop"
        if method == "PUT" and count["PUT"] % 5 == 2:
            return "lost"
        return "busy" if count["all"] % 4 == 0 else None

    bad_network.fault, bad_network.latency_s = fault, 0.01
    assert main(stage_1_words("s3://lab/bad", tiny_2b, clips)) == 0
    bad_network.be_well()
    assert count["PUT"] > 8
    assert parts_of("s3://lab/bad") == parts_of(cache)
    assert digest_and_encoded("s3://lab/bad")[0] == digest_and_encoded(cache)[0]
    told = "".join(capfd.readouterr())
    assert s3.SECRET not in told
    assert s3.KEY_ID not in told
    aws = fsspec.filesystem("s3", use_listings_cache=False)
    found = {name: aws.cat_file(name) for name in aws.find("lab/bad")}
    assert found.keys() > {"lab/bad/sources.parquet", "lab/bad/datasets/squares/CURRENT"}
    assert [name for name, content in found.items() if s3.SECRET.encode() in content] == []
    assert [name for name, content in found.items() if s3.KEY_ID.encode() in content] == []


def test_a_known_cache_in_s3_encodes_nothing_and_opens_no_video(uploaded, tiny_2b, clips, cache, monkeypatch):
    from preprocess.decode import DecodePool

    def opened(*words, **named):
        raise AssertionError("a video was opened")

    monkeypatch.setattr(DecodePool, "probe", opened)
    monkeypatch.setattr(DecodePool, "read", opened)
    assert main(stage_1_words(uploaded, tiny_2b, clips)) == 0
    assert digest_and_encoded(uploaded) == (digest_and_encoded(cache)[0], 0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_from_s3_is_training_from_the_folder(bad_network, uploaded, tiny_2b, cache, tmp_path, workers):
    flags = {"pretrained_model_name_or_path": tiny_2b, "max_train_steps": 2, "dataloader_num_workers": workers}
    requests = iter(range(10**6))
    bad_network.fault = lambda method, path: "busy" if next(requests) % 5 == 4 else None
    assert train_here(uploaded, tmp_path / "remote", **flags) == 0
    assert train_here(cache, tmp_path / "local", **flags) == 0
    assert facts_of(tmp_path / "remote") == facts_of(tmp_path / "local")
    assert ranges_of_parts(bad_network)
    for file in (tmp_path / "remote").rglob("*"):
        assert not file.is_file() or s3.SECRET.encode() not in file.read_bytes(), file


def ranges_of_parts(network):
    """The reads of parts that a server has seen."""
    return [path for method, path in network.seen if method == "GET" and path.split("?")[0].endswith(".tar")]


@pytest.mark.slow
@pytest.mark.parametrize(("prefetch", "least"), [(1, 1), (4, 4), (24, 11)])  # 10: what botocore lets through by itself
def test_over_a_slow_network_as_many_reads_are_on_their_way_as_asked_for(
    bad_network, uploaded, tiny_2b, cache, prefetch, least
):
    facts = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=()).facts
    draws = DrawSettings(seed=3, global_batch=2, stratified=True, random_flip=0.5, caption_dropout=0.2)
    deal = Deal(batch_size=2, ranks=1, accumulation=1)

    def batches(url, **options):
        dataset = open_dataset(Cache(str(url)), "squares")
        samples = Samples(dataset)
        reader = LatentDataset(dataset, facts, draws, **options)
        order = Sampler(samples.buckets, deal.global_batch, dataset.digest, 1)
        requests = Requests(samples, order, deal, 0, range(12), draws)
        bad_network.be_well()  # what has been asked for so far is no read of a reader
        bad_network.latency_s = 0.2
        with closing(micro_batches(reader, requests, num_workers=0, pin_memory=False)) as found:
            return list(found)

    local, remote = batches(cache), batches(uploaded, prefetch=prefetch)
    assert least <= bad_network.most_at_once <= prefetch
    assert len(ranges_of_parts(bad_network)) == len(bad_network.seen) > 30
    for one, other in zip(local, remote, strict=True):
        assert one.places == other.places
        for name, tensor in vars(one).items():
            assert not isinstance(tensor, torch.Tensor) or torch.equal(tensor, getattr(other, name)), name


@pytest.mark.slow
def test_a_second_run_reads_its_local_copies_and_no_part(bad_network, uploaded, tiny_2b, cache, tmp_path):
    flags = {"pretrained_model_name_or_path": tiny_2b, "max_train_steps": 3, "dataloader_num_workers": 2}
    copies = {"local_cache": tmp_path / "copies", "local_cache_size": "1GB"}
    for name in ("first", "second"):
        bad_network.be_well()
        bad_network.latency_s = 0.05
        assert train_here(uploaded, tmp_path / name, **flags, **copies) == 0
        assert bool(ranges_of_parts(bad_network)) == (name == "first")
    assert train_here(cache, tmp_path / "local", **flags) == 0
    assert facts_of(tmp_path / "first") == facts_of(tmp_path / "second") == facts_of(tmp_path / "local")


@pytest.mark.slow
def test_a_killed_writer_leaves_no_index_without_its_tar_and_a_rerun_finishes(
    bad_network, tiny_2b, clips, cache, tmp_path
):
    """Killed in the instant in which the second part of clips has its tar and not yet its index."""
    tars, reached = [], threading.Event()

    def fault(method, path):
        if method == "PUT" and "/latents/" in path and path.split("?")[0].endswith(".tar"):
            tars.append(path)
        elif method == "PUT" and len(tars) == 2:
            reached.set()
            return "drop"
        return None

    bad_network.fault = fault
    words = stage_1_words("s3://lab/killed", tiny_2b, clips, "--shard_size", 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with (tmp_path / "printed").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "preprocess", *words], cwd=ROOT, env=environment, stdout=printed, stderr=printed
        )
    try:
        assert reached.wait(180), (tmp_path / "printed").read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    bad_network.be_well()

    names = {Path(name).name for name in parts_of("s3://lab/killed") if name.startswith("latents")}
    parts = {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}
    assert len(parts) == 1
    assert {f"{part}.tar" for part in parts} < {name for name in names if name.endswith(".tar")}
    with pytest.raises(CacheError, match="no data set"):
        open_dataset(Cache("s3://lab/killed"), "squares")
    left = [folder for folder in (tmp_path / f"latentreel-{os.getuid()}").iterdir() if not folder.name.startswith(".")]
    assert len(left) == 1, "what it had not finished is on its own machine"

    again = [sys.executable, "-m", "preprocess", *words]
    done = subprocess.run(again, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digest_and_encoded("s3://lab/killed")[0] == digest_and_encoded(cache)[0]
    assert not left[0].exists()
    assert s3.SECRET not in done.stdout + done.stderr + (tmp_path / "printed").read_text()


def test_a_cache_copied_to_s3_and_back_verifies(uploaded, cache, tmp_path, capsys):
    assert verify([uploaded]) == 0
    fsspec.filesystem("s3").get("lab/uploaded/", str(tmp_path / "back"), recursive=True)
    assert verify([str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.count("clean") == 2
    assert parts_of(tmp_path / "back") == parts_of(cache)


# One operation.


@pytest.mark.parametrize("kind", ["drop", "busy", "lost"])
def test_an_upload_that_is_disturbed_is_made_again(bad_network, writer, kind):
    storage, payload = Storage("s3://lab/one"), os.urandom(200_000)
    faults = iter([kind, kind])
    bad_network.fault = lambda method, path: next(faults, None) if method == "PUT" else None
    storage.write("file.bin", payload, writer)
    assert storage.read("file.bin") == payload
    assert [method for method, _ in bad_network.seen].count("PUT") >= 3
    assert list(writer.iterdir()) == []


def test_a_large_file_goes_up_in_parts_and_is_not_seen_before_the_last(bad_network, writer, monkeypatch):
    monkeypatch.setattr(remote, "UPLOAD_PART_BYTES", 5 << 20)  # the least that S3 takes
    payload = os.urandom(12 << 20)
    seen_early: list[str] = []
    parts: list[str] = []

    def fault(method, path):
        if method == "PUT" and "partNumber" in path:
            parts.append(path)
            return "drop" if len(parts) == 2 else None
        if method == "POST" and "uploadId" in path:  # complete
            seen_early.extend(name for name in other.names("large") if name.endswith("file.bin"))
        return None

    other = Storage("s3://lab")
    (writer / "file.bin").write_bytes(payload)
    bad_network.fault = fault
    Storage("s3://lab/large").publish(writer / "file.bin", "file.bin")
    assert len(parts) > 3
    assert seen_early == []
    assert Storage("s3://lab/large").read("file.bin") == payload


def test_a_range_behind_the_end_is_told_as_of_a_local_file(network, writer):
    storage = Storage("s3://lab/ranges")
    storage.write("file.bin", bytes(100), writer)
    assert storage.read_range("file.bin", 90, 10) == bytes(10)
    assert storage.read_range("file.bin", 50, 0) == b""
    for offset, size_bytes in ((90, 11), (100, 1), (5000, 1)):
        with pytest.raises(CacheError, match=rf"holds {max(100 - offset, 0)} of the {size_bytes} bytes"):
            storage.read_range("file.bin", offset, size_bytes)
    with pytest.raises(FileNotFoundError):
        storage.read_range("nothing.bin", 0, 1)
    storage.remove("file.bin")
    storage.remove("file.bin")
    assert storage.names("") == []


def test_a_network_that_stays_bad_is_one_line_with_the_tries(bad_network, writer, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.05,))
    bad_network.fault = lambda method, path: "busy"
    with pytest.raises(CacheError, match=r"s3://lab/x/file\.bin: .*tried 2 times"):
        Storage("s3://lab/x").write("file.bin", b"", writer)


def test_a_bucket_that_is_not_there_is_one_line(network, writer):
    with pytest.raises(CacheError, match="make the bucket first"):
        Storage("s3://nosuch/x").write("file.bin", b"", writer)
    with pytest.raises(CacheError, match="no data set"):
        open_dataset(Cache("s3://nosuch/x"), "squares")


def test_a_password_in_an_endpoint_is_not_told(memory):
    def fail(system, path):
        raise PermissionError("cannot connect to http://me:secret@host:9000/lab")

    with pytest.raises(CacheError, match=r"http://\.\.\.@host:9000/lab"):
        Remote("memory://lab").ask("x", fail)


def answered(status, code):
    """An error as s3fs raises it of botocore's."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "PutObject"))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (503, "SlowDown", True), (503, "503", True), (500, "InternalError", True), (502, "BadGateway", True),
        (400, "RequestTimeout", True), (400, "IncompleteBody", True), (429, "TooManyRequests", True),
        (403, "AccessDenied", False), (403, "SignatureDoesNotMatch", False), (404, "NoSuchKey", False),
        (400, "InvalidRequest", False), (418, "Teapot", False),
    ],
)  # fmt: skip
def test_which_answers_may_pass_by_themselves(status, code, expected):
    assert is_transient(answered(status, code)) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True), (BrokenPipeError(), True), (TimeoutError(), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True), (FileNotFoundError(2, "x"), False),
        (PermissionError(13, "x"), False), (OSError(errno.ENOSPC, "full"), False), (ValueError("x"), False),
    ],
)  # fmt: skip
def test_which_errors_may_pass_by_themselves(error, expected):
    assert is_transient(error) is expected


@pytest.mark.parametrize(
    ("error", "tries", "raised"),
    [
        (ConnectionResetError("gone"), 7, CacheError), (PermissionError("Forbidden"), 1, CacheError),
        (FileNotFoundError("x"), 1, FileNotFoundError), (TypeError("a defect"), 1, TypeError),
    ],
)  # fmt: skip
def test_only_what_may_pass_is_tried_again(memory, monkeypatch, error, tries, raised):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0,) * 6)
    tried = []

    def fail(system, path):
        tried.append(path)
        raise error

    with pytest.raises(raised):
        Remote("memory://lab").ask("a/b", fail)
    assert tried == ["/lab/a/b"] * tries


def test_pauses_grow_and_differ_from_writer_to_writer(memory, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)

    def fail(system, path):
        raise ConnectionResetError

    for _ in range(2):
        with pytest.raises(CacheError):
            Remote("memory://lab").ask("", fail)
    assert all(0.5 * base <= pause <= 1.5 * base for base, pause in zip(remote.RETRY_SECONDS * 2, pauses, strict=True))
    assert pauses[:6] != pauses[6:]


def test_where_a_put_is_seen_at_once_the_file_is_renamed_into_place(tmp_path, writer, monkeypatch):
    """`local://` stands for sftp://, hdfs:// and their like: a put shows under its name as it grows."""
    system = fsspec.filesystem("local")
    put = type(system).put_file
    targets = []

    def record(self, source, target, **options):
        targets.append(target)
        return put(self, source, target, **options)

    monkeypatch.setattr(type(system), "put_file", record)
    storage = Storage(f"local://{tmp_path}/root")
    for payload in (b"old", b"new"):
        storage.write("a/file.bin", payload, writer)
        assert storage.read("a/file.bin") == payload
    assert storage.names("a") == ["file.bin"]
    assert {Path(target).name for target in targets} == {".file.bin.tmp"}


# What is refused.


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAX:se/cr+et@bucket/prefix", "s3://AKIAX:secret@bucket", "s3://secret@bucket/x",
        "https://user:secret@host/x", "https://host/x?X-Amz-Signature=secret", "simplecache::s3://a:secret@bucket/x",
        "s3://AKIAX:secret/x",
    ],
)  # fmt: skip
def test_urls_with_credentials_are_refused_without_repeating_them(url):
    with pytest.raises(ConfigError, match="refused") as caught:
        Cache(url)
    assert not any(word in str(caught.value) for word in ("secret", "cr+et", "AKIAX"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b", "abfs://container@account.dfs.core.windows.net/x", "hdfs://host:8020/x", "memory://a/b",
        "hf://datasets/a/b@main", "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/lab/x", "webhdfs://[::1]:80/x",
    ],
)  # fmt: skip
def test_urls_that_only_look_like_it_are_taken(url):
    if "::" not in url:  # of an IPv6 address too: that is how fsspec chains
        check_url(url)


def test_without_s3fs_one_line_names_the_extra():
    words = """
import sys
sys.modules["s3fs"] = None
from preprocess.verify import main
from shared.errors import run_command
run_command(main, ["s3://lab/x"])
"""
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: s3://lab/x: .*s3fs.*'\.\[s3\]'.*\n", done.stderr)


def test_a_local_cache_loads_no_file_system():
    words = "import sys; from shared.cache import Cache; Cache('/tmp'); print({'fsspec', 's3fs'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
