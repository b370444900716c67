"""Digests of files: right, remembered, and forgotten when there is a reason to."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from shared.digests import file_digest, known_digest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(range(256)) * 5000)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_unseen(path: Path) -> None:
    """Other bytes, of the same size and modification time."""
    stat = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_digest_is_the_sha256_of_the_bytes(weights):
    assert file_digest(weights) == sha256(weights)


def test_nothing_is_known_before_a_file_was_read_and_its_digest_after(weights):
    assert known_digest(weights) is None
    digest = file_digest(weights)
    assert known_digest(weights) == digest


def test_a_file_that_looks_unchanged_is_not_read_again_unless_asked(weights):
    before = file_digest(weights)
    change_unseen(weights)
    assert file_digest(weights) == before
    assert file_digest(weights, rehash=True) == sha256(weights) != before
    assert file_digest(weights) == sha256(weights), "the new digest is remembered"


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_file_that_looks_changed_is_read_again(weights, change):
    file_digest(weights)
    stat = weights.stat()
    if change == "time":
        change_unseen(weights)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        weights.write_bytes(b"other")
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert known_digest(weights) is None
    assert file_digest(weights) == sha256(weights)


def test_two_files_with_one_name_do_not_share_a_digest(tmp_path):
    digests = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "model.safetensors"
        path.parent.mkdir()
        path.write_bytes(folder.encode())
        os.utime(path, ns=(0, 0))
        digests.append(file_digest(path))
    assert digests == [hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()]


def test_the_hub_names_its_large_files_by_their_digest(tmp_path):
    """A snapshot is a folder of links to `blobs/<sha256>`; files of git have names of 40 digits, which is no sha256."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "commit"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, blob in (("model.safetensors", "ab" * 32), ("config.json", "cd" * 20)):
        (blobs / blob).write_bytes(name.encode())
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob))
    assert file_digest(snapshot / "model.safetensors") == "ab" * 32
    assert file_digest(snapshot / "model.safetensors", rehash=True) == sha256(snapshot / "model.safetensors")
    assert file_digest(snapshot / "config.json") == sha256(snapshot / "config.json")


def test_only_the_hub_is_believed_by_name(tmp_path):
    path = tmp_path / ("ab" * 32)
    path.write_bytes(b"no blob")
    assert file_digest(path) == sha256(path)


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", "\xff"])
def test_a_damaged_memory_is_no_memory(weights, home, text):
    file_digest(weights)
    (memory,) = home.rglob("*.json")
    memory.write_text(text, encoding="latin-1")
    assert known_digest(weights) is None
    assert file_digest(weights) == sha256(weights)
    assert json.loads(memory.read_text(encoding="utf-8"))["sha256"] == sha256(weights)


def test_a_home_that_cannot_be_written_to_is_no_obstacle(weights, home):
    home.write_text("a file where a folder should be")
    assert file_digest(weights) == sha256(weights)
    assert known_digest(weights) is None


def test_a_file_that_is_gone_is_not_known(weights):
    file_digest(weights)
    weights.unlink()
    assert known_digest(weights) is None
    with pytest.raises(FileNotFoundError):
        file_digest(weights)
