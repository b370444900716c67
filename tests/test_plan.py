"""The plan: against the tracked peak of real steps, against counting every block, and its limits at full size."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from shared.config import parse_config
from shared.errors import UserError
from shared.geometry import Bucket
from shared.ledger import Ledger, Peak
from shared.lora import trainable
from shared.models import Checkpoint
from tests import tiny_model
from tests.conftest import ROOT, moving_square, run_command, write_video
from tests.full_size import NAMES, NATIVE, configs_of
from train.config import TrainConfig
from train.data import Requests, micro_batches
from train.forecast import PARTS, Forecast, check_countable, forecast
from train.host import has_no_storage, host_category
from train.ladder import advise, flags_of, room, rungs
from train.local_cache import parse_size
from train.objective import rotary_embedding
from train.plan import main
from train.setup import open_run
from train.step import take_step

GIB = 2**30
BUCKET = Bucket(9, 128, 192)
LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"base_precision": "int8"},
    "streamed": {"stream_blocks": 2},
    "activations on the host": {"offload_activations": True},
    "chunks": {"ff_chunks": 4},
    "all of the last three": {"stream_blocks": 2, "offload_activations": True, "ff_chunks": 4},
    "optimizer on the host": {"optimizer_offload": True, "stream_blocks": 1},
}
HOST: dict[str, Any] = {"stream_blocks": 2, "offload_activations": True}
EVERY: dict[str, Any] = {"stream_blocks": 1, "offload_activations": True, "ff_chunks": 8, "optimizer_offload": True}
LIMITS: list[tuple[str, dict[str, Any], float]] = [  # rank 64, batch 1, at the checkpoint's own bucket: most GiB
    ("2b", {}, 8),
    ("2b", {"base_precision": "int8", "offload_activations": True}, 6),
    ("2b", HOST, 2.7),
    ("2b", EVERY, 2.0),
    ("5b", {}, 18.5),
    ("5b", {"base_precision": "int8", "offload_activations": True}, 12),
    ("5b", HOST, 4.3),
    ("5b", EVERY, 3.5),
    ("1.5-5b", {**HOST, "ff_chunks": 8}, 7.5),
    ("1.5-5b", EVERY, 6.5),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A cache of two clips of one bucket, whose model is wide enough that its tensors are what a step holds."""
    from preprocess.__main__ import main as preprocess

    folder = tmp_path_factory.mktemp("small")
    model = tiny_model.build(folder / "model", "5b", heads=8, layers=4)
    (folder / "clips").mkdir()
    for number in range(2):
        clip = moving_square(number, BUCKET.frames, BUCKET.height, BUCKET.width)
        write_video(folder / "clips" / f"{number}.mp4", clip)
        (folder / "clips" / f"{number}.txt").write_text(f"square {number}")
    words = ["--cache", folder / "cache", "--pretrained_model_name_or_path", model, "--dataset_name", folder / "clips"]
    assert preprocess([str(word) for word in words] + ["--buckets", str(BUCKET), "--vae_batch_size", "1"]) == 0
    return folder


def settings(small, **flags):
    return TrainConfig(cache=str(small / "cache"), rank=32, mixed_precision="no", max_train_steps=2, **flags)


