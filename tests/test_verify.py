"""verify: every kind of damage has a line that names it; what repair drops, and only that, stage 1 makes again."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.__main__ import main as preprocess
from preprocess.parts import MEMBER_BYTES
from preprocess.verify import main
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, UserError
from shared.shards import INDEX_SCHEMA, ShardWriter, encode_array, read_index, write_index
from tests.conftest import ROOT, run_command

KINDS = ("latents", "embeddings")
MAIN = {"latents": "moments.npy", "embeddings": "prompt_embeds.npy"}


@pytest.fixture
def verify(cache_copy, capsys):
    """Run verify on the copy; its exit status and its lines."""

    def run(*flags: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        status = main([str(cache_copy), *flags])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return status, told.out.splitlines()

    return run


@pytest.fixture(scope="session")
def again(tiny_2b: Path, clips: Path):
    """Run the stage 1 that made `cache` once more, in a copy; its report."""

    def run(folder: Path) -> dict:
        flags = ["--cache", str(folder), "--dataset", "squares", "--pretrained_model_name_or_path", str(tiny_2b)]
        flags += ["--dataset_name", str(clips), "--buckets", "9x64x96,9x96x64", "--id_token", "SQR"]
        preprocess([*flags, "--random_flip", "0.5", "--validation_prompt", "a blue square:::a red square"])
        dataset = open_dataset(Cache(str(folder)), "squares")
        return json.loads((folder / dataset.folder / "report.json").read_text(encoding="utf-8"))

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


# What is clean.


@pytest.mark.parametrize("flags", [(), ("--quick",), ("--repair",)])
def test_a_whole_cache_is_clean(verify, cache_copy, flags):
    before = arrays(cache_copy)
    status, lines = verify(*flags)
    assert status == 0
    assert lines[-1] == "clean"
    assert re.fullmatch(r"looked at 2 parts \(24 keys, [\d.]+ MB\) and 1 versions", lines[-2])
    assert len(lines) == 2
    assert arrays(cache_copy) == before


def test_as_a_user_runs_it(cache):
    done = run_command("-m", "preprocess.verify", str(cache))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "clean")
    assert "Traceback" not in done.stderr


def test_help_says_the_exit_statuses_and_loads_no_torch():
    code = (
        "import sys\nfrom preprocess.verify import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Exit status: 0 clean, 1 damaged" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_where_there_is_no_cache(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError):
        main([str(tmp_path / name)])


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
    rng, tar = random.Random(seed), one_part(cache_copy, rng_kind(seed))
    row = rng.choice(rows_of(tar))
    flip(tar, row["offset"] - 512 + rng.choice([*range(148), *range(156, 512)]), rng.randrange(8))
    status, lines = verify(*flags)
    assert status == 1
    named = f"bad: {tar.relative_to(cache_copy)}: {row['key'].hex()} {row['member']}: its tar header is "
    assert [line.startswith(named) for line in lines].count(True) == 1


def rng_kind(seed: int) -> str:
    return KINDS[seed % 2]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("flags", [(), ("--quick",)])
def test_a_flipped_bit_in_an_index_is_named_and_mended_from_the_tar(verify, cache_copy, flags, seed):
    rng, tar = random.Random(seed), one_part(cache_copy, rng_kind(seed))
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


# Repair, and the run after it.


def test_stage_1_makes_again_what_repair_dropped_and_nothing_else(verify, cache_copy, again):
    whole = arrays(cache_copy)
    dropped = {}
    for kind, number in (("latents", 3), ("embeddings", 2)):
        tar = one_part(cache_copy, kind)
        rows = rows_of(tar)
        dropped[kind] = {row["key"].hex() for row in rows[:: len(rows) // number][:number]}
        for key in dropped[kind]:
            (row,) = (row for row in rows if (row["key"].hex(), row["member"]) == (key, MAIN[kind]))
            flip(tar, row["offset"] + row["size_bytes"] // 2)
    status, lines = verify()
    assert status == 1
    assert {word for line in lines if "crc32" in line for word in line.split()} >= set().union(*dropped.values())

    status, lines = verify("--repair")
    assert status == 0
    assert len([line for line in lines if re.search(r"mended: .* kept 11 keys in \w{32}, dropped 3$", line)]) == 1
    assert len([line for line in lines if re.search(r"mended: .* kept 8 keys in \w{32}, dropped 2$", line)]) == 1
    assert f"incomplete: data set squares; run again: python -m preprocess --cache {cache_copy} " in lines[-1]
    kept = arrays(cache_copy)
    assert kept.items() <= whole.items()
    gone = {name.partition("/")[2].partition(".")[0] for name in whole.keys() - kept.keys()}
    assert gone == dropped["latents"] | dropped["embeddings"]

    status, lines = verify()  # good, and incomplete until stage 1 has run
    assert status == 1
    assert not [line for line in lines if line.startswith("bad:")]
    assert [line for line in lines if line.startswith("missing: squares, version ")]

    assert again(cache_copy)["encoded"] == {"latents": 3, "images": 0, "embeddings": 2}
    assert arrays(cache_copy) == whole
    assert verify()[0] == 0


def test_the_command_that_repair_prints_is_the_one_to_run(verify, cache_copy, again):
    tar = one_part(cache_copy, "embeddings")
    for file in (tar, tar.with_suffix(".parquet")):
        file.unlink()
    status, lines = verify()
    assert status == 1
    missing = [line for line in lines if line.startswith("missing:")]
    assert len(missing) == 7 + 3  # samples; the empty and the validation prompts
    assert "prompt 'SQR a blue square'" in " ".join(missing)
    words = lines[-1].partition("run again: python -m ")[2]
    assert words.startswith("preprocess --cache ")
    import shlex

    assert preprocess(shlex.split(words)[1:]) == 0
    assert verify()[0] == 0


@pytest.mark.parametrize("flags", [(), ("--quick",)])
def test_a_cut_tar_names_each_key_that_it_lost(verify, cache_copy, flags):
    tar = one_part(cache_copy, "latents")
    rows = rows_of(tar)
    cut = rows[len(rows) // 2]["offset"] + 1
    os.truncate(tar, cut)
    lost = {row["key"].hex() for row in rows if row["offset"] + row["size_bytes"] > cut}
    status, lines = verify(*flags)
    assert status == 1
    assert lines[0].startswith(f"bad: {tar.relative_to(cache_copy)}: has {cut} bytes, its index promises ")
    assert {line.split()[2] for line in lines[1:] if line.startswith("bad:")} == lost
    assert verify("--repair")[0] == 0
    left = {row["key"].hex() for row in rows_of(one_part(cache_copy, "latents"))}
    assert left == {row["key"].hex() for row in rows} - lost


def test_a_tar_that_is_gone_names_each_of_its_keys(verify, cache_copy):
    tar = one_part(cache_copy, "embeddings")
    keys = {row["key"].hex() for row in rows_of(tar)}
    tar.unlink()
    status, lines = verify("--quick")
    assert status == 1
    assert lines[0] == f"bad: {tar.relative_to(cache_copy)}: is missing"
    assert {line.split()[2] for line in lines if line.endswith(": the tar is missing")} == keys
    status, lines = verify("--repair")
    assert status == 0
    assert f"mended: {tar.relative_to(cache_copy).with_suffix('')}: kept 0 keys, dropped 10" in lines
    assert not tar.with_suffix(".parquet").exists()


def test_an_index_and_a_tar_that_are_both_bad_prove_nothing(verify, cache_copy):
    tar = one_part(cache_copy, "latents")
    flip(tar, rows_of(tar)[0]["offset"])
    flip(tar.with_suffix(".parquet"), 300)
    status, lines = verify()
    assert status == 1
    assert len([line for line in lines if "nothing proves it, as the index is damaged too" in line]) == 14
    assert verify("--repair")[0] == 0
    assert not tar.exists()


def test_repair_removes_the_bad_index_before_the_bad_tar(verify, cache_copy, monkeypatch):
    """Killed in between, it leaves a tar without an index, which is not there for any reader."""
    from shared.storage import Storage

    tar, removed = one_part(cache_copy, "latents"), []
    flip(tar, rows_of(tar)[0]["offset"])
    remove = Storage.remove
    monkeypatch.setattr(Storage, "remove", lambda self, path: (removed.append(path), remove(self, path)))
    verify("--repair")
    bad = str(tar.relative_to(cache_copy).with_suffix(""))
    assert removed == [f"{bad}.parquet", f"{bad}.tar"]


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
        with tar.open("ab") as file:
            file.truncate(8 << 40)  # sparse: it takes no room
        row["size_bytes"] = MEMBER_BYTES + 1
        fault = f"claims {MEMBER_BYTES + 1} bytes, more than a member has"
    forge(tar, rows)
    return fault


@pytest.mark.parametrize("change", ["shape", "dtype", "member", "key", "offset", "overlap", "start", "twice", "alone"])
def test_a_forged_index_gives_lines(verify, cache_copy, change):
    fault = forged(change, one_part(cache_copy, "latents"))
    status, lines = verify()
    assert status == 1
    assert fault in " ".join(line for line in lines if line.startswith("bad:"))
    assert all(line.isprintable() for line in lines)
    assert verify("--repair")[0] == 0


def test_a_claim_of_terabytes_is_not_read(verify, cache_copy):
    fault = forged("claims", one_part(cache_copy, "latents"))
    status, lines = verify("--quick") if shutil.disk_usage("/").total < 8 << 40 else (1, [fault])
    assert status == 1


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
    import zlib

    rows[0]["crc32"] = zlib.crc32(data[rows[0]["offset"] :][: rows[0]["size_bytes"]])
    forge(tar, rows)
    status, lines = verify()
    assert status == 1
    assert [line for line in lines if "moments.npy: is not an .npy array of floats" in line]


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


# Stores and data sets.


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"kind": "latents"}', b"[" * 100_000, b"\xff"])
def test_a_bad_fingerprint_is_named_and_written_again(verify, cache_copy, content):
    path = one_part(cache_copy, "latents").with_name("fingerprint.json")
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    status, lines = verify()
    assert status == 1
    assert lines[0].startswith(f"bad: {path.relative_to(cache_copy)}: ")
    assert verify("--repair")[0] == 0
    assert path.read_bytes() == whole


def test_a_store_of_another_format_version_is_left_alone(verify, cache_copy):
    from shared.storage import canonical_json, digest_of

    facts = {"kind": "latents", "format_version": 2}
    store = cache_copy / "latents" / digest_of(facts, 16).hex()
    store.mkdir()
    (store / "fingerprint.json").write_bytes(canonical_json(facts))
    (store / f"{'ab' * 16}.parquet").write_bytes(b"of the future")
    status, lines = verify("--repair")
    assert status == 0
    assert lines[0] == f"skipped: latents/{store.name}: format version 2; this program knows 1"
    assert (store / f"{'ab' * 16}.parquet").exists()


@pytest.mark.parametrize("content", [b"", b"ab" * 32, b"../../etc", b"x" * 10_000])
def test_current_must_name_a_version(verify, cache_copy, content):
    (cache_copy / "datasets/squares/CURRENT").write_bytes(content)
    status, lines = verify()
    assert status == 1
    assert lines[0].startswith("bad: datasets/squares/CURRENT: is ")
    assert verify("--repair")[0] == 1  # only stage 1 knows


def version_folder(cache: Path) -> Path:
    (folder,) = (cache / "datasets/squares/versions").iterdir()
    return folder


def test_a_version_is_what_its_name_says(verify, cache_copy):
    path = version_folder(cache_copy) / "samples.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, *range(2, len(table))]), path)
    status, lines = verify()
    assert status == 1
    assert re.search(r"bad: datasets/squares/versions/\w{64}/samples.parquet: its digest is \w{64}; run", lines[0])


def test_a_place_that_is_another_members_is_noticed(verify, cache_copy):
    """The digest of a version does not cover places: a forged one would give a sample another sample's moments."""
    path = version_folder(cache_copy) / "samples.parquet"
    table = pq.read_table(path)
    for column in ("latent_offset", "latent_size_bytes", "latent_crc32"):
        values = table[column].to_pylist()
        values[0] = values[1]
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    pq.write_table(table, path)
    status, lines = verify()
    assert status == 1
    assert lines[0].endswith("latent not where the data set says; run stage 1 again")


