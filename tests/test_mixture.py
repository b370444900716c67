"""Several data sets in one run, weights of the manifest, and captions that are drawn."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from preprocess.__main__ import main
from shared.cache import Cache
from shared.dataset import open_dataset
from shared.errors import CheckpointError, ConfigError
from tests.training import column, facts_of, lora_of, rows_of, train_here
from train.config import TrainConfig
from train.mixture import Mixture
from train.plan import main as plan
from train.samples import DrawSettings, Samples

PLAIN = DrawSettings(seed=0, global_batch=4, stratified=True, random_flip=0.0, caption_dropout=0.0)


@pytest.fixture(scope="module")
def mixed(cache, clips, tiny_2b, tmp_path_factory):
    """A cache with three data sets: `squares`; `few`, of two clips; `said`, of two clips, one with three captions."""
    folder = tmp_path_factory.mktemp("mixed") / "cache"
    shutil.copytree(cache, folder)
    rows: dict[str, list[dict[str, object]]] = {
        "few": [{"video": "0.mp4", "caption": "one"}, {"video": "1.mp4", "caption": "two"}],
        "said": [
            {"video": "3.mp4", "caption": "often", "weight": 6.0},
            {"video": "4.mp4", "caption": "alone", "weight": 1.0},
            {"video": "3.mp4", "caption": "sometimes", "weight": 3.0},
            {"video": "3.mp4", "caption": "never", "weight": 0.0},
        ],
    }
    for name, told in rows.items():
        manifest = tmp_path_factory.mktemp("manifests") / f"{name}.jsonl"
        manifest.write_text("\n".join(map(json.dumps, told)))
        words = ["--cache", folder, "--dataset", name, "--pretrained_model_name_or_path", tiny_2b, "--dataset_name"]
        words += [manifest, "--instance_data_root", clips, "--height", "64", "--width", "96", "--max_num_frames", "9"]
        assert main([str(word) for word in words]) == 0
    return folder


def opened(cache, *names):
    return [open_dataset(Cache(str(cache)), name) for name in names]


def captions(cache, name):
    table = open_dataset(Cache(str(cache)), name).columns("sample_id", "caption")
    return dict(zip(table["sample_id"].to_pylist(), table["caption"].to_pylist(), strict=True))


# --- several data sets


def test_numbers_run_through_the_data_sets(mixed):
    datasets = opened(mixed, "squares", "few")
    mixture, parts = Mixture(datasets, [0.5, 0.5]), [Samples(dataset) for dataset in datasets]
    assert len(mixture) == 9
    for number in range(9):
        part, own = (0, number) if number < 7 else (1, number - 7)
        assert mixture.place(number) == (part, own)
        assert mixture.sample_id(number) == parts[part].sample_id(own)
        bucket = parts[part].bucket_names[parts[part].buckets[own]]
        assert mixture.bucket_names[mixture.buckets[number]] == bucket
        request = mixture.request(number, 3, 1, 1.0, PLAIN)
        assert request.dataset == part
        assert request.latent_key == parts[part].request(own, 3, 1, 1.0, PLAIN).latent_key


def test_the_plan_counts_the_buckets_of_all_of_them(mixed, capsys):
    """`few` has one bucket, `squares` that and another."""
    for dataset, buckets in (("few", ["9x64x96"]), ("few:0.3,squares:0.7", ["9x64x96", "9x96x64"])):
        capsys.readouterr()
        assert plan(["--cache", str(mixed), "--dataset", dataset, "--rank", "4", "--json"]) == 0
        assert [one["bucket"] for one in json.loads(capsys.readouterr().out)["buckets"]] == buckets


def test_one_data_set_is_numbered_as_it_is(mixed):
    (dataset,) = opened(mixed, "squares")
    mixture, samples = Mixture([dataset]), Samples(dataset)
    assert mixture.digest == dataset.digest
    assert mixture.numbers(None) is None
    assert mixture.draw_weights(None) is None
    assert (mixture.buckets == samples.buckets).all()


def test_each_data_set_has_its_share_of_the_draws(mixed, tmp_path):
    """Twenty epochs of nine draws: `few` has 0.7 of them whatever its size, each of its two clips half of that."""
    flags = {"dataset": "squares:0.3,few:0.7", "num_train_epochs": 20, "train_batch_size": 3, "learning_rate": 0}
    train_here(mixed, tmp_path / "run", **flags)
    few = captions(mixed, "few")
    drawn = Counter(sample for row in rows_of(tmp_path / "run") for sample in row["samples"])
    assert drawn.total() == 180
    share = sum(drawn[sample] for sample in few) / 180
    assert share == pytest.approx(0.7, abs=0.08)  # whole numbers of draws in each of two buckets
    assert drawn[min(few)] == pytest.approx(drawn[max(few)], abs=20)


def test_a_mixed_run_goes_on_bit_equal_and_not_with_other_shares(mixed, tmp_path):
    flags = {"dataset": "squares:1,few:2", "max_train_steps": 6, "checkpointing_steps": 3}
    train_here(mixed, tmp_path / "whole", **flags)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    assert train_here(mixed, run, **flags, resume_from_checkpoint="latest") == 0
    assert facts_of(run) == facts_of(tmp_path / "whole")
    assert lora_of(run) == lora_of(tmp_path / "whole")
    shutil.rmtree(run / "checkpoint-6")
    with pytest.raises(CheckpointError, match="dataset was 'squares:1,few:2' and is now 'squares:1,few:1'"):
        train_here(mixed, run, **{**flags, "dataset": "squares:1,few:1"}, resume_from_checkpoint="latest")


def test_what_is_held_out_is_of_no_data_set(mixed, tmp_path):
    """A video is held out of every data set that has it."""
    flags = {"dataset": "squares:0.5,few:0.5", "max_train_steps": 9, "holdout": 0.5, "learning_rate": 0}
    train_here(mixed, tmp_path / "run", **flags)
    sources: dict[str, str] = {}
    for name in ("squares", "few"):
        table = open_dataset(Cache(str(mixed)), name).columns("sample_id", "source")
        sources |= dict(zip(table["sample_id"].to_pylist(), table["source"].to_pylist(), strict=True))
    trained = {sources[sample] for row in rows_of(tmp_path / "run") for sample in row["samples"]}
    assert 2 <= len(trained) <= 4


def test_a_clip_under_another_name_is_held_out_with_it(mixed, clips, tiny_2b, tmp_path):
    """The same files in another folder, as another data set names them: what is held out is trained on in neither."""
    folder = shutil.copytree(clips, tmp_path / "clips" / "copies")
    cache = shutil.copytree(mixed, tmp_path / "cache")
    words = ["--cache", cache, "--dataset", "copies", "--pretrained_model_name_or_path", tiny_2b, "--dataset_name"]
    words += [folder.parent, "--buckets", "9x64x96,9x96x64"]
    assert main([str(word) for word in words]) == 0
    flags = {"dataset": "squares:0.5,copies:0.5", "max_train_steps": 14, "holdout": 0.2, "learning_rate": 0}
    train_here(cache, tmp_path / "run", **flags)
    keys: dict[str, bytes] = {}
    for name in ("squares", "copies"):
        table = open_dataset(Cache(str(cache)), name).columns("sample_id", "latent_key", "source")
        keys |= dict(zip(table["sample_id"].to_pylist(), table["latent_key"].to_pylist(), strict=True))
    assert len(set(keys.values())) == 7
    trained = Counter(keys[sample] for row in rows_of(tmp_path / "run") for sample in row["samples"])
    held = json.loads((tmp_path / "run" / "holdout.jsonl").read_text().splitlines()[0])["samples"]
    assert len(trained) == 7 - held / 2
    assert trained.total() == 14
    for number in (1, 2, 3, 4, 5, 6):
        (folder / f"{number}.mp4").unlink(), (folder / f"{number}.txt").unlink()
    for suffix in ("mp4", "txt"):
        shutil.copy(folder / f"0.{suffix}", folder.parent / f"same.{suffix}")
    assert main([str(word) for word in words]) == 0
    with pytest.raises(ConfigError, match=r"--holdout 0\.2: all of the clips that would be left are held out under an"):
        train_here(cache, tmp_path / "none", dataset="copies", holdout=0.2)


@pytest.mark.parametrize(
    ("value", "must"),
    [
        ("a:0,b:1", "shares must be above 0"),
        ("a:x,b:1", "shares must be above 0"),
        ("a:nan,b:1", "shares must be above 0"),
        ("a:1,b", "each needs its share"),
        ("a:1,a:2", "names a data set twice"),
        ("a:1,../b:2", "use letters"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(value, must):
    with pytest.raises(ConfigError, match=must):
        TrainConfig(dataset=value)


# --- weights and captions


def test_weights_of_the_manifest_are_how_often_a_sample_is_drawn(mixed, tmp_path):
    train_here(mixed, tmp_path / "run", dataset="said", num_train_epochs=10, learning_rate=0)
    said = captions(mixed, "said")
    drawn = Counter(said[sample] for row in rows_of(tmp_path / "run") for sample in row["samples"])
    assert drawn.total() == 40
    assert drawn["never"] == 0
    assert 20 <= drawn["often"] <= 30  # 2.4 in an epoch: two or three
    assert 10 <= drawn["sometimes"] <= 20
    assert 1 <= drawn["alone"] <= 10


def test_drawn_captions_visit_each_clip_once_an_epoch(mixed, tmp_path):
    train_here(mixed, tmp_path / "run", dataset="said", num_train_epochs=30, captions="draw", learning_rate=0)
    said = captions(mixed, "said")
    drawn = [said[sample] for row in rows_of(tmp_path / "run") for sample in row["samples"]]
    assert len(drawn) == 60
    assert Counter(drawn)["alone"] == 30
    assert {*drawn} == {"alone", "often", "sometimes"}
    assert 12 <= Counter(drawn)["often"] <= 27  # of 30 by 6 : 3


def test_a_clip_whose_captions_all_weigh_nothing_is_not_drawn(mixed, tmp_path, clips, tiny_2b):
    cache, manifest = shutil.copytree(mixed, tmp_path / "cache"), tmp_path / "m.jsonl"
    rows = [{"video": f"{number}.mp4", "caption": f"of {number}", "weight": float(number == 0)} for number in (0, 1, 0)]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    words = ["--cache", cache, "--dataset", "some", "--pretrained_model_name_or_path", tiny_2b, "--dataset_name"]
    words += [manifest, "--instance_data_root", clips, "--height", "64", "--width", "96", "--max_num_frames", "9"]
    assert main([str(word) for word in words]) == 0
    for drawn in ("draw", "all"):
        run = tmp_path / drawn
        train_here(cache, run, dataset="some", num_train_epochs=3, captions=drawn, learning_rate=0)
        said = captions(cache, "some")
        assert {said[sample] for row in rows_of(run) for sample in row["samples"]} == {"of 0"}


def test_the_caption_that_is_told_is_the_one_that_is_read(mixed):
    (dataset,) = opened(mixed, "said")
    mixture, table = Mixture([dataset], draw_captions=True), dataset.columns("sample_id", "embedding_key", "latent_key")
    keys = dict(zip(table["sample_id"].to_pylist(), table["embedding_key"].to_pylist(), strict=True))
    numbers = mixture.numbers(None)
    assert numbers is not None
    first, alone = numbers.tolist()
    assert (first, alone) == (0, 1)
    seen = set()
    for step in range(20):
        request = mixture.request(first, step, 0, 1.0, PLAIN)
        assert request.embedding_key == keys[mixture.sample_id(mixture.visited(first, step, 0, PLAIN.seed))]
        assert request.latent_key == table["latent_key"][0].as_py()
        seen.add(request.embedding_key)
        assert mixture.visited(alone, step, 0, PLAIN.seed) == alone
    assert len(seen) == 2


def test_dropping_the_last_batch_leaves_full_ones(mixed, tmp_path):
    train_here(mixed, tmp_path / "run", num_train_epochs=2, train_batch_size=2, drop_last=True)
    assert [len(samples) for samples in column(tmp_path / "run", "samples")] == [2] * 6
    with pytest.raises(ConfigError, match="--drop_last: no bucket has the 8 clips of a global batch"):
        train_here(mixed, tmp_path / "none", train_batch_size=8, drop_last=True)


def test_clips_that_no_epoch_has_are_told(mixed, tmp_path, capsys):
    """Five clips and two of another shape: the two fill no batch of 3, or their share of the draws comes to none."""
    train_here(mixed, tmp_path / "run", max_train_steps=1, train_batch_size=3, drop_last=True)
    told = "left out  all 2 clips of 9x96x64 are never trained on: an epoch has too few draws of them for a batch"
    assert told in capsys.readouterr().out
    train_here(mixed, tmp_path / "rare", max_train_steps=1, dataset="few:0.99,squares:0.01")
    assert told in capsys.readouterr().out
    train_here(mixed, tmp_path / "all", max_train_steps=1, train_batch_size=3)
    assert "left out" not in capsys.readouterr().out


def test_a_data_set_of_which_nothing_is_left_is_refused(mixed):
    mixture = Mixture(opened(mixed, "squares", "few"), [0.5, 0.5])
    with pytest.raises(ConfigError, match="--dataset few: no sample of it is left to train on"):
        mixture.draw_weights(np.arange(7))


def test_of_advice_a_clip_with_several_captions_is_one_clip(mixed, tmp_path, capsys):
    """`said`: four rows, of two clips."""
    train_here(mixed, tmp_path / "run", max_train_steps=1, dataset="said")
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice")]
    assert any("2 clips are few" in line for line in found)
    assert any("4 of 4 captions" in line for line in found)
