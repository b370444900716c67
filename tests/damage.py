"""Damage to a cache, and the commands that find and mend it, for the tests of both."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.verify import main
from shared.shards import INDEX_SCHEMA, ShardWriter, read_index, write_index

KINDS = ("latents", "embeddings")
Verify = Callable[..., tuple[int, list[str]]]


def verifier(cache: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """A function that runs verify with flags: its exit status and its lines."""

    def run(*flags: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        status = main([str(cache), *flags])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return status, told.out.splitlines()

    return run


def one_part(cache: Path, kind: str) -> Path:
    """The tar of the one part of a kind of store."""
    (tar,) = (cache / kind).glob("*/*.tar")
    return tar


def rows_of(tar: Path) -> list[dict]:
    return read_index(tar.with_suffix(".parquet").read_bytes(), "index")[0].to_pylist()


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def arrays(cache: Path) -> dict[str, bytes]:
    """Every member of every part, by store and name."""
    found = {}
    for path in cache.glob("*/*/*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[f"{path.parent.name}/{member.name}"] = file.read()
    return found


def forge(tar: Path, rows: list[dict], **facts) -> None:
    """Give a tar an index of other rows, with digests as a forger would make them."""
    told = {"part": tar.stem, "tar_sha256": "0a" * 32, "tar_size_bytes": tar.stat().st_size, **facts}
    write_index(tar.with_suffix(".parquet"), rows, told)


def publish(cache: Path, store: Path, keys: dict[bytes, np.ndarray], member: str = "moments.npy") -> Path:
    """Put a part of arrays into a store as a writer does. Returns its tar."""
    folder = cache / "build"
    folder.mkdir()
    shard = ShardWriter(folder)
    for key, array in keys.items():
        shard.add(key, {member: array})
    finished = shard.finish()
    shutil.move(finished.tar, store / finished.tar.name)
    shutil.move(finished.index, store / finished.index.name)
    folder.rmdir()
    return store / finished.tar.name


def bytes_of_parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


HOSTILE = {
    "empty": b"",
    "text": b"not a Parquet file",
    "garbage": b"PAR1" + bytes(range(256)) * 8 + b"PAR1",
    "columns": bytes_of_parquet(pa.table({"a": [1]}, metadata={"latentreel": '{"format_version": 1}'})),
    "json": bytes_of_parquet(INDEX_SCHEMA.empty_table().replace_schema_metadata({"latentreel": "[" * 100_000})),
    "billions": bytes_of_parquet(
        pa.table({"a": pa.nulls(1 << 21, pa.int8())}, metadata={"latentreel": '{"format_version": 1}'})
    ),
}
