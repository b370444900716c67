"""metrics.jsonl: whole rows, up to the step that a run goes on from."""

import json

import pytest

from train.metrics import FILE, Metrics


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / FILE).write_text("".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(1, 6)))
    return tmp_path


def write(folder, step, *rows):
    metrics = Metrics(folder, step)
    for row in rows:
        metrics.write(row)
    metrics.sync()
    metrics.close()


def test_rows_after_the_step_are_cut_and_those_before_keep_their_bytes(folder):
    before = (folder / FILE).read_bytes().splitlines(keepends=True)
    write(folder, 3, {"step": 4, "loss": 0.1})
    assert (folder / FILE).read_bytes().splitlines(keepends=True) == [*before[:3], b'{"step": 4, "loss": 0.1}\n']


def test_a_new_run_starts_an_empty_file(folder):
    write(folder, 0, {"step": 1})
    assert written(folder / FILE) == [{"step": 1}]


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo', b'{"step": 6, "name": "\xc3', b'{"step": 3}', b"\0\0\0"])
def test_a_last_line_without_its_end_is_dropped(folder, torn):
    with (folder / FILE).open("ab") as file:
        file.write(torn)
    write(folder, 5, {"step": 6})
    assert [row["step"] for row in written(folder / FILE)] == [1, 2, 3, 4, 5, 6]


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1, "loss": 0.1, "samples": ["ä"]})
    assert written(tmp_path / FILE) == [{"step": 1, "loss": 0.1, "samples": ["ä"]}]
    metrics.close()


def test_numbers_come_back_bit_equal(tmp_path):
    values = [0.1 + 0.2, 1e-300, 3.0, 1 / 3, 6.062525e-3]
    write(tmp_path, 0, {"step": 1, "values": values})
    assert written(tmp_path / FILE)[0]["values"] == values
