"""Held-out loss: what is held out, what is computed of it, and that the training does not notice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.cache import KEY_BYTES, Cache
from shared.dataset import open_dataset
from shared.errors import CheckpointError, ConfigError
from shared.models import load_transformer, open_checkpoint
from tests.conftest import moving_square, write_video
from tests.training import column, facts_of, lora_of, rows_of, train_here
from train.data import Samples
from train.holdout import DRAWS, QUARTILES, HeldOut, are_among, split_sources
from train.objective import Batch, alphas_cumprod, batch_loss
from train.reading import LatentDataset, collate


def looks(output_dir):
    return [json.loads(line) for line in (output_dir / "holdout.jsonl").read_text().splitlines()]


def test_all_clips_of_a_video_go_the_same_way():
    sources = [f"{number % 20}.mp4" for number in range(100)]
    held = split_sources(sources, 0.1)
    assert {sources[row] for row in range(100) if held[row]}.isdisjoint(
        sources[row] for row in range(100) if not held[row]
    )
    assert held.sum() == 10


@pytest.mark.parametrize(("videos", "share", "count"), [(2, 0.01, 1), (2, 0.99, 1), (25, 0.05, 1), (100, 0.05, 5)])
def test_at_least_one_video_and_never_all(videos, share, count):
    assert split_sources([f"{number}" for number in range(videos)], share).sum() == count


def test_another_video_moves_few():
    """A set that grows is held out much as before: old numbers stay comparable."""
    sources = [f"{number}" for number in range(100)]
    before, after = split_sources(sources, 0.1), split_sources([*sources, "new"], 0.1)
    assert (before != after[:-1]).sum() <= 1


def test_one_video_cannot_be_held_out():
    with pytest.raises(ConfigError, match=r"--holdout 0\.5: all .* one video"):
        split_sources(["a.mp4", "a.mp4"], 0.5)


@pytest.fixture(scope="module")
def held_run(cache, tmp_path_factory):
    """A run that holds out two of seven videos."""
    folder = tmp_path_factory.mktemp("held") / "run"
    assert train_here(cache, folder, max_train_steps=6, holdout=0.3, holdout_steps=4, checkpointing_steps=3) == 0
    return folder


def test_what_is_held_out_is_never_trained_on(cache, held_run, tmp_path):
    table = open_dataset(Cache(str(cache)), "squares").columns("sample_id", "source")
    held = split_sources(table["source"].to_pylist(), 0.3)
    names = {name for name, is_held in zip(table["sample_id"].to_pylist(), held, strict=True) if is_held}
    assert len(names) == 2
    trained = {sample for row in rows_of(held_run) for sample in row["samples"]}
    assert len(trained) == 5
    assert not names & trained


def test_it_is_looked_at_before_the_first_step_now_and_then_and_after_the_last(held_run):
    assert [row["step"] for row in looks(held_run)] == [0, 4, 6]
    assert all(row["samples"] == 2 and len(row["quartiles"]) == QUARTILES for row in looks(held_run))
    assert all(row["loss"] == pytest.approx(sum(row["quartiles"]) / QUARTILES) for row in looks(held_run))
    assert len({row["loss"] for row in looks(held_run)}) == 3


def test_before_the_first_step_it_is_the_untouched_models_loss(cache, tiny_2b, held_run):
    """Put together by hand: each sample that is held out, one timestep of each quarter."""
    dataset = open_dataset(Cache(str(cache)), "squares")
    checkpoint = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=())
    samples, reader = Samples(dataset), LatentDataset(dataset, checkpoint.facts, DRAWS)
    held = split_sources(dataset.columns("source")["source"].to_pylist(), 0.3)
    held_out = HeldOut(samples, reader, held.nonzero()[0])
    batches = [collate([reader[request] for request in places]) for places in held_out.requests(0, 1, QUARTILES)]
    assert len(batches) == 2
    transformer = load_transformer(checkpoint, torch.float32)
    schedule = alphas_cumprod(checkpoint.config("scheduler"))
    losses = []
    for batch in batches:
        assert isinstance(batch, Batch)
        assert sorted(batch.timesteps.tolist()) == sorted(batch.timesteps.tolist(), key=lambda t: t // 250)
        assert sorted(t // 250 for t in batch.timesteps.tolist()) == [0, 1, 2, 3]
        with torch.no_grad():
            losses.append(batch_loss(transformer, batch, checkpoint.facts, schedule, torch.float32).mean().item())
    assert looks(held_run)[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_what_is_seen_does_not_depend_on_the_ranks_or_the_batch(cache, tiny_2b):
    dataset = open_dataset(Cache(str(cache)), "squares")
    checkpoint = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=())
    samples = Samples(dataset)
    held = HeldOut(samples, LatentDataset(dataset, checkpoint.facts, DRAWS), torch.arange(7).numpy())
    whole = [request for places in held.requests(0, 1, 4) for request in places]
    dealt = [request for rank in range(3) for places in held.requests(rank, 3, 1) for request in places]
    assert sorted(whole, key=repr) == sorted(dealt, key=repr)
    assert len(whole) == 28


def test_looking_changes_no_number_of_the_training(cache, held_run, tmp_path):
    settings = {"max_train_steps": 6, "holdout": 0.3, "checkpointing_steps": 3}
    train_here(cache, tmp_path / "run", **settings, holdout_steps=1000)
    assert facts_of(tmp_path / "run") == facts_of(held_run)
    assert lora_of(tmp_path / "run") == lora_of(held_run)


def test_two_seeds_look_at_the_same(cache, held_run, tmp_path):
    train_here(cache, tmp_path / "run", max_train_steps=1, holdout=0.3, seed=43)
    assert looks(tmp_path / "run")[0]["loss"] == looks(held_run)[0]["loss"]


def test_a_resumed_run_repeats_the_looks_and_keeps_those_before(cache, held_run, tmp_path):
    import shutil

    run = shutil.copytree(held_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    flags = {"max_train_steps": 6, "holdout": 0.3, "holdout_steps": 4, "checkpointing_steps": 3}
    assert train_here(cache, run, **flags, resume_from_checkpoint="latest") == 0
    assert looks(run) == looks(held_run)
    with pytest.raises(CheckpointError, match="held_out was"):
        train_here(cache, run, **{**flags, "holdout": 0.5}, resume_from_checkpoint="latest")


def test_a_data_set_of_its_own_may_be_held_out_and_none_that_is_trained_on(cache_copy, tiny_2b, tmp_path):
    from preprocess.__main__ import main

    words = ["--cache", cache_copy, "--pretrained_model_name_or_path", tiny_2b, "--height", 64, "--width", 96]
    (tmp_path / "clips").mkdir()
    for number in (70, 71):
        write_video(tmp_path / "clips" / f"{number}.mp4", moving_square(number))
        (tmp_path / "clips" / f"{number}.txt").write_text("another square")
    words += ["--max_num_frames", 9, "--dataset", "others", "--dataset_name", tmp_path / "clips"]
    assert main([str(word) for word in words]) == 0
    train_here(cache_copy, tmp_path / "run", max_train_steps=2, holdout_dataset="others")
    assert looks(tmp_path / "run")[0]["samples"] == 2
    assert len(column(tmp_path / "run", "loss")) == 2
    message = (
        r"--holdout_dataset squares: 7 of its 7 samples are of clips that --dataset squares trains on, the first 0\."
    )
    with pytest.raises(ConfigError, match=message):
        train_here(cache_copy, tmp_path / "no", max_train_steps=2, holdout_dataset="squares")


def test_keys_are_found_as_in_a_set():
    """Also those that end in zeros, as numpy's texts do not."""
    rng = np.random.default_rng(0)
    for count in (0, 1, 200):
        keys, others = (rng.integers(0, 2, (size, KEY_BYTES), np.uint8) * 255 for size in (count, 50))
        keys[:, 6:] = others[:, 6:] = 0
        known = {bytes(key) for key in others}
        assert are_among(keys, others).tolist() == [bytes(key) in known for key in keys]


