"""Bad parts: flipped bits and forged indexes each have a line that names them, and cost nothing that they claim."""

import os
import random
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from preprocess.parts import MEMBER_BYTES
from shared.shards import encode_array, is_index_as_written
from tests.damage import HOSTILE, KINDS, flip, forge, one_part, publish, rows_of, verifier


@pytest.fixture
def verify(cache_copy, capsys):
    return verifier(cache_copy, capsys)


# Flipped bits.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_a_payload_is_named(verify, cache_copy, kind, seed):
    rng, tar = random.Random(seed), one_part(cache_copy, kind)
    row = rng.choice(rows_of(tar))
    flip(tar, row["offset"] + rng.randrange(row["size_bytes"]), rng.randrange(8))
    status, lines = verify()
    assert status == 1
    bad = [line for line in lines if line.startswith("bad: ") and "sha256" not in line]
    path = tar.relative_to(cache_copy)
    changed = "its bytes have changed since they were written (crc32)"
    assert bad == [f"bad: {path}: {row['key'].hex()} {row['member']}: {changed}"]
    assert lines[-1] == f"damaged: 1 keys; run `python -m preprocess.verify {cache_copy} --repair`"
    assert verify("--quick")[0] == 0  # it reads no payload, and says so in its help


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flags", [(), ("--quick",)])
def test_a_flipped_bit_in_a_tar_header_is_named(verify, cache_copy, flags, seed):
    rng, tar = random.Random(seed), one_part(cache_copy, KINDS[seed % 2])
    row = rng.choice(rows_of(tar))
    flip(tar, row["offset"] - 512 + rng.choice([*range(148), *range(156, 512)]), rng.randrange(8))
    status, lines = verify(*flags)
    assert status == 1
    named = f"bad: {tar.relative_to(cache_copy)}: {row['key'].hex()} {row['member']}: its tar header is "
    assert [line.startswith(named) for line in lines].count(True) == 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("flags", [(), ("--quick",)])
def test_a_flipped_bit_in_an_index_is_named_and_mended_from_the_tar(verify, cache_copy, flags, seed):
    rng, tar = random.Random(seed), one_part(cache_copy, KINDS[seed % 2])
    index = tar.with_suffix(".parquet")
    whole = index.read_bytes()
    flip(index, rng.randrange(len(whole)), rng.randrange(8))
    status, lines = verify(*flags)
    assert status == 1
    assert [line for line in lines if line.startswith(f"bad: {index.relative_to(cache_copy)}: ")]
    assert len([line for line in lines if line.startswith(("bad:", "missing:"))]) == 1
    status, lines = verify("--repair", *flags)
    assert status == 0
    assert f"mended: {tar.relative_to(cache_copy).with_suffix('')}: kept " in " ".join(lines)
    assert index.read_bytes() == whole
    assert verify()[0] == 0


def test_a_flipped_bit_that_is_no_members_is_named_and_mended(verify, cache_copy):
    tar = one_part(cache_copy, "latents")
    whole = tar.read_bytes()
    flip(tar, len(whole) - 5)
    status, lines = verify()
    assert status == 1
    assert lines[0] == f"bad: {tar.relative_to(cache_copy)}: has another sha256 than its name"
    assert verify("--quick")[0] == 0
    assert verify("--repair")[0] == 0
    assert tar.read_bytes() == whole


def test_no_bit_of_an_index_can_change_unnoticed(cache):
    """Those too that change nothing of what it says: statistics, the name of its writer, padding."""
    data = one_part(cache, "latents").with_suffix(".parquet").read_bytes()
    assert is_index_as_written(data)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        assert not is_index_as_written(bytes(flipped))


# Indexes and tars that someone has forged.


def forged(change: str, tar: Path) -> str:
    """Damage a part so that its index still proves itself. Returns what verify must say of it."""
    rows = rows_of(tar)
    row = next(row for row in rows if row["member"] == "moments.npy")
    if change == "shape":
        row["shape"] = [2**31 - 1] * 4
        fault = "holds float16 "
    elif change == "dtype":
        row["dtype"] = "object"
        fault = "the index says object"
    elif change == "member":
        row["member"] = "../../\x1b[2Jx\n.npy"
        fault = "its tar header is of "
    elif change == "key":
        row["key"] = b"k" * 16
        fault = "its tar header is of "
    elif change == "offset":
        row["offset"] += 512
        fault = "its tar header is "
    elif change == "overlap":
        row["offset"] = rows[0]["offset"]
        fault = "it lies within the member before it"
    elif change == "start":
        row["offset"] = 0
        fault = "lie outside the tar"
    elif change == "twice":
        rows.append(dict(row))
        fault = "is there twice"
    elif change == "alone":
        rows.remove(row)
        fault = "its key has no moments.npy"
    elif change == "claims":
        row["size_bytes"] = MEMBER_BYTES + 1
        fault = f"claims {MEMBER_BYTES + 1} bytes, more than a member has"
    forge(tar, rows, **({"tar_size_bytes": 8 << 40} if change == "claims" else {}))
    return fault


