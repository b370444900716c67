"""Blocks in stages against diffusers' own, bit by bit; and which block's weights are where, and when."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from peft import LoraConfig, inject_adapter_in_model

from shared.errors import ConfigError
from tests.tiny_model import KINDS
from train.blocks import StagedBlock
from train.config import TrainConfig
from train.host import Mover, Shelf, host_block
from train.memory import prepare
from train.residency import Residency

CPU = torch.device("cpu")
TEXTS, VIDEOS = 11, 30
TEMB = 4  # of the results


def make_block(dtype, seed=0):
    """A block with a LoRA that does something, on the attention and on the feed-forward."""
    torch.manual_seed(seed)
    block = CogVideoXBlock(dim=32, num_attention_heads=2, attention_head_dim=16, time_embed_dim=24, attention_bias=True)
    block = block.to(dtype).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v", "to_out.0", "net.2"]), block)
    for name, parameter in block.named_parameters():
        if "lora" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    return block


def inputs(dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden, text, temb = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((2, VIDEOS, 32), (2, TEXTS, 32), (2, 24))
    )
    angles = torch.randn(VIDEOS, 16, generator=generator)
    return hidden, text, temb, (angles.cos(), angles.sin())


def results(call, block, dtype, rotary):
    """Outputs, and gradients of all inputs and of the LoRA, of a loss that sees every output."""
    hidden, text, temb, angles = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        outputs = call(hidden, text, temb, angles if rotary else None)
    sum(one.float().pow(3).sum() for one in outputs).backward()
    lora = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return [*outputs, *(one.grad for one in (hidden, text, temb, *lora))]


@pytest.mark.parametrize("chunks", [1, 2, 7])
@pytest.mark.parametrize("kept", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotary", [False, True])
def test_a_staged_block_is_diffusers_block(rotary, dtype, kept, chunks):
    """Bit by bit without chunks, but for temb, which is not trained: its sum over stages is rounded stage by stage.

    In chunks a library's matrix product may take another kernel, and what is summed over tokens is summed in parts.
    """
    plain, block = make_block(dtype), make_block(dtype)
    shelf = Shelf(Mover(CPU), ahead=True) if kept == "host" else None
    staged = StagedBlock(block, 0, chunks=chunks, residency=None, shelf=shelf)
    expected, ours = results(plain, plain, dtype, rotary), results(staged, block, dtype, rotary)
    share = 1e-5 if dtype == torch.float32 else 3e-2
    assert len(ours) == 5 + 2 * 4
    for number, (one, other) in enumerate(zip(ours, expected, strict=True)):
        if chunks == 1 and number != TEMB:
            assert torch.equal(one, other), number
        else:
            torch.testing.assert_close(one, other, rtol=share, atol=share * other.abs().max().item())


def test_chunks_cover_every_token_once():
    staged = StagedBlock(make_block(torch.float32), 0, chunks=4, residency=None, shelf=None)
    pieces = list(staged._pieces(torch.empty(1, VIDEOS, 1), torch.empty(1, TEXTS, 1)))
    tokens = list(range(TEXTS + VIDEOS))
    assert [token for _, _, whole in pieces for token in tokens[whole]] == tokens
    assert [token for texts, _, _ in pieces for token in tokens[:TEXTS][texts]] == tokens[:TEXTS]
    assert [token for _, videos, _ in pieces for token in tokens[TEXTS:][videos]] == tokens[TEXTS:]
    assert len(pieces) == 4


def test_more_chunks_than_tokens_are_as_many_as_tokens():
    staged = StagedBlock(make_block(torch.float32), 0, chunks=100, residency=None, shelf=None)
    assert len(list(staged._pieces(torch.empty(1, 3, 1), torch.empty(1, 2, 1)))) == 5


@pytest.fixture
def watched(monkeypatch):
    """Six equal blocks, and the numbers of those that are fetched, in order."""
    blocks = [make_block(torch.float32, seed) for seed in range(6)]
    whole = [[parameter.clone() for parameter in block.parameters() if not parameter.requires_grad] for block in blocks]
    fetched = []

    def residency(count):
        made = Residency(blocks, Mover(CPU), count)
        fetch = made._fetched

        def note(number, wanted):
            before = [slot.number for slot in made._slots]
            slot = fetch(number, wanted)
            if number not in before:
                fetched.append(number)
            return slot

        monkeypatch.setattr(made, "_fetched", note)
        return made

    return blocks, whole, residency, fetched


def frozen(block):
    return [parameter for parameter in block.parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9])
def test_a_block_has_its_own_weights_while_it_is_computed_and_none_at_rest(watched, count):
    blocks, whole, residency, _ = watched
    made = residency(count)
    assert len(made._slots) == min(count, 6)
    for direction, order in ((1, range(6)), (-1, reversed(range(6))), (1, range(6))):
        for number in order:
            assert not any(frozen(block) for block in blocks)
            with made.block(number, direction):
                assert all(map(torch.equal, frozen(blocks[number]), whole[number]))
                assert len(frozen(blocks[number])) == len(whole[number])
                assert not any(frozen(block) for block in blocks if block is not blocks[number])


@pytest.mark.parametrize(
    ("count", "forward", "backward"),
    [(1, [0, 1, 2, 3, 4, 5], [4, 3, 2, 1, 0]), (2, [0, 1, 2, 3, 4, 5], [3, 2, 1, 0]), (6, [0, 1, 2, 3, 4, 5], [])],
)
def test_blocks_are_fetched_once_a_pass_and_not_while_they_are_there(watched, count, forward, backward):
    _, _, residency, fetched = watched
    made = residency(count)
    for number in range(6):
        with made.block(number, 1):
            assert fetched == forward[: max(number + count, 1)]
    fetched.clear()
    for number in reversed(range(6)):
        with made.block(number, -1):
            pass
    assert fetched == backward


def test_host_copies_lie_in_pages_of_their_own():
    """Pages can be locked but once; what lies in a page of two pieces could not be."""
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int8), torch.tensor(2.5), torch.randn(9).bfloat16()]
    copies = host_block(tensors, "weights", pinned=False)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(copies, tensors, strict=True))
    assert all(copy.data_ptr() % 64 == 0 for copy in copies)
    assert copies[0].data_ptr() % 4096 == 0
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert copies[0].untyped_storage().nbytes() == 2 * 4096


def test_what_is_frozen_outside_of_blocks_stays_and_dropout_is_refused(tiny_2b):
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel.from_pretrained(tiny_2b / "transformer").requires_grad_(False)
    outside = {name for name, _ in model.named_parameters() if not name.startswith("transformer_blocks")}
    prepare(model, TrainConfig(stream_blocks=1), CPU)
    assert {name for name, _ in model.named_parameters()} == outside
    other = CogVideoXTransformer3DModel.from_pretrained(tiny_2b / "transformer").requires_grad_(False)
    other.transformer_blocks[1].ff.net[1].p = 0.1
    with pytest.raises(
        ConfigError, match=r"transformer_blocks\.1\.ff\.net\.1: dropout 0\.1; blocks computed in stages"
    ):
        prepare(other, TrainConfig(ff_chunks=2), CPU)


def test_positions_are_rounded_to_what_the_model_rounds_them_to(tiny_2b):
    from diffusers import CogVideoXTransformer3DModel

    assert "use_rotary_positional_embeddings" not in KINDS["2b"]["transformer"]
    native, prepared = (
        CogVideoXTransformer3DModel.from_pretrained(tiny_2b / "transformer", torch_dtype=torch.bfloat16)
        for _ in range(2)
    )
    prepare(prepared, TrainConfig(), CPU)
    table = prepared.patch_embed.pos_embedding
    assert (native.patch_embed.pos_embedding.dtype, table.dtype) == (torch.float64, torch.bfloat16)
    video, text = torch.randn(1, 13, 16, 60, 90).bfloat16(), torch.randn(1, 226, 32).bfloat16()
    assert torch.equal(native.patch_embed(text, video), prepared.patch_embed(text, video))
