"""What memory a step will hold, counted before there is a GPU: the trainer's own step on tensors without storage.

Everything that a run is made of is made here as train/setup.py makes it, of a checkpoint's config alone: transformer,
LoRA, quantised weights, levers, optimizer. Then a micro-batch goes forward and backward through it, and the optimizer
steps. train/ledger.py counts, under fake tensors. Three things are not as in a run: the optimizer has taken a step
before, so that its state is there; float16's loss scaler, which needs numbers, is left out; so is --compile.

Blocks are alike, so few are counted. The time of a step is cut into spans: before the blocks, each block forward, from
the last block to the loss, each block backward, the optimizer. With one block more, the first and the last spans hold
the same and what one block keeps; those between lie between them. So of the spans of a small and a next larger
transformer, matched from both ends, each is carried on to the real number of blocks in a straight line.
tests/test_plan.py compares this with counting all blocks, to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.geometry import Bucket
from shared.gpu_paths import gpu_paths
from shared.ledger import TRANSIENT, Ledger, Peak, make_fake
from shared.lora import trainable
from shared.models import Checkpoint, Facts
from train.config import TrainConfig
from train.draws import TIMESTEPS
from train.ema import Ema
from train.host import host_category, on_host
from train.lora import make_lora
from train.memory import check_levers, prepare
from train.objective import Batch, batch_loss, loss_weights, padding, rotary_embedding
from train.optim import gathered, make_optimizer, take_optimizer_step
from train.quantise import quantise

FEWEST_BLOCKS = 4  # the first and the one after it hold less, the last more; one stands for those between
CPU = torch.device("cpu")
PARTS = ("weights", "LoRA", "gradients", "optimizer", "checkpoints", TRANSIENT)
SCALER_BYTES = 12  # float16's loss scale, its growth counter and what it found, a scalar of 4 bytes each


@dataclass(frozen=True)
class Forecast:
    """What a step on clips of one bucket holds.

    Attributes:
        device: the most that the device holds, and what it is then.
        host: the same of the host, while steps are taken.
        loading: bytes of the weights, which the host holds before they go to the device.
        notes: what is not as in a real run.
    """

    bucket: Bucket
    device: Peak
    host: Peak
    loading: int
    notes: tuple[str, ...]

    @property
    def host_bytes(self) -> int:
        """The most that the host holds of the run's tensors, from loading on."""
        return max(self.host.total, self.loading)


Spans = dict[Hashable, dict[str, Peak]]  # the peaks of device and host in each span of a step


def forecast(
    config: TrainConfig, checkpoint: Checkpoint, bucket: Bucket, dtype: torch.dtype, *, all_blocks: bool = False
) -> Forecast:
    """Count a step. Seconds, whatever the sizes; nothing is allocated, and no weights are read.

    Args:
        checkpoint: of which only the config files need be there.
        dtype: of the frozen base, and of autocast where it is not float32.
        all_blocks: count each block, in place of few of them.

    Raises:
        UserError: levers that do not go with the checkpoint, or a library that is not installed.
    """
    config, notes = _countable(config)
    blocks = int(checkpoint.config("transformer")["num_layers"])
    few = max(FEWEST_BLOCKS, config.stream_blocks + 1)  # as many slots as there will be
    if all_blocks or few + 1 >= blocks:
        spans, loading, note = _count(config, checkpoint, bucket, dtype, blocks)
    else:
        small, small_loading, note = _count(config, checkpoint, bucket, dtype, few)
        larger, loading, _ = _count(config, checkpoint, bucket, dtype, few + 1)
        times = blocks - few - 1
        spans = {
            key: {place: _carried(small[key][place], peak, times) for place, peak in larger[key].items()}
            for key in small.keys() & larger.keys()
        }
        loading += times * (loading - small_loading)
    peaks = {place: max((span[place] for span in spans.values()), key=_total) for place in ("device", "host")}
    notes += [note] if note else []
    if dtype == torch.float16:
        notes.append(f"fp16: the loss scaler was left out, its {SCALER_BYTES} bytes added")
        parts = peaks["device"].parts + Counter({"optimizer": SCALER_BYTES})
        peaks["device"] = Peak(peaks["device"].total + SCALER_BYTES, parts)
    return Forecast(bucket, peaks["device"], peaks["host"], loading, tuple(notes))


