"""A step: what it tells, when it is settled, and what becomes of one that is not finite."""

from __future__ import annotations

import threading

import pytest
import torch

from shared.errors import UserError
from tests.training import column, facts_of, lora_of, rows_of, train_here
from train import step as steps
from train.log import HINT_AFTER, WARM_UP, BadSteps, DataWait
from train.stopwatch import PHASES, Stopwatch


def test_settling_less_often_changes_no_number(cache, tmp_path):
    for name, log_steps in (("each", 1), ("few", 4)):
        train_here(cache, tmp_path / name, max_train_steps=6, train_batch_size=2, log_steps=log_steps)
    assert facts_of(tmp_path / "each") == facts_of(tmp_path / "few")
    assert lora_of(tmp_path / "each") == lora_of(tmp_path / "few")
    norms = column(tmp_path / "few", "lora_norm")
    assert [norm is None for norm in norms] == [True, True, True, False, True, False]
    assert norms[3] == column(tmp_path / "each", "lora_norm")[3]


def test_a_settled_interval_asks_the_device_once(cache, tmp_path, monkeypatch):
    """Whatever a tensor is asked for its value, the host waits: nothing in a step asks."""
    asked: list[int] = []
    settle, take = steps.settle, steps.take_step
    inside = threading.local()

    def watched(name):
        method = getattr(torch.Tensor, name)

        def ask(self):
            assert not getattr(inside, "step", False), name
            return method(self)

        monkeypatch.setattr(torch.Tensor, name, ask)

    def take_watched(*args, **settings):
        inside.step = args[1] > 0  # the first one makes the optimizer's state
        taken = take(*args, **settings)
        inside.step = False
        return taken

    def settle_counted(run, taken):
        asked.append(len(taken))
        return settle(run, taken)

    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        watched(name)
    monkeypatch.setattr("train.loop.take_step", take_watched)
    monkeypatch.setattr("train.loop.settle", settle_counted)
    train_here(cache, tmp_path / "run", max_train_steps=8, log_steps=4, lr_scheduler="cosine")
    assert asked == [4, 4]


def test_losses_stand_beside_their_samples_and_timesteps(cache, tmp_path):
    train_here(cache, tmp_path / "run", max_train_steps=4, train_batch_size=2)
    for row in rows_of(tmp_path / "run"):
        assert len(row["samples"]) == len(row["timesteps"]) == len(row["losses"])
        assert row["loss"] == pytest.approx(sum(row["losses"]) / len(row["losses"]))
        assert all(0 <= timestep <= 999 for timestep in row["timesteps"])
        assert not row["skipped"]


def poison(monkeypatch, bad_steps, value=float("nan")):
    """Let the loss of the first place of some steps be what a broken sample gives."""
    loss, seen = steps.batch_loss, iter(range(10**6))

    def broken(*args):
        losses = loss(*args)
        if next(seen) in bad_steps:
            losses = torch.cat([losses[:1] * value, losses[1:]])
        return losses

    monkeypatch.setattr(steps, "batch_loss", broken)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "prodigy"])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_sample(
    cache, tmp_path, monkeypatch, capsys, optimizer
):
    """A run of four steps, whose third is poisoned, ends where one does that never takes the third."""
    flags = {"max_train_steps": 4, "train_batch_size": 2, "optimizer": optimizer, "checkpointing_steps": 2}
    poison(monkeypatch, {2})
    assert train_here(cache, tmp_path / "run", **flags) == 0
    rows = rows_of(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [False, False, True, False]
    assert rows[2]["loss"] is None
    assert rows[2]["losses"][0] is None
    assert rows[2]["losses"][1] > 0
    assert f"step 3: the loss of {rows[2]['samples'][0]} is not finite; the step was skipped" in capsys.readouterr().err
    assert rows[2]["lora_norm"] == rows[1]["lora_norm"] != rows[3]["lora_norm"]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows if not row["skipped"])


def test_a_gradient_that_is_not_finite_is_skipped_too(cache, tmp_path, monkeypatch, capsys):
    from accelerate import Accelerator

    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *words: clip(*words) * float("inf"))
    with pytest.raises(UserError, match=r"step 2: the gradient of .* is not finite; it is step 2 of --max_bad_steps 2"):
        train_here(cache, tmp_path / "run", max_train_steps=4, max_bad_steps=2)
    assert [row["skipped"] for row in rows_of(tmp_path / "run")] == [True, True]
    assert [row["grad_norm"] for row in rows_of(tmp_path / "run")] == [None, None]


def test_an_optimizer_that_cannot_ask_the_device_skips_as_well(cache, tmp_path, monkeypatch):
    from train import setup

    monkeypatch.setattr(setup, "make_optimizer", lambda config, parameters, _: torch.optim.SGD(parameters, lr=100.0))
    poison(monkeypatch, {1})
    train_here(cache, tmp_path / "run", max_train_steps=3)
    norms = column(tmp_path / "run", "lora_norm")
    assert norms[0] == norms[1] != norms[2]


def test_only_steps_in_a_row_end_a_run():
    bad = BadSteps(most=2)
    row = {"step": 1, "skipped": True, "samples": ["a", "b"], "losses": [1.0, None]}
    assert bad.warning(row) == "warning   step 1: the loss of b is not finite; the step was skipped"
    assert bad.warning({**row, "skipped": False}) is None
    assert bad.warning(row) is not None
    with pytest.raises(UserError, match=r"^step 1: the loss of b is not finite; it is step 2 of --max_bad_steps 2 in"):
        bad.warning(row)


@pytest.mark.parametrize(("share", "told"), [(0.04, 0), (0.06, 1), (0.5, 1)])
def test_waiting_for_data_is_hinted_at_once(share, told):
    wait = DataWait()
    hints = [wait.hint({"data_seconds": share * 2, "seconds": 2.0}) for _ in range(WARM_UP + 3 * HINT_AFTER)]
    assert sum(hint is not None for hint in hints) == told
    assert all(hint is None for hint in hints[: WARM_UP + HINT_AFTER - 1])
    if told:
        assert f"{share:.0%} of the last {HINT_AFTER} steps" in next(hint for hint in hints if hint)


def test_the_start_of_a_run_is_no_hint():
    wait = DataWait()
    rows = [{"data_seconds": 9.0, "seconds": 10.0}] * WARM_UP + [{"data_seconds": 0.0, "seconds": 1.0}] * 100
    assert not any(wait.hint(row) for row in rows)


def test_laps_add_up(monkeypatch):
    from train import stopwatch

    now = iter([0.0, 1.0, 3.0, 6.0, 7.0, 9.0, 10.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    for phase in ("data", "forward", "backward", "data", "forward", "optimizer"):
        watch.lap(phase)
    assert watch.seconds() == {"": 10.0, "data": 2.0, "forward": 4.0, "backward": 3.0, "optimizer": 1.0}
    assert set(PHASES) == {"data", "forward", "backward", "optimizer"}


def test_a_product_is_the_same_to_the_last_bit_wherever_its_matrices_lie():
    """Weights that were loaded, kept on the host or moved lie elsewhere than those that were made."""
    generator = torch.Generator().manual_seed(0)
    vector, matrix = torch.randn(1, 32, generator=generator), torch.randn(192, 32, generator=generator)
    products = []
    for offset in range(16):
        memory = torch.empty(matrix.numel() + 16)[offset : offset + matrix.numel()].view_as(matrix)
        products.append(torch.nn.functional.linear(vector, memory.copy_(matrix)))
    assert all(torch.equal(product, products[0]) for product in products)
