"""ls: what a cache holds, and how two versions of a data set differ."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preprocess.__main__ import main as preprocess
from preprocess.ls import LINES, main
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, ConfigError
from tests.conftest import ROOT, run_command


@pytest.fixture(scope="module")
def two_versions(cache, clips, tiny_2b, tmp_path_factory) -> tuple[Path, str, str]:
    """A cache with a second version of `squares` (a caption edited, a clip gone, another bucket), and both digests."""
    folder = Path(shutil.copytree(cache, tmp_path_factory.mktemp("ls") / "cache"))
    other = Path(shutil.copytree(clips, folder.parent / "clips"))
    (other / "3.txt").write_text("a square of another colour", encoding="utf-8")
    (other / "6.mp4").unlink()
    (other / "6.txt").unlink()
    old = open_dataset(Cache(str(folder)), "squares").digest
    flags = ["--cache", str(folder), "--dataset", "squares", "--pretrained_model_name_or_path", str(tiny_2b)]
    flags += ["--dataset_name", str(other), "--buckets", "9x64x96", "--id_token", "SQR", "--random_flip", "0.5"]
    assert preprocess(flags) == 0
    return folder, old, open_dataset(Cache(str(folder)), "squares").digest


def listed(capsys, *argv: str) -> list[str]:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_stores_and_versions_are_listed(two_versions, capsys):
    folder, old, new = two_versions
    lines = listed(capsys, folder)
    assert lines[0] == f"cache  {folder}"
    text = "\n".join(lines)
    facts = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/*/fingerprint.json")}
    for fingerprint, told in facts.items():
        kind, model = told["kind"], told.get("vae") or told["text_encoder"]
        keys = 14 + 4 if kind == "latents" else 10 + 1
        row = rf"{kind} +{fingerprint} +2 +{keys} +[\d.]+  float32 kept as float16, weights {model['weights'][0][:12]}"
        assert re.search(row, text)
    assert "data set  squares" in lines
    assert re.search(rf"^   {old[:12]} +7  \S+ \S+  9x64x96: 5, 9x96x64: 2  \S+2b$", text, re.MULTILINE)
    assert re.search(rf"^\*  {new[:12]} +6  \S+ \S+  9x64x96: 6 +\S+2b$", text, re.MULTILINE)


def test_columns_are_aligned(two_versions, capsys):
    lines = listed(capsys, two_versions[0])
    head = next(line for line in lines if line.startswith("store"))
    latents = next(line for line in lines if line.startswith("latents"))
    assert latents.index(latents.split()[1]) == head.index("fingerprint")
    assert latents.index("2 ", 45) == head.index("parts") + len("parts") - 1


def test_one_data_set_alone(two_versions, capsys):
    lines = listed(capsys, two_versions[0], "--dataset", "squares")
    assert lines[1] == "data set  squares"
    assert len(lines) == 1 + 4


def test_the_difference_of_two_versions(two_versions, capsys):
    folder, old, new = two_versions
    lines = listed(capsys, folder, "--dataset", "squares", "--diff", old[:8], new[:8])
    assert lines[:2] == [f"squares: {old[:12]} -> {new[:12]}", "samples   7 -> 6"]
    assert lines[2:4] == ["added     0", "removed   1"]
    assert re.fullmatch(r"  - \w{32}  6\.mp4  9x64x96  'a square of colour number 6'", lines[4])
    assert lines[5] == "changed   3"
    changed = {line.split()[2]: line for line in lines if line.startswith("  ~ ")}
    assert set(changed) == {"2.mp4", "3.mp4", "5.mp4"}
    assert changed["2.mp4"].endswith("bucket '9x96x64' -> '9x64x96', latent, mirrored")
    caption = "caption 'a square of colour number 3' -> 'a square of another colour', embedding"
    assert changed["3.mp4"].endswith(caption)
    assert "config       buckets: '9x64x96,9x96x64' -> '9x64x96'" in lines
    assert "config       validation_prompt: 'a blue square:::a red square' -> None" in lines


def test_the_other_way_round_a_sample_is_added(two_versions, capsys):
    folder, old, new = two_versions
    lines = listed(capsys, folder, "--dataset", "squares", "--diff", new, old)
    assert lines[2] == "added     1"
    assert lines[3].startswith("  + ")


def test_a_version_does_not_differ_from_itself(two_versions, capsys):
    folder, old, _ = two_versions
    lines = listed(capsys, folder, "--dataset", "squares", "--diff", old, old[:5].upper())
    assert lines[1:] == ["samples   7 -> 7", "added     0", "removed   0", "changed   0"]


def test_long_differences_are_cut(two_versions, capsys, monkeypatch):
    folder, old, new = two_versions
    monkeypatch.setattr("preprocess.ls.LINES", 2)
    lines = listed(capsys, folder, "--dataset", "squares", "--diff", old, new)
    assert "    and 1 more" in lines
    assert len([line for line in lines if line.startswith("  ~ ")]) == 2
    assert LINES == 20


def test_mistakes_are_named(two_versions):
    folder = str(two_versions[0])
    with pytest.raises(ConfigError, match="--diff compares two versions of a data set; give --dataset too"):
        main([folder, "--diff", "a", "b"])
    with pytest.raises(CacheError, match="no data set 'circles'; it has squares"):
        main([folder, "--dataset", "circles"])
    with pytest.raises(CacheError, match="'xyz' is no version of data set 'squares'; give the first digits of: "):
        main([folder, "--dataset", "squares", "--diff", "xyz", two_versions[1]])
    with pytest.raises(CacheError, match="'' is more than one version of data set 'squares'"):
        main([folder, "--dataset", "squares", "--diff", "", two_versions[1]])
    with pytest.raises(ConfigError, match="use letters"):
        main([folder, "--dataset", "../.."])


def test_damage_is_a_word_not_a_traceback(cache_copy, capsys):
    for path in [*cache_copy.glob("latents/*/*.parquet"), *cache_copy.glob("*/*/fingerprint.json")]:
        path.write_bytes(b"\x1b[2J{}")
    (info,) = cache_copy.glob("datasets/*/versions/*/dataset.json")
    info.write_bytes(b"[" * 100_000)
    lines = listed(capsys, cache_copy)
    assert len([line for line in lines if "cannot be read; run `python -m preprocess.verify`" in line]) == 3
    assert all(line.isprintable() for line in lines)


def test_as_a_user_runs_it(cache):
    done = run_command("-m", "preprocess.ls", str(cache))
    assert done.returncode == 0
    assert done.stderr == ""
    assert "data set  squares" in done.stdout.splitlines()
    refused = run_command("-m", "preprocess.ls", str(cache / "nothing"))
    assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (2, "", 1)


@pytest.mark.parametrize("name", ["verify", "gc", "ls", "export"])
def test_help_loads_no_torch(name):
    code = (
        f"import sys\nfrom preprocess.{name} import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'diffusers', 'webdataset'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Exit status" in " ".join(done.stdout.split())
