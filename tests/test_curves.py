"""A run's curves: the means, ranges and rates of its steps, by a calculation over all rows at once."""

import pytest

from shared.errors import ConfigError
from tests.runs import plausible_holdout, plausible_rows, write_run
from train.curves import SCALARS, by_quartile, read_curves, read_holdout


def values_of(rows, column):
    return [row[column] for row in rows if row.get(column) is not None]


def test_each_step_of_a_short_run_is_a_point_with_its_values(tmp_path):
    rows = plausible_rows(5, 300, skipped=(7,))
    curves = read_curves(write_run(tmp_path, rows))
    assert (curves.width, curves.last_step, curves.skipped, curves.samples) == (1, 300, 1, 1200)
    for column in SCALARS:
        assert curves.means(column) == [row[column] for row in rows]
    for number in range(4):
        losses = [
            [loss for t, loss in zip(row["timesteps"], row["losses"], strict=True) if t * 4 // 1000 == number]
            for row in rows
        ]
        expected = [sum(one) / len(one) if one and None not in one else None for one in losses]
        assert curves.means(f"loss_q{number + 1}") == expected
    assert curves.rates() == [4 / row["seconds"] for row in rows]
    assert curves.seconds == pytest.approx(sum(row["seconds"] for row in rows))


@pytest.mark.parametrize(("steps", "width"), [(1000, 1), (1001, 2), (2000, 2), (2001, 4), (9999, 16)])
def test_points_of_a_long_run_are_the_means_and_ranges_of_their_steps(tmp_path, steps, width):
    rows = plausible_rows(6, steps, skipped=(3, 4))
    curves = read_curves(write_run(tmp_path, rows))
    assert curves.width == width
    assert steps / width / 2 < len(curves.points) <= 1000
    groups = [rows[first : first + width] for first in range(0, steps, width)]
    assert [point.last for point in curves.points] == [group[-1]["step"] for group in groups]
    for column in ("loss", "lr", "lora_norm", "data_seconds"):
        held = [values_of(group, column) for group in groups]
        assert curves.means(column) == [pytest.approx(sum(one) / len(one)) if one else None for one in held]
        assert curves.ranges(column) == [(min(one), max(one)) if one else None for one in held]
    rates = [sum(len(row["samples"]) for row in group) / sum(row["seconds"] for row in group) for group in groups]
    assert curves.rates() == pytest.approx(rates)
    loss = values_of(rows, "loss")
    bins = [point.bins["loss"] for point in curves.points if "loss" in point.bins]
    assert sum(one.count for one in bins) == len(loss)
    assert sum(one.total for one in bins) == pytest.approx(sum(loss))


def test_a_smoothed_value_is_the_mean_of_the_steps_around_it(tmp_path):
    rows = plausible_rows(7, 1500, skipped=(700, 701, 702))
    curves = read_curves(write_run(tmp_path, rows))
    reach = len(curves.points) // 50
    for place in (0, 3, 350, 600, len(curves.points) - 1):
        around = rows[max(0, place - reach) * 2 : (place + reach + 1) * 2]
        losses = values_of(around, "loss")
        assert curves.smoothed("loss")[place] == pytest.approx(sum(losses) / len(losses))
        rate = sum(len(row["samples"]) for row in around) / sum(row["seconds"] for row in around)
        assert curves.smoothed_rates()[place] == pytest.approx(rate)


def test_timesteps_fall_into_their_quartile():
    timesteps = [0, 249, 250, 499, 500, 749, 750, 999]
    row = {"timesteps": timesteps, "losses": [float(timestep) for timestep in timesteps]}
    assert by_quartile(row) == [[0, 249], [250, 499], [500, 749], [750, 999]]
    assert by_quartile({"timesteps": [10, 20], "losses": [None, 1.0]}) == [[1.0], [], [], []]
    assert by_quartile({"step": 1}) == [[], [], [], []]


@pytest.mark.parametrize("torn", [b'{"step": 11, "lo', b'{"step": 11}', b"\0\0"])
def test_a_last_line_that_is_being_written_is_left_out(tmp_path, torn):
    write_run(tmp_path, plausible_rows(8, 10), plausible_holdout(8, 100, floor=0.1))
    for name in ("metrics.jsonl", "holdout.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    assert read_curves(tmp_path).last_step == 10
    assert [row["step"] for row in read_holdout(tmp_path)] == [0, 100]


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 "):
        read_curves(tmp_path)