def tracked(small, output_dir: Path, **flags: Any) -> tuple[Peak, Peak]:
    """The peaks of the second of two real steps: real weights, real attention, a real optimizer, real host copies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    output_dir.mkdir()
    try:
        with Ledger(host_category) as ledger:
            run = open_run(replace(settings(small, **flags), output_dir=str(output_dir)), Accelerator(cpu=True))
            ledger.label(run.state.transformer.parameters(), "weights")
            ledger.label(run.state.transformer.buffers(), "weights")
            ledger.label(trainable(run.state.transformer), "LoRA")
            requests = Requests(run.samples, run.sampler, run.deal, 0, range(2), run.draws)
            batches = micro_batches(run.reader, requests, num_workers=0, pin_memory=False)
            for step in range(2):
                ledger.start_anew()
                take_step(run, step, batches, stopping=False, lora_norm=False)
            batches.close()
            return ledger.peaks["device"], ledger.peaks["host"]
    finally:
        AcceleratorState._reset_state(True)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            flags, id=name, marks=[] if name in ("plain", "int8", "all of the last three") else pytest.mark.slow
        )
        for name, flags in LEVERS.items()
    ],
)
def test_the_plan_agrees_with_a_real_step(small, tmp_path, flags):
    device, host = tracked(small, tmp_path / "run", **flags)
    planned = forecast(settings(small, **flags), checkpoint(small / "model"), BUCKET, torch.float32)
    assert planned.device.total == pytest.approx(device.total, rel=0.05)
    assert planned.host.total == pytest.approx(host.total, rel=0.05, abs=50_000)


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), None, None, folder)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"stream_blocks": 2, "offload_activations": True, "ff_chunks": 2, "optimizer_offload": True},
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (
                {"base_precision": "int8", "offload_activations": True},
                {"stream_blocks": 1, "ff_chunks": 3},
                {"gradient_checkpointing": False, "use_8bit_adam": True, "ema_decay": 0.9, "rank": 64},
                {"base_precision": "nf4", "stream_blocks": 3, "gradient_accumulation_steps": 3},
                {"rank": 512, "ff_chunks": 2, "optimizer_offload": True, "base_precision": "fp8"},
                {"use_dora": True},
                {"lora_dropout": 0.1},
            )
        ),
    ],
    ids=str,
)
def test_few_blocks_tell_what_all_of_them_hold(tmp_path, flags):
    """To the byte, in each part, on device and host."""
    model = configs_of(tmp_path / "model", "2b", num_layers=8, num_attention_heads=4)
    few, whole = (
        forecast(TrainConfig(**flags), model, Bucket(9, 128, 192), torch.bfloat16, all_blocks=all_blocks)
        for all_blocks in (False, True)
    )
    assert few == whole
    assert sum(few.device.parts.values()) == few.device.total
    assert set(few.device.parts) <= set(PARTS)


@pytest.mark.parametrize(
    ("kind", "flags", "most"),
    [
        pytest.param(*limit, marks=[] if limit[:2] in (("2b", {}), ("5b", HOST)) else pytest.mark.slow)
        for limit in LIMITS
    ],
)
def test_a_full_size_step_is_within_its_limit(tmp_path, kind, flags, most):
    model = configs_of(tmp_path / "model", kind)
    planned = forecast(TrainConfig(**flags), model, Bucket.parse(NATIVE[kind]), torch.bfloat16)
    assert 0.5 * most < planned.device.total / GIB <= most


CLASSES = sorted(path.name for path in (ROOT / "configs").glob("train_*gb.toml"))


def test_there_is_a_configuration_for_each_checkpoint_and_gpu():
    assert sorted(f"train_{kind}_{size}gb.toml" for kind in NAMES for size in (6, 8, 12, 16, 24, 80)) == CLASSES


@pytest.fixture(scope="module")
def planned_at_full_size(tmp_path_factory):
    """The step of a configuration at its checkpoint's own bucket; of equal ones once."""
    models = {kind: configs_of(tmp_path_factory.mktemp("full") / "model", kind) for kind in NAMES}

    @lru_cache
    def planned(kind: str, config: TrainConfig) -> Forecast:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[str(config.mixed_precision)]
        return forecast(config, models[kind], Bucket.parse(NATIVE[kind]), dtype)

    return planned


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_gpu_s_configuration_fits_it(planned_at_full_size, name):
    path = ROOT / "configs" / name
    _, kind, size = path.stem.split("_")
    config = parse_config(TrainConfig, ["--config", str(path)], "python -m train")
    assert config.pretrained_model_name_or_path == NAMES[kind]
    check_countable(config, str(config.mixed_precision))
    found = planned_at_full_size(kind, config)
    assert found.device.total <= room(parse_size(size))
    told = f"The plan: {found.device.total / GIB:.2f} GiB of the device, {found.host_bytes / GIB:.2f} of the host."
    assert told in path.read_text(encoding="utf-8")


