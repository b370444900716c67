"""repair: what it drops, and only that, stage 1 makes again, equal to what was there."""

import json
import os
import re
import shlex
from pathlib import Path

import fsspec
import pytest

from preprocess.__main__ import main as preprocess
from preprocess.verify import main
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import UserError
from shared.storage import Storage
from tests.damage import arrays, flip, one_part, rows_of, verifier

MAIN = {"latents": "moments.npy", "embeddings": "prompt_embeds.npy"}


@pytest.fixture
def verify(cache_copy, capsys):
    return verifier(cache_copy, capsys)


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
    tar = one_part(cache_copy, "latents")
    flip(tar, rows_of(tar)[0]["offset"])
    removed, remove = [], Storage.remove

    def watched(self, path):
        removed.append(path)
        remove(self, path)

    monkeypatch.setattr(Storage, "remove", watched)
    verify("--repair")
    bad = str(tar.relative_to(cache_copy).with_suffix(""))
    assert removed == [f"{bad}.parquet", f"{bad}.tar"]


def test_a_disk_that_fails_is_one_line(verify, cache_copy, monkeypatch):
    tar = one_part(cache_copy, "latents")
    flip(tar, rows_of(tar)[0]["offset"])

    def full(self, finished, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "publish", full)
    with pytest.raises(UserError, match="No space left on device"):
        verify("--repair")
    assert tar.exists()


def test_a_remote_cache_is_verified_and_repaired(cache, capsys):
    system = fsspec.filesystem("memory")
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
