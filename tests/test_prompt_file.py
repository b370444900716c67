"""shared/prompt_file.py: rows of text, CSV and JSON lines; what cannot be used is named by line and column."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.prompt_file import COLUMNS, PromptRow, read_prompts

EVERYTHING = {
    "prompt": 'a dog, "running"\nfast', "seed": 7, "height": 480, "width": 720, "num_frames": 49,
    "num_inference_steps": 30, "guidance_scale": 4.5, "use_dynamic_cfg": True, "lora_scale": -0.5,
}  # fmt: skip


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return str(path)


def test_a_text_file_is_a_prompt_a_line(tmp_path):
    path = write(tmp_path, "prompts.txt", "\ufeff a dog \n\n, a cat\r\n")
    assert read_prompts(path, "--prompts") == [
        PromptRow("a dog", origin=f"{path}:1"),
        PromptRow(", a cat", origin=f"{path}:3"),
    ]


def test_a_file_of_another_suffix_is_text(tmp_path):
    assert [row.prompt for row in read_prompts(write(tmp_path, "list", "x,seed\ny,3\n"), "--prompts")] == [
        "x,seed",
        "y,3",
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_row_says_everything_or_only_its_prompt(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    rows: list[dict[str, object]] = [{**EVERYTHING, "image": "pictures/a.png"}, {"prompt": "a cat"}]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
    first, second = read_prompts(str(path), "--prompts")
    assert first.image == str(tmp_path / "pictures" / "a.png")
    assert {name: getattr(first, name) for name in EVERYTHING} == EVERYTHING
    assert isinstance(first.guidance_scale, float)
    assert second == PromptRow("a cat", origin=f"{path}:{4 if kind == 'csv' else 2}")  # the first prompt has a newline


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.csv", "prompt,sed\na,1\n", "p.csv:1: column 'sed'; must be one of prompt, image, seed"),
        ("p.csv", "prompt,prompt\na,b\n", "is there twice"),
        ("p.csv", "prompt,seed\na,b,1\n", "p.csv:2: 3 cells, the header 2; quote the prompt"),
        ("p.csv", 'prompt\n"a\n', "p.csv:2: is not CSV"),
        ("p.csv", "prompt,seed\na,1\n,2\n", "p.csv:3: has no prompt"),
        ("p.csv", "prompt,seed\na,1.5\n", "p.csv:2: seed '1.5'; must be a whole number of 0 to 9223372036854775807"),
        ("p.csv", "prompt,height\na,8\n", "height '8'; must be a whole number of 16 to 32768"),
        ("p.csv", "prompt,guidance_scale\na,-1\n", "guidance_scale '-1'; must be a finite number of 0 or more"),
        ("p.csv", "prompt,lora_scale\na,nan\n", "lora_scale 'nan'; must be a finite number"),
        ("p.csv", "prompt,use_dynamic_cfg\na,maybe\n", "must be true or false"),
        ("p.jsonl", '{"prompt": "a"}\n{', "p.jsonl:2: is not JSON"),
        ("p.jsonl", '["a"]\n', "p.jsonl:1: [\"a\"]; must be an object"),
        ("p.jsonl", '{"prompt": 3}\n', "prompt 3; must be a text"),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n', "seed True; must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.0}\n', "seed 1.0; must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": null, "fps": 8}\n', "column 'fps'"),
        ("p.txt", "\udcff", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_by_line_and_column(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        read_prompts(str(path), "--prompts")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_names_its_flag(tmp_path):
    with pytest.raises(
        ConfigError, match=r"--validation_prompts .*none\.csv: cannot be read \(No such file or directory\)"
    ):
        read_prompts(str(tmp_path / "none.csv"), "--validation_prompts")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip), min_size=1))
def test_any_prompt_that_csv_and_json_can_hold_comes_back(tmp_path, prompts):
    table, lines = tmp_path / "p.csv", tmp_path / "p.jsonl"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["prompt"], *([prompt] for prompt in prompts)])
    lines.write_bytes("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode())
    wanted = [prompt.strip() for prompt in prompts]
    assert [row.prompt for row in read_prompts(str(lines), "--prompts")] == wanted
    assert [row.prompt for row in read_prompts(str(table), "--prompts")] == wanted
