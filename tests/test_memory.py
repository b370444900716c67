"""The levers on memory: the numbers of a plain run, and which of them go together."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from shared.errors import ConfigError
from tests.training import column, facts_of, lora_of, train_apart, train_here, train_on_ranks
from train.config import TrainConfig
from train.memory import check_levers

STEPS = {"max_train_steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2, "holdout": 0.3}
EXACT: dict[str, dict[str, Any]] = {
    "activations": {"offload_activations": True},
    "streamed": {"stream_blocks": 1},
    "streamed ahead": {"stream_blocks": 2, "offload_activations": True},
    "optimizer": {"optimizer_offload": True},
    "all": {"stream_blocks": 2, "offload_activations": True, "optimizer_offload": True},
}


@pytest.fixture(scope="module")
def plain(cache, tmp_path_factory):
    """A run with gradient checkpointing as diffusers does it."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train_here(cache, folder, **STEPS)
    return folder


def held_out(folder):
    return (folder / "holdout.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", EXACT.values(), ids=EXACT.keys())
def test_a_lever_changes_no_number(cache, plain, tmp_path, flags):
    train_here(cache, tmp_path / "run", **STEPS, **flags)
    assert facts_of(tmp_path / "run") == facts_of(plain)
    assert column(tmp_path / "run", "lora_norm") == column(plain, "lora_norm")
    assert held_out(tmp_path / "run") == held_out(plain)
    assert lora_of(tmp_path / "run") == lora_of(plain)


@pytest.mark.parametrize("flags", [{"ff_chunks": 3}, {"ff_chunks": 5, **EXACT["all"]}], ids=["alone", "with all"])
def test_chunks_change_no_number_but_by_the_rounding_of_products(cache, plain, tmp_path, flags):
    """Rows of a product may be rounded otherwise where there are fewer of them, at some sizes on some machines."""
    train_here(cache, tmp_path / "run", **STEPS, **flags)
    for name in ("loss", "grad_norm", "lora_norm"):
        assert column(tmp_path / "run", name) == pytest.approx(column(plain, name), rel=1e-4), name


def test_levers_change_no_number_in_bfloat16(cache, tmp_path):
    runs: dict[str, dict[str, Any]] = {"plain": {}, "levers": EXACT["all"]}
    for name, flags in runs.items():
        train_here(cache, tmp_path / name, **STEPS, **flags, mixed_precision="bf16")
    assert facts_of(tmp_path / "levers") == facts_of(tmp_path / "plain")
    assert lora_of(tmp_path / "levers") == lora_of(tmp_path / "plain")


def test_levers_change_no_number_without_them_in_the_checkpoint(cache, plain, tmp_path):
    """A run goes on with other levers: those that change no number are not a checkpoint's business."""
    run = tmp_path / "run"
    train_here(cache, run, **STEPS, checkpointing_steps=1, **EXACT["all"])
    shutil.rmtree(run / "checkpoint-2")
    shutil.rmtree(run / "checkpoint-3")
    train_here(cache, run, **STEPS, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert facts_of(run) == facts_of(plain)
    assert lora_of(run) == lora_of(plain)


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer_offload": True, "stream_blocks": 1},
        {"use_8bit_adam": True, "rank": 64},
        {"use_8bit_adam": True, "optimizer_offload": True, "optimizer": "adam", "rank": 64},
    ],
    ids=["offloaded", "8 bits", "offloaded, 8 bits"],
)
def test_a_resumed_run_is_the_uninterrupted_one(cache, tmp_path, flags):
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, **flags}
    train_here(cache, whole, **settings)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-4")
    train_here(cache, run, **settings, resume_from_checkpoint="latest")
    assert facts_of(run) == facts_of(whole)
    assert lora_of(run) == lora_of(whole) != lora_of(whole / "checkpoint-2")
    assert (run / "checkpoint-4" / "optimizer.safetensors").read_bytes() == (
        whole / "checkpoint-4" / "optimizer.safetensors"
    ).read_bytes()


def test_what_changes_numbers_is_fixed_in_a_checkpoint(cache, plain, tmp_path):
    from shared.errors import CheckpointError

    run = shutil.copytree(plain, tmp_path / "run")
    for name, value in (("base_precision", "int8"), ("use_8bit_adam", True)):
        with pytest.raises(CheckpointError, match=f"{name} was .* and is now {value!r}"):
            train_here(cache, run, **STEPS, **{name: value}, resume_from_checkpoint="latest")