@pytest.mark.parametrize(
    "change", ["shape", "dtype", "member", "key", "offset", "overlap", "start", "twice", "alone", "claims"]
)
def test_a_forged_index_gives_lines(verify, cache_copy, change):
    fault = forged(change, one_part(cache_copy, "latents"))
    status, lines = verify()
    assert status == 1
    assert fault in " ".join(line for line in lines if line.startswith("bad:"))
    assert all(line.isprintable() for line in lines)
    assert verify("--repair")[0] == 0


def test_a_claim_of_terabytes_is_not_read(verify, cache_copy):
    tar = one_part(cache_copy, "latents")
    os.truncate(tar, 8 << 40)  # sparse: it takes no room
    status, lines = verify()
    assert status == 1
    assert lines[0].startswith(f"bad: {tar.relative_to(cache_copy)}: has {8 << 40} bytes, its index promises ")
    assert verify("--repair")[0] == 0


def test_a_part_of_nothing_but_nan_or_other_axes_is_bad(verify, cache_copy):
    store = one_part(cache_copy, "latents").parent
    publish(cache_copy, store, {b"n" * 16: np.full((2, 1, 2, 2), np.nan, "f2"), b"g" * 16: np.ones((2, 1, 2, 2), "f2")})
    publish(cache_copy, store, {b"a" * 16: np.ones((4, 4), "f4")})
    status, lines = verify()
    assert status == 1
    assert [line for line in lines if f"{(b'n' * 16).hex()} moments.npy: holds NaN or infinity" in line]
    assert [
        line for line in lines if f"{(b'a' * 16).hex()} moments.npy: has the shape [4, 4]; must have 4 axes" in line
    ]
    assert len([line for line in lines if line.startswith("bad:")]) == 2
    assert verify("--repair")[0] == 0
    assert verify()[0] == 0
    held = b"".join(row["key"] for path in store.glob("*.parquet") for row in rows_of(path.with_suffix(".tar")))
    assert b"g" * 16 in held
    assert b"n" * 16 not in held


def test_an_array_that_is_none_is_bad(verify, cache_copy):
    """`.npy` of objects would be unpickled by a careless reader."""
    store = one_part(cache_copy, "latents").parent
    tar = publish(cache_copy, store, {b"p" * 16: np.ones((1, 1, 1, 1), "f4")})
    data = tar.read_bytes().replace(
        encode_array(np.ones((1, 1, 1, 1), "f4"))[:60], b"\x93NUMPY\x01\x00v\x00{'descr': '|O'" + b" " * 35
    )
    tar.write_bytes(data)
    rows = rows_of(tar)
    rows[0]["crc32"] = zlib.crc32(data[rows[0]["offset"] :][: rows[0]["size_bytes"]])
    forge(tar, rows)
    status, lines = verify()
    assert status == 1
    assert [line for line in lines if "moments.npy: is not an .npy array of floats" in line]


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_is_none_gives_a_line(verify, cache_copy, name):
    tar = one_part(cache_copy, "latents")
    index = tar.with_suffix(".parquet")
    whole = index.read_bytes()
    index.write_bytes(HOSTILE[name])
    status, lines = verify()
    assert status == 1
    assert len([line for line in lines if line.startswith("bad:")]) == 1
    assert lines[0].startswith(f"bad: {index.relative_to(cache_copy)}: ")
    assert verify("--repair")[0] == 0
    assert index.read_bytes() == whole


def test_an_index_cut_anywhere_is_mended(verify, cache_copy):
    index = one_part(cache_copy, "embeddings").with_suffix(".parquet")
    whole = index.read_bytes()
    for size_bytes in (1, len(whole) // 2, len(whole) - 1):
        index.write_bytes(whole[:size_bytes])
        assert verify("--repair")[0] == 0
        assert index.read_bytes() == whole


def test_an_index_under_another_name_goes(verify, cache_copy):
    index = one_part(cache_copy, "latents").with_suffix(".parquet")
    shutil.copy(index, index.with_name("copy.parquet"))
    status, lines = verify()
    assert status == 1
    assert f"copy.parquet: is the index of part {index.stem}" in lines[0] + lines[1]
    assert verify("--repair")[0] == 0
    assert index.exists()
    assert not index.with_name("copy.parquet").exists()


def test_a_tar_of_other_things_gives_lines(verify, cache_copy):
    tar = one_part(cache_copy, "latents")
    with tarfile.open(tar, "w") as other:
        other.addfile(tarfile.TarInfo("../../etc/passwd"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        other.addfile(link)
    tar.with_suffix(".parquet").write_bytes(b"")
    status, lines = verify()
    assert status == 1
    assert lines[1] == f"bad: {tar.relative_to(cache_copy)}: has another sha256 than its name"
    assert verify("--repair")[0] == 0
    assert not tar.exists()
