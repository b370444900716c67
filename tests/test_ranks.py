"""Two real processes under torchrun: the draws, gradients, losses, weights and order of one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import ConfigError
from tests.training import column, facts_of, lora_of, rows_of, train_apart, train_here, train_on_ranks
from train.checkpoint import list_checkpoints

SETTINGS = {"max_train_steps": 8, "checkpointing_steps": 5, "caption_dropout": 0.3, "lr_scheduler": "linear"}


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
    """Seven samples at a global batch of 2, one place on each of two ranks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = train_on_ranks(2, cache, folder, records=folder.parent, **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batches   1 x 2 processes x 1 accumulated = 2; 4 steps an epoch") == 1
    return folder


@pytest.fixture(scope="module")
def one(cache, tmp_path_factory):
    """The same global batch on one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    done = train_apart(cache, folder, records=folder.parent, **SETTINGS, gradient_accumulation_steps=2)
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def draws(folder, rank):
    lines = (folder.parent / f"rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def gradients(folder, rank, step):
    return load_file(folder.parent / f"rank-{rank}-step-{step}.safetensors")


def test_there_are_two_processes(one, two):
    assert sorted(path.name for path in two.parent.glob("*.jsonl")) == ["rank-0.jsonl", "rank-1.jsonl"]
    assert {row["world"] for rank in (0, 1) for row in draws(two, rank)} == {2}
    assert {row["world"] for row in draws(one, 0)} == {1}


def test_two_ranks_draw_what_one_draws_each_its_own(one, two):
    """Sample, mirror image, caption, posterior, noise and timestep of every place, to the last bit."""
    expected = {(row["step"], row["place"]): {**row, "world": 2} for row in draws(one, 0)}
    ours = [{(row["step"], row["place"]): row for row in draws(two, rank)} for rank in (0, 1)]
    assert [{place for _, place in rows} for rows in ours] == [{0}, {1}]
    drawn = ours[0] | ours[1]
    assert {at: row for at, row in drawn.items() if row["weight"]} == {
        at: row for at, row in expected.items() if row["weight"]
    }
    assert sum(row["weight"] == 0 for row in drawn.values()) == 2  # two short batches, and no rank without a pass
    for purpose in ("noise", "posterior_noise"):
        assert len({row[purpose] for row in drawn.values()}) == 16
    assert any(ours[0][step, 0]["timestep"] != ours[1][step, 1]["timestep"] for step in range(8))
    assert len({row["prompt_embeds"] for row in drawn.values()}) == 8  # seven captions and the empty prompt


def test_two_ranks_have_the_gradients_that_one_has(one, two):
    for step in range(4):
        ours, expected = gradients(two, 0, step), gradients(one, 0, step)
        assert len(expected) == 16
        other = gradients(two, 1, step)
        scale = max(value.abs().max().item() for value in expected.values())
        for name, value in expected.items():
            assert torch.equal(ours[name], other[name])
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5 * scale)


def test_two_ranks_see_the_samples_that_one_sees(one, two):
    assert column(two, "samples") == column(one, "samples")
    assert sorted(map(len, column(two, "samples"))) == [1, 1, 2, 2, 2, 2, 2, 2]  # 5 + 2 clips, two epochs


def test_two_ranks_have_the_losses_that_one_has(one, two):
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
    assert column(two, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-3)


def test_the_schedule_counts_optimizer_steps_not_processes(one, two):
    assert column(two, "lr") == column(one, "lr")
    assert column(two, "lr")[-1] == pytest.approx(1e-2 / 8)


def test_two_ranks_end_with_the_weights_that_one_ends_with(one, two):
    ours, expected = weights(two), weights(one)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=2e-4)
    assert max(value.abs().max().item() for name, value in ours.items() if "lora_B" in name) > 0.02


def test_the_files_are_written_once(two):
    assert column(two, "step") == list(range(1, 9))
    assert len({row["loss"] for row in rows_of(two)}) == 8
    assert [path.name for path in list_checkpoints(two)] == ["checkpoint-5", "checkpoint-8"]


def test_a_run_of_two_ranks_goes_on_on_one(cache, one, two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-8")
    assert train_here(cache, run, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert json.loads((run / "checkpoint-5" / "state.json").read_text())["position"]["global_batch"] == 2
    assert column(run, "samples") == column(one, "samples")
    assert column(run, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_train_image_to_video_as_one_does(image_cache, tmp_path):
    """Which variant of a first frame, its draw, and whether it is dropped, of every place to the last bit."""
    flags = {"max_train_steps": 6, "checkpointing_steps": 3, "noised_image_dropout": 0.4}
    runs = {"two": tmp_path / "two" / "run", "one": tmp_path / "one" / "run"}
    done = train_on_ranks(2, image_cache, runs["two"], records=runs["two"].parent, **flags)
    assert done.returncode == 0, done.stderr
    done = train_apart(image_cache, runs["one"], records=runs["one"].parent, gradient_accumulation_steps=2, **flags)
    assert done.returncode == 0, done.stderr
    drawn = {(row["step"], row["place"]): row for rank in (0, 1) for row in draws(runs["two"], rank) if row["weight"]}
    expected = {(row["step"], row["place"]): {**row, "world": 2} for row in draws(runs["one"], 0) if row["weight"]}
    assert drawn == expected
    assert len({row["image_factors"] for row in drawn.values()}) == 2, "some are dropped, and some are not"
    assert len({row["image_posterior_noise"] for row in drawn.values()}) == len(drawn)
    assert column(runs["two"], "loss") == pytest.approx(column(runs["one"], "loss"), rel=1e-5)
    before = facts_of(runs["two"]), lora_of(runs["two"])
    shutil.rmtree(runs["two"] / "checkpoint-6")
    done = train_on_ranks(2, image_cache, runs["two"], **flags, resume_from_checkpoint="latest")
    assert done.returncode == 0, done.stderr
    assert "steps     3 to 6" in done.stdout
    assert (facts_of(runs["two"]), lora_of(runs["two"])) == before


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_on_two(cache, one, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-8")
    done = train_on_ranks(2, cache, run, **SETTINGS, resume_from_checkpoint="latest")
    assert done.returncode == 0, done.stderr
    assert "1 x 2 processes x 1 accumulated" in done.stdout
    assert column(run, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)


@pytest.mark.slow
def test_prodigy_estimates_on_two_ranks_what_it_estimates_on_one(cache, tmp_path):
    """Each rank makes its own, of the same gradients. It begins at 1e-6: at such a rate six steps go somewhere."""
    # six steps: after more, at such a rate, what sums in another order round differently has grown to a thousandth
    flags = {**SETTINGS, "max_train_steps": 6, "optimizer": "prodigy", "learning_rate": 500, "scale_lr": True}
    done = train_on_ranks(2, cache, tmp_path / "two", **flags)
    assert done.returncode == 0, done.stderr
    train_here(cache, tmp_path / "one", **flags, gradient_accumulation_steps=2)
    assert column(tmp_path / "two", "lr") == column(tmp_path / "one", "lr")
    assert column(tmp_path / "two", "lr")[0] == 1000
    assert column(tmp_path / "two", "loss") == pytest.approx(column(tmp_path / "one", "loss"), rel=1e-5)
    ours, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=2e-5)
    assert max(value.abs().max().item() for name, value in ours.items() if "lora_B" in name) > 2e-3


def test_a_time_out_that_is_none_is_refused(cache, tmp_path):
    with pytest.raises(ConfigError, match=r"^--nccl_timeout 0.0; must be above 0 seconds"):
        train_here(cache, tmp_path / "run", nccl_timeout=0)


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("ACCELERATE_USE_FSDP", "true", r"^accelerate's distributed_type FSDP; must be MULTI_GPU .*ddp\.yaml"),
        ("ACCELERATE_USE_DEEPSPEED", "true", r"^accelerate's distributed_type DEEPSPEED; must be MULTI_GPU"),
        ("WORLD_SIZE", "2", r"^2 processes were started and accelerate sees 1: .*set ACCELERATE_USE_CPU=true$"),
    ],
)
def test_what_a_launcher_cannot_ask_for_is_refused(cache, tmp_path, monkeypatch, variable, value, line):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=line):
        train_here(cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- more processes than samples


@pytest.fixture(scope="module")
def three(tiny_2b, clips, tmp_path_factory):
    """A data set of three clips in one shard."""
    from preprocess.__main__ import main

    folder = tmp_path_factory.mktemp("three")
    for number in (0, 1, 3):
        for suffix in ("mp4", "txt"):
            (folder / "clips").mkdir(exist_ok=True)
            shutil.copy2(clips / f"{number}.{suffix}", folder / "clips")
    words = ["--cache", str(folder / "cache"), "--dataset", "squares", "--buckets", "9x64x96"]
    words += ["--pretrained_model_name_or_path", str(tiny_2b), "--dataset_name", str(folder / "clips")]
    assert main(words) == 0
    assert len(list((folder / "cache" / "latents").rglob("*.tar"))) == 1
    return folder / "cache"


@pytest.mark.slow
def test_three_samples_on_four_ranks_with_four_workers_each(three, tmp_path):
    """A rank without a sample of its own takes its steps with the others: nothing hangs."""
    four, alone, records = tmp_path / "four", tmp_path / "one", tmp_path / "records"
    done = train_on_ranks(4, three, four, records=records, max_train_steps=3, dataloader_num_workers=4)
    assert done.returncode == 0, done.stderr
    assert "1 x 4 processes x 1 accumulated = 4; 1 steps an epoch" in done.stdout
    assert len(list(records.glob("rank-*.jsonl"))) == 4
    for rank in range(4):
        rows = [json.loads(line) for line in (records / f"rank-{rank}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert {row["weight"] for row in rows} == {float(rank < 3)}
    assert train_here(three, alone, max_train_steps=3, gradient_accumulation_steps=4) == 0
    assert column(four, "samples") == column(alone, "samples")
    assert all(len(samples) == 3 for samples in column(four, "samples"))
    assert column(four, "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)
