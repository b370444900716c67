"""export: joined tars that webdataset and tarfile read, bit for bit what the cache holds."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from preprocess.export import NOTE, main
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CacheError, ConfigError
from tests.conftest import run_command


@pytest.fixture(scope="module")
def exported(cache, tmp_path_factory) -> list[Path]:
    """The data set `squares` in tars of three samples."""
    folder = tmp_path_factory.mktemp("export") / "out"
    output = str(folder / "{shard:06d}.tar")
    assert main([str(cache), "--dataset", "squares", "--output", output, "--samples_per_shard", "3"]) == 0
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def dataset(cache):
    return open_dataset(Cache(str(cache)), "squares")


def load(payload: bytes) -> np.ndarray:
    return np.load(io.BytesIO(payload), allow_pickle=False)


def test_the_tars_hold_every_sample_once_in_order(exported, dataset):
    assert [path.name for path in exported] == ["000000.tar", "000001.tar", "000002.tar"]
    names = []
    for path in exported:
        with tarfile.open(path) as tar:
            assert {(member.mtime, member.uid, member.uname, member.pax_headers == {}) for member in tar} == {
                (0, 0, "", True)
            }
            names.append(list(dict.fromkeys(member.name.partition(".")[0] for member in tar)))
    assert [len(found) for found in names] == [3, 3, 1]
    assert [name for found in names for name in found] == dataset.columns("sample_id")["sample_id"].to_pylist()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
def test_webdataset_reads_what_the_cache_holds(exported, dataset):
    import webdataset

    latents, embeddings = dataset.open_store("latent"), dataset.open_store("embedding")
    rows = {row["sample_id"]: row for row in dataset.columns(*dataset._file.schema_arrow.names).to_pylist()}
    samples = list(webdataset.WebDataset([str(path) for path in exported], shardshuffle=False).decode())
    assert len(samples) == 7
    for sample in samples:
        row = rows[sample["__key__"]]
        for member, store, kind in (
            ("moments.npy", latents, "latent"), ("mirrored.npy", latents, "mirrored"),
            ("prompt_embeds.npy", embeddings, "embedding"),
        ):  # fmt: skip
            expected = load(store.read(row[f"{kind}_key"]))
            assert sample[member].dtype == expected.dtype
            assert np.array_equal(sample[member], expected)
        facts = ("caption", "effective_prompt", "bucket", "fps", "frame_indices", "source", "weight")
        assert sample["json"] == {**{name: row[name] for name in facts}, "note": NOTE}
    assert "neither drawn from nor scaled" in NOTE


def test_the_same_data_set_gives_the_same_bytes(exported, cache, tmp_path):
    output = str(tmp_path / "again-{shard}.tar")
    assert main([str(cache), "--dataset", "squares", "--output", output, "--samples_per_shard", "3"]) == 0
    for one, other in zip(exported, sorted(tmp_path.iterdir()), strict=True):
        assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_a_version_by_its_first_digits(cache, dataset, tmp_path, capsys):
    output = str(tmp_path / "{shard}.tar")
    flags = [str(cache), "--dataset", "squares", "--output", output]
    assert main([*flags, "--version", dataset.digest[:6]]) == 0
    assert f"version {dataset.digest[:12]}" in capsys.readouterr().out
    with pytest.raises(CacheError, match="is no version of data set 'squares'"):
        main([*flags, "--version", "nothing"])


def test_existing_tars_are_refused_unless_told(cache, tmp_path):
    flags = [str(cache), "--dataset", "squares", "--output", str(tmp_path / "{shard}.tar")]
    (tmp_path / "0.tar").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"0\.tar: is there already; give --overwrite"):
        main(flags)
    assert (tmp_path / "0.tar").read_bytes() == b"precious"
    assert main([*flags, "--overwrite"]) == 0
    assert tarfile.is_tarfile(tmp_path / "0.tar")


def test_tars_of_a_longer_export_are_not_left_among_the_new(cache, tmp_path):
    flags = [str(cache), "--dataset", "squares", "--output", str(tmp_path / "{shard}.tar"), "--overwrite"]
    assert main([*flags, "--samples_per_shard", "2"]) == 0
    with pytest.raises(ConfigError, match=r"1\.tar: is of a longer export"):
        main(flags)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("out.tar", "must hold the shard's number"),
        ("{part}.tar", "give such as 'out/{shard:06d}.tar'"),
        ("{shard:xyz}.tar", "give such as"),
        ("{}.tar", "give such as"),
        ("{shard", "give such as"),
        ("{shard.nothing}.tar", "give such as"),
        ("s3://bucket/{shard}.tar", "must be a path on this machine"),
    ],
)
def test_an_output_that_cannot_be_is_refused(cache, output, told):
    with pytest.raises(ConfigError, match=told.replace("{", r"\{")):
        main([str(cache), "--dataset", "squares", "--output", output])


def test_damage_ends_it_by_name_and_leaves_no_torn_tar(cache_copy, tmp_path):
    (tar,) = cache_copy.glob("latents/*/*.tar")
    dataset = open_dataset(Cache(str(cache_copy)), "squares")
    row = dataset.columns("sample_id", "latent_offset").to_pylist()[4]
    data = bytearray(tar.read_bytes())
    data[row["latent_offset"] + 200] ^= 1
    tar.write_bytes(data)
    out = tmp_path / "out"
    flags = [str(cache_copy), "--dataset", "squares", "--output", str(out / "{shard}.tar"), "--samples_per_shard", "3"]
    with pytest.raises(CacheError, match=f"sample {row['sample_id']}, latent .* has changed since it was written"):
        main(flags)
    assert [path.name for path in out.iterdir()] == ["0.tar"]


def test_a_cache_without_the_store_is_one_line(cache_copy, tmp_path):
    (info,) = cache_copy.glob("datasets/squares/versions/*/dataset.json")
    info.write_text(json.dumps({**json.loads(info.read_text(encoding="utf-8")), "facts": 3}), encoding="utf-8")
    with pytest.raises(CacheError, match="its facts of latents do not have its fingerprint"):
        main([str(cache_copy), "--dataset", "squares", "--output", str(tmp_path / "{shard}.tar")])


def test_as_a_user_runs_it(cache, tmp_path):
    output = str(tmp_path / "out" / "{shard:06d}.tar")
    done = run_command("-m", "preprocess.export", str(cache), "--dataset", "squares", "--output", output)
    assert done.returncode == 0, done.stderr
    assert "exported  7 samples in 1 tars" in done.stdout
    assert "neither drawn from nor scaled" in done.stdout
    again = run_command("-m", "preprocess.export", str(cache), "--dataset", "squares", "--output", output)
    assert (again.returncode, again.stdout, len(again.stderr.splitlines())) == (2, "", 1)