def test_a_plan_leaves_nothing_behind(tiny_5b):
    """Tables of positions are remembered by the process: those of a plan have no numbers, and must not be."""
    before = torch.random.get_rng_state()
    shape = (2, 16, 24)
    forecast(TrainConfig(rank=4), checkpoint(tiny_5b), Bucket(5, 128, 192), torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    tables = rotary_embedding(checkpoint(tiny_5b).facts, *shape, torch.device("cpu"))
    assert tables is not None
    assert not has_no_storage(tables[0])
    assert torch.isfinite(tables[0]).all()


def plan(*words: Any, capsys) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return str(capsys.readouterr().out)


def test_the_plan_of_a_data_set_is_a_row_a_bucket(cache, capsys):
    told = plan("--cache", cache, "--dataset", "squares", "--rank", 4, capsys=capsys).splitlines()
    assert "float32" in told[0]
    assert [line.split()[0] for line in told[1:4]] == ["GiB", "9x64x96", "9x96x64"]


def test_json_is_one_object_with_the_bytes_of_the_largest_bucket(tiny_2b, capsys):
    words = ("--pretrained_model_name_or_path", tiny_2b, "--rank", 4, "--json", "--bucket")
    found = json.loads(plan(*words, "9x64x96,9x128x192", capsys=capsys))
    assert found["bucket"] == "9x128x192"
    assert found["peak_device_bytes"] == sum(found["breakdown"].values())
    assert list(found["breakdown"]) == list(PARTS)
    assert found["host_bytes"] > 0
    assert [one["bucket"] for one in found["buckets"]] == ["9x64x96", "9x128x192"]
    assert json.loads(plan(*words, "9x64x96", capsys=capsys))["buckets"] == found["buckets"][:1]


def test_the_plan_needs_no_weights_and_takes_the_checkpoint_s_own_bucket(tmp_path, capsys):
    model = configs_of(tmp_path / "model", "2b", num_layers=2, num_attention_heads=2)
    found = json.loads(plan("--pretrained_model_name_or_path", model.folder, "--json", capsys=capsys))
    assert found["bucket"] == "49x480x720"
    assert "counted as --mixed_precision bf16" in found["notes"][0]


@pytest.mark.slow
def test_the_advice_is_what_then_fits(tmp_path, capsys):
    """What it says to add, given to it, is the step that it promised, and one lever less does not do."""
    model = configs_of(tmp_path / "model", "2b", num_layers=6, num_attention_heads=8)
    words = ("--pretrained_model_name_or_path", model.folder, "--json", "--bucket", "17x256x384", "--device_memory")
    large = json.loads(plan(*words, "80GB", capsys=capsys))
    assert (large["fits"], large["advice"]) == (True, None)
    size = (large["peak_device_bytes"] * 3 // 4 + GIB // 2) * 10 // 9
    told = json.loads(plan(*words, size, capsys=capsys))
    assert not told["fits"]
    then = json.loads(plan(*words, size, *told["advice"]["flags"].split(), capsys=capsys))
    assert then["fits"]
    assert then["peak_device_bytes"] == told["advice"]["peak_device_bytes"]
    none = plan(*(word for word in words if word != "--json"), "600MB", capsys=capsys)
    assert "advice    no lever that keeps the numbers is enough" in none


def test_advice_is_the_first_rung_that_fits():
    config = TrainConfig(gradient_checkpointing=False, compile=True)
    ladder = rungs(config, "fp16")
    assert flags_of(ladder[0]) == "--gradient_checkpointing"
    assert flags_of(ladder[-1]) == (
        "--gradient_checkpointing --offload_activations --no_compile --ff_chunks 8 --stream_blocks 1"
    )  # no --optimizer_offload, as float16's loss scaling needs the gradients
    sizes = [100, 90, 70, 40, 40, 30]
    for limit in (100, 89, 70, 41, 30, 29):
        found = advise(ladder, limit, lambda changes: _counted(sizes[ladder.index(changes)]))
        first = next((rung for rung, size in zip(ladder, sizes, strict=True) if size <= limit), None)
        assert (found and found[0]) == first
    assert room(12 * 10**9) == 10_800_000_000 - GIB // 2


def _counted(size: int) -> Forecast:
    return Forecast(BUCKET, Peak(size), Peak(), 0, ())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device_memory", "much"), "--device_memory much; must be a size such as"),
        (("--bucket", "49x480"), "bucket '49x480': must be FRAMESxHEIGHTxWIDTH"),
        (("--stream_blocks", "1", "--no_gradient_checkpointing"), "leave out --no_gradient_checkpointing"),
        (("--cache", "nowhere", "--dataset", "none"), "nowhere"),
    ],
)
def test_a_mistake_is_told(tiny_2b, words, said):
    with pytest.raises(UserError, match=said) as error:
        main(["--pretrained_model_name_or_path", str(tiny_2b), *words])
    assert "\n" not in str(error.value)


def test_what_the_checkpoint_cannot_take_is_refused_and_counted_without_learned_positions(tmp_path, capsys):
    model = configs_of(tmp_path / "model", "5b-i2v", num_layers=2, num_attention_heads=2)
    words = ("--pretrained_model_name_or_path", model.folder, "--rank", 4, "--json", "--bucket")
    for bucket in ("9x64x96", "13x480x720"):  # of the first diffusers raises, the second it takes without a word
        with pytest.raises(UserError, match=f"size {bucket}: .* has learned positions for 49x480x720 only"):
            main([str(word) for word in (*words, bucket)])
        found = json.loads(plan(*words, bucket, "--drop_learned_positions", capsys=capsys))
        assert found["bucket"] == bucket
    native = (*words, "49x480x720")
    with_table, without = (
        json.loads(plan(*native, *more, capsys=capsys)) for more in ((), ["--drop_learned_positions"])
    )
    table = (226 + 17550) * 2 * 64 * 2  # tokens, width, bytes of bfloat16
    assert with_table["breakdown"]["weights"] - without["breakdown"]["weights"] == table
    with pytest.raises(UserError, match=r"--image_factor one: .* without images"):
        main(
            ["--pretrained_model_name_or_path", str(configs_of(tmp_path / "2b", "2b").folder), "--image_factor", "one"]
        )


def test_help_and_typos_of_the_plan_load_no_torch():
    code = (
        "import sys\n"
        "from train.plan import main\n"
        "for argv in (['--help'], ['--no_such_flag']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: print(end.code, file=sys.stderr)\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    done = run_command("-c", code)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line in "012"] == ["0", "2"]
