"""The card and the hub: what is pushed runs as the card says, and a hub that fails costs a run nothing."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel

from shared.config import parse_config, to_dict
from shared.errors import ConfigError
from shared.lora import FILE_NAME, read_metadata
from tests import tiny_model
from tests.conftest import run_command
from tests.hub import OWNER, TOKEN, serve_hub
from tests.runs import write_validation
from tests.test_handing_over import train_lora
from tests.test_lora_inference import random_lora
from tests.training import train_here, train_on_ranks
from train.card import write_card
from train.config import TrainConfig
from train.export import main as export
from train.hub import repository

PROMPT = "a *red* square, <b>slowly</b>: \"it\" moves 'on' | `x`"


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(tiny_2b, tmp_path_factory):
    """A run's folder `squares`: its LoRA, videos of two steps, and what must not leave this machine."""
    folder = tmp_path_factory.mktemp("runs") / "squares"
    train_lora(tiny_2b, folder)
    for step in (3, 7):
        for name, prompt in (("a red-1f", PROMPT), ("blue", "a blue square")):
            write_validation(folder, step, name, prompt, seed=5)
            recipe = folder / "validation" / f"step-{step}" / f"{name}.json"
            told = {**json.loads(recipe.read_text()), "num_inference_steps": 2, "guidance_scale": 3.5}
            recipe.write_text(json.dumps(told))
    (folder / "config.json").write_text(json.dumps({"cache": "/secret/place"}))
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.safetensors").write_bytes(b"much")
    return folder


def push(hub, *words, **environment):
    return run_command("-m", "train.push", *words, **{**hub.environment, **environment})


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_lora_is(finished, tiny_2b):
    assert export([str(finished), "--format", "card", "--hub_model_id", "you/squares"]) == 0
    card = (finished / "README.md").read_text()
    told = front_matter(card)
    assert (told["license"], told["library_name"], told["instance_prompt"]) == ("other", "diffusers", "SQR")
    assert "base_model" not in told, "a folder of this machine is none that others have"
    assert str(tiny_2b.parent) not in card
    assert [entry["text"] for entry in told["widget"]] == [f"SQR {PROMPT}", "SQR a blue square"]
    for entry in told["widget"]:
        assert (finished / entry["output"]["url"].replace("%20", " ")).is_file()
        assert "/step-7/" in entry["output"]["url"]
        assert f"]({entry['output']['url']}), seed 5" in card
    assert "weight 1.0, not alpha / rank" in card
    for row in ("rank | 4", "alpha | 1", "steps | 7", "seed | 1", "data set | squares, version 000000000000: 7 clips"):
        assert f"| {row} |" in card
    gallery = card.split("## Videos")[1].split("## Use")[0]
    assert "<b>" not in gallery
    assert r"a \*red\* square, &lt;b&gt;slowly&lt;/b&gt;" in gallery


def test_the_card_of_a_base_model_on_the_hub_names_it(finished, tmp_path):
    from safetensors.numpy import load_file, save_file

    adapter, facts = read_metadata(finished / FILE_NAME)
    assert facts is not None
    other = replace(
        facts, base_model="THUDM/CogVideoX-2b", revision="abc123", variant="fp16", id_token=None, clips=None
    )
    metadata = {"lora_adapter_metadata": json.dumps(adapter), "latentreel": json.dumps(to_dict(other))}
    save_file(load_file(finished / FILE_NAME), tmp_path / FILE_NAME, metadata)
    card = write_card(tmp_path, None, "apache-2.0").read_text()
    told = front_matter(card)
    assert (told["license"], told["base_model"]) == ("apache-2.0", "THUDM/CogVideoX-2b")
    assert not {"license_name", "widget", "instance_prompt"} & set(told)
    assert "'THUDM/CogVideoX-2b', dtype=torch.float32, revision='abc123', variant='fp16')" in card
    compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], "card", "exec")