@pytest.mark.parametrize("name", ["samples.parquet", "dataset.json"])
@pytest.mark.parametrize("content", [None, b"", b"\x00" * 100, b"[" * 100_000, HOSTILE["columns"], b"{}"])
def test_a_bad_version_gives_a_line(verify, cache_copy, name, content):
    path = version_folder(cache_copy) / name
    path.unlink() if content is None else path.write_bytes(content)
    status, lines = verify()
    assert status == 1
    assert len([line for line in lines if line.startswith("bad: datasets/squares/")]) == 1
    assert verify("--repair")[0] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"empty_prompt": None},
        {"validation_prompts": 3},
        {"fingerprints": []},
        {"empty_prompt": {"embedding_key": "xy"}},
    ],
)
def test_a_forged_dataset_json_gives_a_line(verify, cache_copy, change):
    path = version_folder(cache_copy) / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    status, lines = verify()
    assert status == 1
    assert len([line for line in lines if line.startswith("bad: ")]) == 1


def test_a_bad_memory_of_sources_is_removed(verify, cache_copy):
    path = cache_copy / "sources.parquet"
    path.write_bytes(path.read_bytes()[:100])
    status, lines = verify()
    assert status == 1
    assert lines[0].startswith("bad: sources.parquet: cannot be read")
    status, lines = verify("--repair")
    assert status == 0
    assert not path.exists()