def test_adam_in_8_bits_stays_close_to_adam(cache, tmp_path):
    """At rank 64 the matrices have the 4096 elements from which bitsandbytes quantises. Losses within 1 %."""
    settings = {"max_train_steps": 6, "rank": 128, "learning_rate": "1e-3"}
    for name, flags in (("plain", {}), ("bits", {"use_8bit_adam": True})):
        train_here(cache, tmp_path / name, **settings, **flags)
    losses = column(tmp_path / "bits", "loss"), column(tmp_path / "plain", "loss")
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stream_blocks": 1, "gradient_checkpointing": False}, "leave out --no_gradient_checkpointing"),
        ({"offload_activations": True, "gradient_checkpointing": False}, "leave out --no_gradient_checkpointing"),
        ({"ff_chunks": 2, "gradient_checkpointing": False}, "leave out --no_gradient_checkpointing"),
        ({"compile": True, "stream_blocks": 1}, "--compile: does not go with --stream_blocks"),
        ({"compile": True, "offload_activations": True}, "--compile: does not go with --offload_activations"),
        ({"compile": True, "ff_chunks": 2}, "--compile: does not go with --ff_chunks"),
        ({"compile": True, "base_precision": "nf4"}, "--compile: does not go with --base_precision nf4"),
        ({"compile": True, "lora_dropout": 0.1}, "--compile: does not go with --lora_dropout"),
        ({"compile": True, "use_dora": True}, "--compile: does not go with --use_dora"),
        *(
            (
                {"ff_chunks": 2, "lora_dropout": 0.1, "target_modules": f"to_q,{name}"},
                r"on ff\.net\.\S+, which would drop",
            )
            for name in ("net.2", "proj", "ff.net.0.proj")
        ),
        ({"base_precision": "fp8"}, "--base_precision fp8: needs a GPU of capability 8.9 or newer, here is no GPU"),
    ],
)
def test_levers_that_clash_are_refused_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        check_levers(TrainConfig(**flags), torch.device("cpu"), processes=1, precision="bf16")
    assert "\n" not in str(refusal.value)


def test_an_offloaded_optimizer_takes_one_process_and_no_loss_scale():
    config = TrainConfig(optimizer_offload=True)
    with pytest.raises(ConfigError, match="before 2 processes have averaged them"):
        check_levers(config, torch.device("cpu"), processes=2, precision="bf16")
    with pytest.raises(ConfigError, match="give --mixed_precision bf16"):
        check_levers(config, torch.device("cpu"), processes=1, precision="fp16")
    check_levers(config, torch.device("cpu"), processes=1, precision="bf16")


@pytest.mark.slow
def test_two_ranks_average_what_staged_blocks_gather(cache, tmp_path):
    levers = {"stream_blocks": 2, "offload_activations": True}
    settings = {"max_train_steps": 4, "mixed_precision": "bf16"}
    for name, flags in (("plain", {}), ("levers", levers)):
        done = train_on_ranks(2, cache, tmp_path / name, **settings, **flags)
        assert done.returncode == 0, done.stderr
        assert "x 2 processes x" in done.stdout
    assert facts_of(tmp_path / "levers") == facts_of(tmp_path / "plain")
    assert lora_of(tmp_path / "levers") == lora_of(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_compiled_blocks_agree_with_eager_ones(cache, tmp_path, precision):
    settings = {"max_train_steps": 3, "base_precision": precision}
    for name, flags in (("eager", {}), ("compiled", {"compile": True})):
        done = train_apart(cache, tmp_path / name, **settings, **flags)
        assert done.returncode == 0, done.stderr
    assert column(tmp_path / "compiled", "samples") == column(tmp_path / "eager", "samples")
    assert column(tmp_path / "compiled", "loss") == pytest.approx(column(tmp_path / "eager", "loss"), rel=1e-4)
    assert column(tmp_path / "compiled", "grad_norm") == pytest.approx(
        column(tmp_path / "eager", "grad_norm"), rel=1e-2
    )


def test_dropout_of_the_attention_s_lora_is_the_same_in_chunks(cache, tmp_path):
    for name, flags in (("plain", {}), ("chunks", {"ff_chunks": 3})):
        train_here(cache, tmp_path / name, max_train_steps=3, lora_dropout=0.5, target_modules="to_q,to_v", **flags)
    for name in ("loss", "grad_norm"):
        assert column(tmp_path / "chunks", name) == pytest.approx(column(tmp_path / "plain", name), rel=1e-4), name


WIDE = "to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2,norm1.linear"


@pytest.mark.parametrize("flags", [{"stream_blocks": 1}, {"offload_activations": True, "optimizer_offload": True}])
def test_other_kinds_of_lora_go_with_the_levers(cache, tmp_path, flags):
    """DoRA to the last bit. Of a layer that both stages use, such as norm1.linear, gradients are added in two parts."""
    for name, more in (("plain", {}), ("levers", flags)):
        train_here(cache, tmp_path / f"dora-{name}", max_train_steps=2, use_dora=True, **more)
        train_here(cache, tmp_path / f"wide-{name}", max_train_steps=2, target_modules=WIDE, **more)
    assert facts_of(tmp_path / "dora-levers") == facts_of(tmp_path / "dora-plain")
    assert lora_of(tmp_path / "dora-levers") == lora_of(tmp_path / "dora-plain")
    for column_name in ("loss", "grad_norm"):
        told = column(tmp_path / "wide-levers", column_name)
        assert told == pytest.approx(column(tmp_path / "wide-plain", column_name), rel=1e-5)