def test_a_push_is_one_commit_whose_card_s_example_makes_its_first_video(hub, finished, tiny_2b, tmp_path, monkeypatch):
    import av

    (finished / "README.md").unlink(missing_ok=True)
    done = push(hub, str(finished), "--hub_license", "mit")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{OWNER}/squares" in done.stdout
    files = hub.repositories[f"{OWNER}/squares"]
    videos = {"validation/step-7/a red-1f.mp4", "validation/step-7/blue.mp4"}
    assert set(files) == {FILE_NAME, "README.md", *videos}
    assert all(files[name] == (finished / name).read_bytes() for name in files)
    assert hub.commits == 1
    assert front_matter(files["README.md"].decode())["license"] == "mit"

    (tmp_path / tiny_2b.name).symlink_to(tiny_2b)
    (tmp_path / OWNER / "squares").mkdir(parents=True)
    (tmp_path / OWNER / "squares" / FILE_NAME).write_bytes(files[FILE_NAME])
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert repr(f"SQR {PROMPT}") in example
    assert "num_inference_steps=2," in example
    assert "guidance_scale=3.5," in example
    made: dict = {}
    exec(compile(example, "README.md", "exec"), made)
    adapters = made["pipeline"].transformer.peft_config
    assert [adapter.lora_alpha for adapter in adapters.values()] == [1.0]
    with av.open("video.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (len(frames), *frames[0].shape[:2]) == (9, 32, 48)


def test_the_example_of_an_image_to_video_card_starts_from_a_picture(
    image_model, image_cache, pictures, tmp_path, monkeypatch
):
    """And has the size of its first video, which a row of validation may say."""
    import av

    run = tmp_path / "run"
    assert train_here(image_cache, run, max_train_steps=1) == 0
    write_validation(run, 1, "blue", "a blue square", seed=7)
    recipe = run / "validation/step-1/blue.json"
    size = {"frames": 9, "height": 96, "width": 64, "num_inference_steps": 2}
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **size}))
    card = write_card(run, "me/squares", "mit").read_text()
    told = front_matter(card)
    assert told["pipeline_tag"] == "image-to-video"
    assert "image-to-video" in told["tags"]

    (tmp_path / image_model.name).symlink_to(image_model)
    (tmp_path / "me").mkdir()
    (tmp_path / "me/squares").symlink_to(run)
    (tmp_path / "start.png").symlink_to(pictures / "start.png")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    with av.open("video.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (len(frames), *frames[0].shape[:2]) == (9, 96, 64)


def run_example(card, model, lora, picture, folder, monkeypatch):
    """Run the example of a card as it stands, with two steps; what the transformer was given first."""
    (folder / model.name).symlink_to(model)
    (folder / "me").mkdir()
    (folder / "me/squares").symlink_to(lora)
    (folder / "start.png").symlink_to(picture)
    monkeypatch.chdir(folder)
    seen: list[torch.Tensor] = []
    forward = CogVideoXTransformer3DModel.forward

    def watched(self, *words, **given):
        seen.append(given["hidden_states"])
        return forward(self, *words, **given)

    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", watched)
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(example.replace("num_inference_steps=50", "num_inference_steps=2"), "README.md", "exec"), {})
    return seen[0]


@pytest.mark.parametrize(("factor", "gain"), [("scale", 0.7 * 0.7), ("one", 0.7)])
def test_the_example_multiplies_first_frames_as_training_did(
    image_model, pictures, tmp_path, monkeypatch, factor, gain
):
    """Of 1.5 diffusers' pipeline divides by the scaling factor, 0.7."""
    given = {}
    for name in ("pipeline", factor):
        folder = tmp_path / name
        _, path = random_lora(image_model, folder / "made", image_factor=name)
        card = write_card(path.parent, "me/squares", "mit").read_text()
        assert f"--image\\_factor {name}" in card
        given[name] = run_example(card, image_model, path.parent, pictures / "start.png", folder, monkeypatch)
    plain, ours = given["pipeline"], given[factor]
    assert torch.equal(ours[:, :, :16], plain[:, :, :16])
    assert plain[:, 0, 16:].std() > 0.1
    torch.testing.assert_close(ours[:, :, 16:], gain * plain[:, :, 16:])