def test_a_held_out_sample_has_no_dropped_caption_and_no_mirror(cache, tiny_2b):
    dataset = open_dataset(Cache(str(cache)), "squares")
    checkpoint = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=())
    samples = Samples(dataset)
    held = HeldOut(samples, LatentDataset(dataset, checkpoint.facts, DRAWS), torch.arange(7).numpy())
    keys = dataset.columns("latent_key", "embedding_key")
    plain = set(zip(keys["latent_key"].to_pylist(), keys["embedding_key"].to_pylist(), strict=True))
    assert {(one.latent_key, one.embedding_key) for places in held.requests(0, 1, 4) for one in places} == plain


def test_the_trained_lora_is_what_is_looked_at_last(cache, tiny_2b, held_run):
    """With the LoRA's file loaded by diffusers, the last look can be had again."""
    from diffusers import CogVideoXPipeline

    checkpoint = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=())
    transformer = load_transformer(checkpoint, torch.float32)
    state = load_file(held_run / "pytorch_lora_weights.safetensors")
    pipeline = CogVideoXPipeline(None, None, None, transformer, None)
    pipeline.load_lora_weights(str(held_run))
    assert len(state) == 16
    dataset = open_dataset(Cache(str(cache)), "squares")
    samples, reader = Samples(dataset), LatentDataset(dataset, checkpoint.facts, DRAWS)
    held = split_sources(dataset.columns("source")["source"].to_pylist(), 0.3)
    schedule = alphas_cumprod(checkpoint.config("scheduler"))
    losses = []
    for places in HeldOut(samples, reader, held.nonzero()[0]).requests(0, 1, QUARTILES):
        batch = collate([reader[request] for request in places])
        assert isinstance(batch, Batch)
        with torch.no_grad():
            losses.append(batch_loss(transformer, batch, checkpoint.facts, schedule, torch.float32).mean().item())
    assert looks(held_run)[-1]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
