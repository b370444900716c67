"""verify: what is clean, and a line for whatever is wrong with stores, data sets and leftovers."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.verify import main
from shared.cache import Cache
from shared.errors import CacheError
from shared.storage import canonical_json, digest_of
from tests.conftest import ROOT, run_command
from tests.damage import HOSTILE, arrays, one_part, verifier


@pytest.fixture
def verify(cache_copy, capsys):
    return verifier(cache_copy, capsys)


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