def test_the_example_leaves_out_learned_positions_that_training_left_out(pictures, tmp_path, monkeypatch):
    """At a size at which diffusers refuses a checkpoint that has them."""
    model = tiny_model.build(tmp_path / "model", "5b-i2v", native=(9, 64, 96))
    _, path = random_lora(model, tmp_path / "made", image_factor="pipeline", drop_learned_positions=True)
    card = write_card(path.parent, "me/squares", "mit").read_text()
    assert "| learned positions | left out" in card
    (tmp_path / "here").mkdir()
    given = run_example(card, model, path.parent, pictures / "start.png", tmp_path / "here", monkeypatch)
    assert given.shape[-2:] == (4, 6)
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    with pytest.raises(ValueError, match="different resolution"):
        exec(compile(example.replace("use_learned_positional_embeddings = False", "x = 0"), "README.md", "exec"), {})


def test_a_card_that_was_edited_is_pushed_as_it_is(hub, finished):
    (finished / "README.md").write_text("mine")
    done = push(hub, str(finished), "--hub_model_id", "team/other", "--hub_token", TOKEN, HF_TOKEN="hf_wrong")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["team/other"]["README.md"] == b"mine"
    assert push(hub, str(finished), "--hub_model_id", "team/other").returncode == 0, "a repository that is there"
    assert hub.commits == 2


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [("/create", 500, "500"), ("/whoami-v2", 401, "Invalid user token"), ("/commit/main", 403, "403")],
)
def test_a_hub_that_refuses_is_told_in_one_line_without_the_token(hub, finished, end, status, said):
    hub.fails[end] = status
    done = push(hub, str(finished), LATENTREEL_DEBUG="1" if status == 403 else "0")
    assert done.returncode == 2
    assert said in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    if status != 403:
        assert len(done.stderr.splitlines()) == 1
    assert hub.commits == 0


def test_a_transfer_over_xet_that_is_refused_is_told_in_one_line_too(hub, finished):
    """What the hub's library takes where nobody says otherwise; the transfer itself goes to another server."""
    hub.fails["/xet-write-token/main"] = 403
    done = push(hub, str(finished), HF_HUB_DISABLE_XET="0")
    assert ("GET", f"/api/models/{OWNER}/squares/xet-write-token/main") in hub.seen
    assert done.returncode == 2
    assert "403" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert TOKEN not in done.stdout + done.stderr
    assert hub.commits == 0


@pytest.mark.parametrize("fault", ["/create", "/whoami-v2"])
def test_a_run_whose_push_fails_succeeds_and_says_how_to_try_again(hub, cache, tmp_path, monkeypatch, capsys, fault):
    hub.fails[fault] = 500
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)  # as it reads them when it is imported
    run = tmp_path / "my run"
    write_validation(run, 0, "before", "a blue square", seed=1)
    name = "me/mine" if fault == "/create" else "mine"
    flags = {"push_to_hub": True, "hub_model_id": name, "hub_license": "mit", "hub_token": TOKEN}
    assert train_here(cache, run, max_train_steps=1, **flags) == 0
    assert hub.commits == 0
    said = capsys.readouterr()
    assert "500" in said.err
    (again,) = re.findall(r"push it with: python (.*)", said.err)
    texts = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in text for text in [*texts, said.out.encode(), said.err.encode()])
    assert json.loads((run / "config.json").read_text())["hub_token"] is None

    hub.fails.clear()
    done = run_command(*shlex.split(again), **hub.environment)
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/mine"]
    assert set(files) == {FILE_NAME, "README.md", "validation/step-0/before.mp4"}
    assert files[FILE_NAME] == (run / FILE_NAME).read_bytes()
    card = files["README.md"].decode()
    assert front_matter(card)["license"] == "mit"
    assert "| data set | squares, version " in card
    assert ": 7 clips |" in card