def _countable(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """A configuration whose step runs without storage and without a GPU, and what is another in it."""
    notes = []
    if config.compile:
        config = replace(config, compile=False)
        notes.append("--compile: counted without it")
    if config.base_precision == "fp8":
        config = replace(config, base_precision="int8")
        notes.append("fp8: counted as int8, which holds as many bytes but for its scales")
    return config, notes


def check_countable(config: TrainConfig, precision: str, processes: int = 1) -> None:
    """`check_levers`, but for the GPU that is not here.

    Raises:
        ConfigError: levers that do not go with each other, or a library that is not installed.
    """
    if config.base_precision == "fp8":
        config = replace(config, base_precision="int8")
    check_levers(config, CPU, processes=processes, precision=precision)


def _total(peak: Peak) -> int:
    return peak.total


def _carried(small: Peak, larger: Peak, times: int) -> Peak:
    """A span's peak with `times` blocks more than `larger`, which has one more than `small`."""
    names = small.parts.keys() | larger.parts.keys()
    parts = {name: larger.parts[name] + times * (larger.parts[name] - small.parts[name]) for name in names}
    return Peak(sum(parts.values()), Counter(parts))


def _count(
    config: TrainConfig, checkpoint: Checkpoint, bucket: Bucket, dtype: torch.dtype, blocks: int
) -> tuple[Spans, int, str | None]:
    """The spans of a step with so many blocks, the bytes of the weights as loaded, and what is stood in for."""
    facts = checkpoint.facts
    changed: dict[str, Any] = {"num_layers": blocks}
    if config.drop_learned_positions:
        changed["use_learned_positional_embeddings"] = False
    transformer = _on_meta(checkpoint.config("transformer") | changed, dtype)
    loading = sum(parameter.nbytes for parameter in transformer.parameters())
    visit = make_lora(transformer, config, None)
    with _own_tables(), FakeTensorMode(allow_non_fake_inputs=True), Ledger(host_category) as ledger, gpu_paths():
        make_fake(transformer)
        note = quantise(transformer, config.base_precision, CPU)
        with ledger.labelled("weights"):  # of streamed blocks: the slots
            prepare(transformer, config, CPU)
        transformer.train()
        parameters = trainable(transformer)
        ledger.label((one for one in transformer.parameters() if not one.requires_grad), "weights")
        ledger.label(transformer.buffers(), "weights")
        ledger.label(parameters, "LoRA")
        ledger.watch_gradients(parameters)
        optimizer = make_optimizer(config, parameters)
        with ledger.labelled("optimizer"):
            ema = None if config.ema_decay is None else Ema(parameters, config.ema_decay)
        for parameter in gathered(optimizer):
            with on_host("gradients") if config.optimizer_offload else nullcontext():
                parameter.grad = torch.empty_like(parameter)
        _optimise(config, optimizer, ema, ledger)

        keeps = config.gradient_checkpointing and not config.offload_activations
        watch = _Watch(transformer.transformer_blocks, ledger, keeps)
        batch = batch_of(config.train_batch_size, facts, bucket)
        schedule = torch.ones(TIMESTEPS)
        visit.see(0, batch.places)
        for number in range(min(config.gradient_accumulation_steps, 2)):  # the second finds the gradients of the first
            watch.forward(number)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                each = batch_loss(transformer, batch, facts, schedule, dtype)
            weighted = (each * batch.weights * loss_weights(batch.timesteps, schedule, config)).sum()
            watch.backward()
            weighted.backward()
        watch.begin("optimizer")
        _optimise(config, optimizer, ema, ledger)
        watch.end()
    return watch.spans, loading, note


class _Watch:
    """Cuts the time of a step into spans, and tells apart what gradient checkpointing keeps.

    Args:
        keeps: whether the inputs of the blocks stay on the device.
    """

    def __init__(self, blocks: Any, ledger: Ledger, keeps: bool) -> None:
        self.spans: Spans = {}
        self._ledger, self._keeps, self._last = ledger, keeps, len(blocks) - 1
        self._micro, self._in_forward, self._current = 0, False, cast(Hashable, None)
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)
            block.register_forward_hook(partial(self._leave, number))

    def forward(self, micro: int) -> None:
        """The forward pass of a micro-batch begins."""
        self._micro, self._in_forward = micro, True
        self.begin((micro, "inputs"))

    def backward(self) -> None:
        """The backward pass begins, in which blocks may run again."""
        self._in_forward = False

    def begin(self, key: Hashable) -> None:
        """A span begins, and the one before it ends."""
        self.end()
        self._current = key
        self._ledger.start_anew()

    def end(self) -> None:
        """The span ends."""
        if self._current is not None:
            self.spans[self._current] = dict(self._ledger.peaks)

    def _key(self, name: str, number: int) -> Hashable:
        """Of a block's span: the last one counted from the end, all others from the start."""
        return (self._micro, name, "last" if number == self._last else number)

    def _enter(self, number: int, block: Any, given: Any, named: dict[str, Any]) -> None:
        if self._in_forward:
            self.begin(self._key("forward", number))
        if self._keeps:
            self._ledger.label([*given, *named.values()][:2], "checkpoints")  # video and text

    def _leave(self, number: int, block: Any, given: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not self._in_forward:
            return
        outputs[0].register_hook(lambda _: self.begin(self._key("backward", number)))
        if number == self._last:
            self.begin((self._micro, "loss"))


def _optimise(config: TrainConfig, optimizer: Any, ema: Ema | None, ledger: Ledger) -> None:
    """The end of a step, as train/step.py has it."""
    parameters = gathered(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
    with ledger.labelled("optimizer"):
        take_optimizer_step(optimizer)
        if ema:
            ema.update(0, torch.ones(()))
    optimizer.zero_grad()


@contextmanager
def _own_tables() -> Iterator[None]:
    """Within: tables of positions are made anew. The process remembers them, and these have no numbers."""
    rotary_embedding.cache_clear()
    try:
        yield
    finally:
        rotary_embedding.cache_clear()


def _on_meta(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The frozen transformer that `load_transformer` would load, of shapes alone."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(config)
    # module by module: diffusers' own warns where weights are cast
    return torch.nn.Module.to(transformer, dtype).requires_grad_(False)


def batch_of(size: int, facts: Facts, bucket: Bucket) -> Batch:
    """A micro-batch of that many clips as the reader makes it, all zeros."""
    frames, height, width = bucket.latent_shape
    padded = frames + padding(frames, facts.patch_size_t)
    channels = facts.latent_channels
    images: dict[str, Any] = {}
    if facts.image_to_video:
        images = {
            "image_moments": torch.zeros(size, 2 * channels, 1, height, width),
            "image_posterior_noise": torch.zeros(size, channels, 1, height, width),
            "image_factors": torch.ones(size),
        }
    return Batch(
        moments=torch.zeros(size, 2 * channels, frames, height, width),
        posterior_noise=torch.zeros(size, channels, frames, height, width),
        noise=torch.zeros(size, channels, padded, height, width),
        timesteps=torch.zeros(size, dtype=torch.long),
        prompt_embeds=torch.zeros(size, facts.max_text_seq_length, facts.text_embed_dim),
        weights=torch.ones(size),
        places=list(range(size)),
        **images,
    )
