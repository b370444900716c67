"""Counting bytes: against sums done by hand, and what each lever takes from the peak."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.gpu_paths import gpu_paths
from shared.ledger import Ledger
from shared.lora import TARGET_MODULES, add_lora, trainable
from train.config import TrainConfig
from train.host import host_category, on_host
from train.memory import prepare
from train.optim import gathered, make_optimizer, take_optimizer_step
from train.quantise import quantise

CPU = torch.device("cpu")
SHAPE = (13, 16, 24)  # latent frames, height, width
LEVERS: dict[str, dict[str, Any]] = {
    "activations": {"offload_activations": True},
    "streamed": {"stream_blocks": 1},
    "chunked": {"ff_chunks": 4},
    "optimizer": {"optimizer_offload": True},
    "8-bit Adam": {"use_8bit_adam": True},
    "int8": {"base_precision": "int8"},
    "nf4": {"base_precision": "nf4"},
}


def test_storages_are_counted_once_and_until_they_end():
    with Ledger(host_category) as ledger:
        whole = torch.empty(1000)
        part = whole[10:20].view(2, 5)
        assert ledger.held("device") == 4000
        with on_host("checkpoints"):
            copy = torch.empty(500, dtype=torch.float64)
        assert (ledger.held("device"), ledger.held("host")) == (4000, 4000)
        with ledger.labelled("optimizer"):
            moment = torch.empty(250)
        del whole
        assert dict(ledger.now["device"]) == {"transient": 4000, "optimizer": 1000}
        del part, moment, copy
    assert (ledger.held("device"), ledger.held("host")) == (0, 0)
    assert ledger.peaks["device"].total == 5000
    assert dict(ledger.peaks["device"].parts) == {"transient": 4000, "optimizer": 1000}
    assert dict(ledger.peaks["host"].parts) == {"checkpoints": 4000}


def test_real_and_fake_tensors_count_alike():
    totals = []
    modes: list[Any] = [nullcontext(), FakeTensorMode()]
    for mode in modes:
        with mode, Ledger(host_category) as ledger:
            layer = torch.nn.Linear(64, 32)
            layer(torch.ones(8, 64)).square().sum().backward()
            totals.append(ledger.peaks["device"].total)
    assert totals[0] == totals[1] > 4 * 64 * 32 * 2


def peaks(**flags):
    """What device and host hold at most in a step of a middling transformer without storage."""
    config = TrainConfig(**flags)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=4, attention_head_dim=64, num_layers=3, time_embed_dim=64, text_embed_dim=64,
            sample_height=60, sample_width=90, use_rotary_positional_embeddings=True,
        ).to(torch.bfloat16)  # fmt: skip
        model.requires_grad_(False)
        add_lora(model, rank=64, alpha=64.0, target_modules=TARGET_MODULES, seed=1)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(host_category) as ledger, gpu_paths():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        quantise(model.train(), config.base_precision, CPU)
        prepare(model, config, CPU)
        parameters = trainable(model)
        ledger.label((one for one in model.parameters() if not one.requires_grad), "weights")
        ledger.label(parameters, "LoRA")
        ledger.watch_gradients(parameters)
        optimizer = make_optimizer(config, parameters)
        frames, height, width = SHAPE
        tokens = frames * height * width // 4
        for _ in range(2):
            ledger.start_anew()
            video = torch.empty(1, frames, 16, height, width, dtype=torch.bfloat16)
            text, time = torch.empty(1, 226, 64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long)
            rotary = torch.empty(tokens, 64), torch.empty(tokens, 64)
            with torch.autocast("cpu", torch.bfloat16):
                told = model(video, text, time, image_rotary_emb=rotary, return_dict=False)[0]
            (told.float() - video.float()).pow(2).mean().backward()
            gathered(optimizer)
            with ledger.labelled("optimizer"):
                take_optimizer_step(optimizer)
            optimizer.zero_grad()
        return ledger.peaks["device"], ledger.peaks["host"]


@pytest.fixture(scope="module")
def plain():
    return peaks()


@pytest.mark.parametrize("flags", LEVERS.values(), ids=LEVERS.keys())
def test_each_lever_lowers_the_peak(plain, flags):
    device, _ = peaks(**flags)
    assert device.total < 0.99 * plain[0].total


def test_each_thing_is_where_the_levers_put_it(plain):
    levers = {"stream_blocks": 1, "offload_activations": True, "ff_chunks": 4, "optimizer_offload": True}
    device, host = peaks(**levers)
    size = 3 * 4 * 2 * 64 * 256 * 4  # of the LoRA: layers, matrices, A and B, rank, features, bytes
    assert plain[1].total == 0
    assert plain[0].parts["LoRA"] == device.parts["LoRA"] == size
    assert plain[0].parts["optimizer"] >= 2 * size
    assert device.parts["optimizer"] == 0
    assert device.parts["gradients"] < size / 4
    assert device.parts["weights"] < plain[0].parts["weights"] * 0.6
    assert host.parts["optimizer"] >= 3 * size
    assert host.parts["weights"] > plain[0].parts["weights"] / 2
    assert device.total < 0.6 * plain[0].total


def test_staged_blocks_hold_less_than_whole_ones(plain):
    """The transient part alone: what one block makes, and the blocks' inputs."""
    inputs = 3 * 2 * 256 * (226 + SHAPE[0] * SHAPE[1] * SHAPE[2] // 4)
    device, _ = peaks(ff_chunks=4)
    assert device.parts["transient"] - inputs < 0.6 * (plain[0].parts["transient"] - inputs)