def test_a_run_whose_card_cannot_be_written_succeeds_too(cache, tmp_path, capsys):
    (tmp_path / "README.md").mkdir()
    flags = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": TOKEN}
    assert train_here(cache, tmp_path, max_train_steps=1, **flags) == 0
    said = capsys.readouterr().err
    assert "README.md" in said
    assert f"push it with: python -m train.push {tmp_path} --hub_model_id me/mine" in said
    assert (tmp_path / FILE_NAME).is_file()


@pytest.mark.slow
def test_of_several_processes_one_pushes(hub, cache, tmp_path, monkeypatch):
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    done = train_on_ranks(2, cache, tmp_path / "ranks", max_train_steps=1, push_to_hub=True)
    assert done.returncode == 0, done.stderr
    assert hub.commits == 1
    assert FILE_NAME in hub.repositories[f"{OWNER}/ranks"]


def test_a_token_is_in_no_record_and_no_message(tmp_path, monkeypatch):
    config = TrainConfig(push_to_hub=True, hub_token=TOKEN)
    assert TOKEN not in repr(config)
    assert to_dict(config)["hub_token"] is None
    with pytest.raises(ConfigError, match="trackers record command lines") as told:
        TrainConfig(push_to_hub=True, hub_token=TOKEN, report_to="wandb")
    assert TOKEN not in str(told.value)
    with pytest.raises(ConfigError, match="is for --push_to_hub") as told:
        TrainConfig(hub_token=TOKEN)
    assert TOKEN not in str(told.value)


@pytest.mark.parametrize("typo", [("--rnak", "4"), ("--report_to", "everything"), ("--rank", "four")])
def test_a_typo_beside_a_token_does_not_tell_it(typo):
    done = run_command("-m", "train", "--push_to_hub", "--hub_token", TOKEN, *typo)
    assert done.returncode == 2
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("words", [["--hub_tokn", TOKEN], [f"--hub-tokne={TOKEN}"], ["--token", TOKEN, "--rank", "4"]])
def test_a_typo_in_the_name_of_the_token_s_flag_does_not_tell_it(words, capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainConfig, ["--push_to_hub", *words], "python -m train")
    said = capsys.readouterr().err
    assert TOKEN not in said
    assert words[0].partition("=")[0] in said
    assert "did you mean --hub_token?" in said


def test_a_token_that_is_no_text_in_a_file_is_not_told(tmp_path):
    (tmp_path / "train.toml").write_text(f'hub_token = ["{TOKEN}"]\n')
    with pytest.raises(ConfigError, match=r"hub_token = .*must be a string") as told:
        parse_config(TrainConfig, ["--config", str(tmp_path / "train.toml")], "python -m train")
    assert TOKEN not in str(told.value)


def test_what_cannot_be_pushed_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    from train.hub import check_push

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no token to push with; set HF_TOKEN"):
        check_push(TrainConfig(push_to_hub=True))
    with pytest.raises(ConfigError, match="holds a space or a letter") as told:
        check_push(TrainConfig(push_to_hub=True, hub_token=f"{TOKEN}\n"))
    assert TOKEN not in str(told.value)
    (tmp_path / "none").write_text(TOKEN)  # as `hf auth login` leaves it
    check_push(TrainConfig(push_to_hub=True))
    with pytest.raises(ConfigError, match="--hub_model_id a/b/c: must be owner/name"):
        check_push(TrainConfig(push_to_hub=True, hub_token=TOKEN, hub_model_id="a/b/c"))
    with pytest.raises(ConfigError, match="--hub_model_id my run"):
        repository(None, Path("runs/my run"))
    assert repository(None, Path("runs/mine")) == "mine"