# Leftovers.


def test_leftovers_are_told_and_only_old_ones_of_ours_are_removed(verify, cache_copy):
    store = one_part(cache_copy, "latents").parent
    old, young = store / f"{'ab' * 16}.tar", store / f"{'cd' * 16}.tar"
    hidden, foreign = store / ".x.parquet.1.2.tmp", store / "notes.txt"
    for path in (old, young, hidden, foreign):
        path.write_bytes(b"x" * 1024)
    for path in (old, hidden, foreign):
        os.utime(path, (time.time() - 4000,) * 2)
    status, lines = verify()
    assert status == 0
    told = [line for line in lines if line.startswith("leftover: ")]
    assert len(told) == 4
    assert f"leftover: {young.relative_to(cache_copy)}: a tar without an index, not yet an hour old" in told
    assert f"leftover: {foreign.relative_to(cache_copy)}: is no file of a store" in told
    assert lines[-1] == "clean"
    status, lines = verify("--repair")
    assert status == 0
    assert [path.exists() for path in (old, young, hidden, foreign)] == [False, True, False, True]


def test_dead_writers_are_told_and_removed_and_live_ones_stay(verify, cache_copy):
    dead = cache_copy / "writers" / "host-1-abcd"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (dead / "unfinished.tar").write_bytes(b"x")
    with Cache(str(cache_copy)).writer() as live:
        (dead).mkdir(exist_ok=True)  # a new writer has removed it already
        (dead / "lock").touch()
        status, lines = verify()
        assert status == 0
        assert [line for line in lines if line.startswith("leftover:")] == [
            f"leftover: writers/{dead.name}: of a writer that died"
        ]
        assert dead.exists()
        assert verify("--repair")[0] == 0
        assert not dead.exists()
        assert live.exists()


def test_a_disk_that_fails_is_one_line(verify, cache_copy, monkeypatch):
    from shared.storage import Storage

    tar = one_part(cache_copy, "latents")
    flip(tar, rows_of(tar)[0]["offset"])

    def full(self, finished, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "publish", full)
    with pytest.raises(UserError, match="No space left on device"):
        verify("--repair")
    assert tar.exists()


def test_a_remote_cache_is_verified_and_repaired(cache, capsys):
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    system.put(str(cache), "/verify/cache", recursive=True)
    assert main(["memory://verify/cache"]) == 0
    (tar,) = system.glob("/verify/cache/latents/*/*.tar")
    data = bytearray(system.cat_file(tar))
    data[1024] ^= 1
    system.pipe_file(tar, bytes(data))
    assert main(["memory://verify/cache"]) == 1
    assert main(["memory://verify/cache", "--repair"]) == 0
    assert not system.exists(tar)
    assert "kept 13 keys" in capsys.readouterr().out
