"""Frozen weights in 8 and 4 bits: how far from the whole ones, and what of a transformer they are."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch.nn import functional

from shared.errors import ConfigError
from shared.lora import TARGET_MODULES, add_lora, lora_state, trainable
from tests.training import column, lora_of, train_here
from train import quantise as quantising
from train.config import TrainConfig
from train.memory import prepare
from train.quantise import FrozenLinear, check_precision, dequantised, quantise

CPU = torch.device("cpu")
# The loss may differ by this share, and the gradients of the whole LoRA by this cosine.
TOLERANCES = {"int8": (1e-3, 0.999), "fp8": (3e-3, 0.995), "nf4": (1e-2, 0.98)}


@pytest.fixture(autouse=True)
def _any_device_has_float8(monkeypatch):
    """The numbers of fp8 are the same without the hardware; test_fp8_is_refused... asks the real thing."""
    monkeypatch.setattr(quantising, "check_precision", lambda precision, device: None)


def transformer(folder, precision, dtype):
    model = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).requires_grad_(False)
    add_lora(model, rank=4, alpha=4.0, target_modules=TARGET_MODULES, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    assert quantise(model, precision, CPU) is None
    return model.train()


def loss_and_gradients(model, dtype):
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(2, 3, 16, 8, 12, generator=generator).to(dtype)
    text = torch.randn(2, 226, 32, generator=generator).to(dtype)
    rotary = torch.randn(72, 16, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        told = model(
            video, text, torch.tensor([3, 700]), image_rotary_emb=(rotary.cos(), rotary.sin()), return_dict=False
        )[0]
    loss = (told.float() - video.float()).pow(2).mean()
    loss.backward()
    return loss.item(), [parameter.grad for parameter in trainable(model)]


def cosine(ours, expected):
    return functional.cosine_similarity(
        torch.cat([one.flatten() for one in ours]).double(), torch.cat([one.flatten() for one in expected]).double(), 0
    ).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_and_gradients_are_close_to_native(tiny_5b, precision, dtype):
    loss, gradients = loss_and_gradients(transformer(tiny_5b, precision, dtype), dtype)
    native_loss, native = loss_and_gradients(transformer(tiny_5b, "native", dtype), dtype)
    share, least = TOLERANCES[precision]
    assert loss == pytest.approx(native_loss, rel=share)
    assert loss != native_loss
    assert cosine(gradients, native) > least
    assert min(cosine([one], [other]) for one, other in zip(gradients, native, strict=True)) > least - 0.03


@pytest.mark.parametrize("precision", TOLERANCES)
def test_streamed_quantised_blocks_compute_what_resident_ones_do(tiny_5b, precision):
    resident, streamed = (transformer(tiny_5b, precision, torch.bfloat16) for _ in range(2))
    prepare(resident, TrainConfig(), CPU)
    prepare(streamed, TrainConfig(stream_blocks=1, offload_activations=True, ff_chunks=3), CPU)
    (loss, gradients), (same, equal) = (loss_and_gradients(model, torch.bfloat16) for model in (resident, streamed))
    assert loss == same
    assert all(torch.equal(one, other) for one, other in zip(gradients, equal, strict=True))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_blocks_linear_layers_are_quantised_but_modulation_is_not(tiny_5b, precision):
    model = transformer(tiny_5b, precision, torch.bfloat16)
    layers = {name for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    block = ("attn1.to_q.base_layer", "attn1.to_k.base_layer", "attn1.to_v.base_layer", "attn1.to_out.0.base_layer")
    expected = {f"transformer_blocks.{n}.{name}" for n in range(2) for name in (*block, "ff.net.0.proj", "ff.net.2")}
    assert layers == expected
    assert not any(parameter.requires_grad for layer in layers for parameter in model.get_submodule(layer).parameters())
    assert len(lora_state(model)) == 2 * 4 * 2


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_weight_made_whole_is_the_librarys(precision):
    """int8 is multiplied out here, in one go; torchao's own way is the reference."""
    layer = torch.nn.Linear(128, 96, bias=False).requires_grad_(False)
    weight = quantising._quantised(layer, precision)
    whole = dequantised(weight, (96, 128), torch.float32)
    if precision != "nf4":
        torch.testing.assert_close(whole, weight.data.dequantize().float())
    assert cosine([whole], [layer.weight]) > (0.99 if precision == "nf4" else 0.999)


def test_a_product_differentiates_as_a_linear_layer_does():
    layer = torch.nn.Linear(32, 48).requires_grad_(False)
    frozen = FrozenLinear(quantising._quantised(layer, "int8"), layer.bias, layer.weight.shape)
    whole = dequantised(frozen.weight, (48, 32), torch.float32)
    x, same = (torch.ones(2, 5, 32).cumsum(1).requires_grad_() for _ in range(2))
    ours, expected = frozen(x), functional.linear(same, whole, layer.bias)
    assert torch.equal(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_layer_that_moves_keeps_its_scales(precision):
    layer = torch.nn.Linear(128, 96).requires_grad_(False)
    frozen = FrozenLinear(quantising._quantised(layer, precision), layer.bias, layer.weight.shape)
    x = torch.ones(2, 128)
    before, weight = frozen(x), frozen.weight
    frozen._apply(copy.deepcopy)
    assert torch.equal(frozen(x), before)
    assert precision != "nf4" or frozen.weight is not weight
    assert dict(frozen.named_parameters()).keys() == {"weight", "bias"}


def test_fp8_is_refused_where_the_device_cannot(monkeypatch):
    with pytest.raises(ConfigError, match=r"here is no GPU \(cpu\); give int8"):
        check_precision("fp8", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"here is capability 8\.6; give int8"):
        check_precision("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_precision("fp8", torch.device("cuda"))


@pytest.mark.parametrize(("precision", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_one_line(monkeypatch, precision, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ConfigError, match=f"{library} is not installed; pip install -c constraints.txt"):
        check_precision(precision, CPU)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_run_on_a_quantised_base_learns_as_one_on_the_native_one(cache, tmp_path, precision):
    settings = {"max_train_steps": 6, "train_batch_size": 2}
    for name in ("native", precision):
        train_here(cache, tmp_path / name, **settings, base_precision=name)
    losses = column(tmp_path / precision, "loss"), column(tmp_path / "native", "loss")
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCES[precision][0])
    assert lora_of(tmp_path / precision) != lora_of(tmp_path / "native")
