"""Stage 3, against diffusers' own pipeline: the same embeddings, the same frames, and files that say what they are."""

import dataclasses
import hashlib
import json
import re
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

from infer.config import InferConfig
from infer.embeddings import encode_prompts
from infer.generate import generate
from infer.lora import Lora
from infer.recipe import Recipe
from infer.request import resolve
from infer.video import write_mp4
from shared.config import parse_config
from shared.errors import ConfigError, LoraError, ModelError, UserError
from shared.prompts import user_prompt
from tests import tiny_model
from tests.conftest import ROOT, run_command
from tests.test_lora_inference import checkpoint_at, pipeline_at, random_lora

PROMPT = "a red square moves over a gradient"
SIZE: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def lora(tiny_2b, tmp_path_factory):
    """A LoRA file of 9x32x48 at 8 fps, step 7, id token SQR, float32 throughout."""
    return random_lora(tiny_2b, tmp_path_factory.mktemp("lora"))[1]


def make(folder: Path, **settings: Any) -> list[Path]:
    """Run stage 3 with two steps, and return the videos."""
    config = InferConfig(**{"num_inference_steps": 2, "output_dir": str(folder), **settings})
    return [video.path for video in generate(resolve(config))]


def recipe_of(video: Path) -> dict:
    return json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))


def frames_digest(frames) -> str:
    return hashlib.sha256(np.stack([np.asarray(frame) for frame in frames]).tobytes()).hexdigest()


def read_video(path: Path) -> tuple[np.ndarray, Fraction | None]:
    with av.open(path) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return np.stack(frames), file.streams.video[0].average_rate


# The models


def test_embeddings_are_the_pipelines_own_also_after_rounding(tiny_2b):
    pipeline = CogVideoXPipeline.from_pretrained(tiny_2b)
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(PROMPT)
    checkpoint = checkpoint_at(tiny_2b)

    exact = encode_prompts(checkpoint, ["", PROMPT], "float32", "float32")
    rounded = encode_prompts(checkpoint, [PROMPT, ""], "float32", "float16")

    assert torch.equal(exact[PROMPT], positive)
    assert torch.equal(exact[""], negative)
    assert torch.equal(rounded[PROMPT], positive.half())
    assert torch.equal(rounded[""], negative.half())


def test_dynamic_guidance_is_the_pipelines(tiny_2b, lora, tmp_path):
    pipeline = CogVideoXPipeline.from_pretrained(tiny_2b)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(3)
    frames = pipeline(f"SQR {PROMPT}", **SIZE, use_dynamic_cfg=True, generator=generator).frames[0]

    (video,) = make(tmp_path / "dynamic", lora=str(lora), prompt=PROMPT, seed=3, use_dynamic_cfg=True)
    (plain,) = make(tmp_path / "plain", lora=str(lora), prompt=PROMPT, seed=3)

    assert recipe_of(video)["frames_sha256"] == frames_digest(frames) != recipe_of(plain)["frames_sha256"]


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_frames_are_those_of_a_plain_pipeline(kind, request, tmp_path):
    model = request.getfixturevalue(f"tiny_{kind}")
    path = random_lora(model, tmp_path)[1]
    pipeline = CogVideoXPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path)
    generator = torch.Generator().manual_seed(3)
    frames = pipeline(f"SQR {PROMPT}", **SIZE, guidance_scale=4.0, generator=generator).frames[0]

    (video,) = make(tmp_path / "videos", lora=str(path), prompt=PROMPT, seed=3, guidance_scale=4.0)

    assert recipe_of(video)["frames_sha256"] == frames_digest(frames)


def test_embeddings_are_rounded_as_those_the_lora_was_trained_on(tiny_2b, tmp_path):
    path = random_lora(tiny_2b, tmp_path, cache_dtype="float16")[1]
    pipeline = CogVideoXPipeline.from_pretrained(tiny_2b)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path)
    with torch.no_grad():
        positive, negative = (embeds.half().float() for embeds in pipeline.encode_prompt(f"SQR {PROMPT}"))
    generator = torch.Generator().manual_seed(42)
    frames = pipeline(prompt_embeds=positive, negative_prompt_embeds=negative, **SIZE, generator=generator).frames[0]

    (video,) = make(tmp_path / "videos", lora=str(path), prompt=PROMPT)

    assert recipe_of(video)["frames_sha256"] == frames_digest(frames)


def test_frames_of_1_5_in_bfloat16_with_its_own_scheduler_are_those_of_a_plain_pipeline(tmp_path):
    model = tiny_model.build(tmp_path / "model", "1.5-5b")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "CogVideoXDPMScheduler"]  # draws noise at each step
    (model / "model_index.json").write_text(json.dumps(index))
    pipeline = CogVideoXPipeline.from_pretrained(model, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(42)
    frames = pipeline(PROMPT, **SIZE, generator=generator).frames[0]

    base = {"pretrained_model_name_or_path": str(model), "dtype": "bfloat16", "prompt": PROMPT}
    (video,) = make(tmp_path / "videos", **base, **SIZE)

    recipe = recipe_of(video)
    assert recipe["frames_sha256"] == frames_digest(frames)  # float16 holds bfloat16 exactly in this range
    assert (recipe["scheduler"]["_class_name"], recipe["fps"]) == ("CogVideoXDPMScheduler", 16)
    (video,) = make(tmp_path / "even", **base, **{**SIZE, "num_frames": 13})
    assert read_video(video)[0].shape == (13, 32, 48, 3)


def test_scale_0_is_the_base_models_video_bit_for_bit(tiny_2b, tmp_path):
    path = random_lora(tiny_2b, tmp_path, cache_dtype="float16")[1]  # as the base model's embeddings are rounded
    told = {"lora": str(path), "prompt": PROMPT, "id_token": False}
    (none,) = make(tmp_path, **told, lora_scale=0.0)
    (half,) = make(tmp_path, **told, lora_scale=0.5)
    (base,) = make(tmp_path, pretrained_model_name_or_path=str(tiny_2b), prompt=PROMPT, **SIZE)
    assert recipe_of(base)["loras"] == []
    assert recipe_of(none)["frames_sha256"] == recipe_of(base)["frames_sha256"] != recipe_of(half)["frames_sha256"]
    assert recipe_of(none)["frames_sha256"] == recipe_of(base)["frames_sha256"]
    assert len({none.name, half.name, base.name}) == 3


@torch.no_grad()
@pytest.mark.parametrize(("latent_frames", "frames"), [(1, 1), (2, 5), (3, 9), (4, 13), (5, 17)])
def test_latents_are_decoded_to_the_frames_they_were_encoded_from(tiny_2b, latent_frames, frames):
    """diffusers decodes 2 latent frames to 8 frames, and 4 to 16."""
    pipeline = pipeline_at(tiny_2b)
    latents = torch.randn(1, latent_frames, 16, 4, 4, generator=torch.Generator().manual_seed(0))

    decoded = pipeline.decode_latents(latents)

    assert decoded.shape == (1, 3, frames, 32, 32)
    odd = latent_frames - (latent_frames + 1) % 2  # an odd count is diffusers' own, and a longer one begins with it
    reference = CogVideoXPipeline.decode_latents(pipeline, latents[:, :odd])
    assert torch.equal(decoded[:, :, : reference.shape[2]], reference) or latent_frames == 2


# The files


def test_a_video_comes_back_with_its_frames_rate_and_colours(tmp_path):
    bars = [(255, 255, 255), (235, 235, 0), (0, 235, 235), (0, 200, 0), (200, 0, 200), (255, 0, 0), (0, 0, 255)]
    frames = np.zeros((9, 48, 16 * len(bars), 3), np.uint8)
    for place, colour in enumerate(bars):
        frames[:, :, 16 * place : 16 * (place + 1)] = colour
    for number in range(9):
        frames[number, :16] = 28 * number  # time runs forwards, and up is up
    path = tmp_path / "bars.mp4"

    write_mp4(path, frames, Fraction(30000, 1001))

    assert [file.name for file in tmp_path.iterdir()] == ["bars.mp4"]
    found, rate = read_video(path)
    assert (found.shape, rate) == (frames.shape, Fraction(30000, 1001))
    inside = found[:, 20:44].reshape(9, 24, len(bars), 16, 3)[:, :, :, 4:12].astype(int)
    assert np.abs(inside - np.array(bars)[:, None]).max() <= 6
    assert np.abs(found[:, 4:12].astype(int) - frames[:, 4:12]).max() <= 6
    with av.open(path) as file:
        coding = file.streams.video[0].codec_context
        assert (coding.name, coding.pix_fmt) == ("h264", "yuv420p")
        assert (coding.colorspace, coding.color_range) == (1, 1)  # BT.709, limited
        assert (coding.color_primaries, coding.color_trc) == (1, 1)


def test_a_video_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"shape|channels|array"):
        write_mp4(path, np.zeros((2, 32, 32, 4), np.uint8), Fraction(8))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


def test_a_recipe_holds_what_makes_the_video_again(tiny_2b, lora, tmp_path):
    (video,) = make(tmp_path, lora=str(lora), prompt=PROMPT, seed=5, lora_scale=0.5, fps=7.5)
    recipe = recipe_of(video)

    assert recipe.keys() == {field.name for field in dataclasses.fields(Recipe)} | {
        *("versions", "frames_sha256", "batch_size", "group"),
    }
    assert (recipe["prompt"], recipe["effective_prompt"], recipe["negative_prompt"]) == (PROMPT, f"SQR {PROMPT}", "")
    assert (recipe["frames"], recipe["height"], recipe["width"], recipe["fps"]) == (9, 32, 48, 7.5)
    assert (recipe["seed"], recipe["lora_scale"], recipe["num_inference_steps"]) == (5, 0.5, 2)
    assert recipe["loras"][0]["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert recipe["loras"][0]["adapter"]["transformer.lora_alpha"] == 1.0
    assert recipe["loras"][0]["latentreel"]["dataset_digest"] == "0" * 64
    assert recipe["model"]["name"] == str(tiny_2b)
    assert recipe["scheduler"]["_class_name"] == "CogVideoXDDIMScheduler"
    assert recipe["versions"]["torch"] == torch.__version__
    found, rate = read_video(video)
    assert (found.shape, rate) == ((9, 32, 48, 3), Fraction(15, 2))

    video.unlink()
    make(tmp_path, lora=str(lora), prompt=PROMPT, seed=5, lora_scale=0.5, fps=7.5)
    assert recipe_of(video) == recipe


def test_names_tell_prompts_with_the_same_beginning_apart_and_twins_are_made_once(lora, tmp_path):
    long = "The camera follows a hiker, slowly, along the ridge at "
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{long}dawn\n\n  {long}dusk  \n{long}dawn\n", encoding="utf-8")

    videos = make(tmp_path / "videos", lora=str(lora), prompts=str(prompts), num_inference_steps=1)

    assert len(videos) == len(set(videos)) == 2
    assert [recipe_of(video)["prompt"] for video in videos] == [f"{long}dawn", f"{long}dusk"]
    for video in videos:
        assert re.fullmatch(r"the-camera-follows-a-hiker-slowly-along-[0-9a-f]{8}-step7-scale1-seed42\.mp4", video.name)
    assert len(list((tmp_path / "videos").iterdir())) == 4


def test_a_prompts_video_does_not_depend_on_the_other_prompts(lora, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"another, much longer prompt that comes before it\n{PROMPT}\n", encoding="utf-8")
    both = make(tmp_path / "both", lora=str(lora), prompts=str(prompts))
    (alone,) = make(tmp_path / "alone", lora=str(lora), prompt=PROMPT)
    assert recipe_of(both[1])["frames_sha256"] == recipe_of(alone)["frames_sha256"]


def test_videos_of_other_settings_stand_beside_each_other(lora, tmp_path):
    told = {"lora": str(lora), "prompt": PROMPT}
    other = {"guidance_scale": 3.0, "width": 64, "num_frames": 5, "num_inference_steps": 1, "fps": 4.0}
    videos = make(tmp_path, **told)
    for name, value in other.items():
        videos += make(tmp_path, **told, **{name: value})
    assert len(set(videos)) == 1 + len(other)
    assert sorted(tmp_path.glob("*.mp4")) == sorted(videos)


def test_each_row_of_a_file_is_made_as_it_says_and_else_as_the_flags_say(lora, tiny_2b, tmp_path):
    rows: list[dict[str, Any]] = [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "seed": 7},
        {"prompt": PROMPT, "width": 64, "height": 48, "num_frames": 1},
        {"prompt": "a cat", "guidance_scale": 2.5, "num_inference_steps": 1, "use_dynamic_cfg": True},
        {"prompt": PROMPT, "lora_scale": 0.25},
        {"prompt": PROMPT, "seed": 3},  # as the first: the flag's
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    videos = make(tmp_path / "all", lora=str(lora), prompts=str(file), seed=3)

    assert len(videos) == 5
    for video, row in zip(videos, rows, strict=False):
        pipeline = CogVideoXPipeline.from_pretrained(tiny_2b)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(lora, adapter_name="a")
        pipeline.set_adapters("a", row.get("lora_scale", 1.0))
        options = {
            **SIZE,
            **{name: value for name, value in row.items() if name not in ("prompt", "seed", "lora_scale")},
        }
        generator = torch.Generator().manual_seed(row.get("seed", 3))
        frames = pipeline(f"SQR {row['prompt']}", **options, generator=generator).frames[0]
        assert recipe_of(video)["frames_sha256"] == frames_digest(frames)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"height": 100}, r"rows\.jsonl:2: height 100: must be a multiple of 16"),
        ({"num_frames": 8}, r"rows\.jsonl:2: frame count 8"),
        ({"image": "a.png"}, r"rows\.jsonl:2: --image .*a\.png: .* is CogVideoX 1.0 text-to-video"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(lora, tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps({'prompt': 'a cat'})}\n{json.dumps({'prompt': 'a dog', **row})}\n")
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "videos", lora=str(lora), prompts=str(file))


@pytest.mark.parametrize(
    ("prompt", "token", "effective"),
    [
        ("a cat", "TOK", "TOK a cat"),
        ("TOK a cat", "TOK", "TOK a cat"),
        ("TOKEN of love", "TOK", "TOK TOKEN of love"),
        ("a TOK cat", "TOK", "TOK a TOK cat"),
        ("big TOK a cat", "big TOK", "big TOK a cat"),
        ("a cat", " TOK ", "TOK a cat"),
        ("a cat", None, "a cat"),
        ("a cat", "", "a cat"),
    ],
)
def test_the_id_token_is_put_before_a_prompt_that_lacks_it(prompt, token, effective):
    assert user_prompt(prompt, token) == effective


# What does not fit


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"height": 100}, ConfigError, "height 100: must be a multiple of 16"),
        ({"num_frames": 8}, ConfigError, "frame count 8"),
        ({"lora": "nowhere"}, LoraError, "--lora nowhere: no such file"),
        ({"pretrained_model_name_or_path": "./nowhere"}, ModelError, "./nowhere: no such folder"),
        ({"pretrained_model_name_or_path": "5b"}, LoraError, r"trained on .*sin-cos.* and .*RoPE"),
        ({"lora": (), "pretrained_model_name_or_path": "5b-i2v"}, ConfigError, "--image is missing.*image-to-video"),
        ({"lora": (), "pretrained_model_name_or_path": "5b", "image": "a.png"}, ConfigError, "--image a.png.*none"),
        ({"lora": (), "pretrained_model_name_or_path": "1.5-5b", "height": 2416}, ConfigError, "use 81x2400x1360"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused_before_weights_are_loaded(lora, tmp_path, settings, error, message):
    kind = settings.get("pretrained_model_name_or_path")
    if kind in tiny_model.KINDS:
        settings = {**settings, "pretrained_model_name_or_path": str(configs_of(kind, tmp_path / kind))}
    with pytest.raises(error, match=message) as caught:
        resolve(
            InferConfig(**{"lora": str(lora), "prompt": PROMPT, "output_dir": str(tmp_path / "videos"), **settings})
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "videos").exists()


def configs_of(kind: str, folder: Path) -> Path:
    """A checkpoint's folder with the configs that are read before its weights."""
    facts = tiny_model.KINDS[kind]
    transformer = {"patch_size": 2, "attention_head_dim": 16, "use_rotary_positional_embeddings": False}
    transformer |= {"in_channels": 16, "out_channels": 16, "sample_height": 60, "sample_width": 90, "sample_frames": 49}
    transformer |= {"max_text_seq_length": 226, "text_embed_dim": 32, **facts["transformer"]}
    vae = {"latent_channels": 16, "block_out_channels": [8] * 4, "temporal_compression_ratio": 4, **facts["vae"]}
    for part, config in (("transformer", transformer), ("vae", vae)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text("{}")  # not read before the size is checked
    return folder


def test_a_base_model_that_has_moved_is_named_with_the_way_out(tiny_2b, tmp_path):
    path = random_lora(tiny_2b, tmp_path, base_model="/gone/model")[1]
    with pytest.raises(ModelError, match=r"/gone/model: no such folder.*give --pretrained_model_name_or_path"):
        make(tmp_path / "videos", lora=str(path), prompt=PROMPT)
    assert make(tmp_path / "videos", lora=str(path), prompt=PROMPT, pretrained_model_name_or_path=str(tiny_2b))


def test_a_foreign_lora_runs_with_a_warning_that_its_alpha_is_unknown(tiny_2b, lora, tmp_path, capsys):
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(lora), foreign)
    with pytest.raises(LoraError, match="does not say what it was trained on; give --pretrained_model_name_or_path"):
        make(tmp_path, lora=str(foreign), prompt=PROMPT)

    (video,) = make(tmp_path, lora=str(foreign), prompt=PROMPT, pretrained_model_name_or_path=str(tiny_2b), **SIZE)

    (warning,) = capsys.readouterr().err.splitlines()
    assert re.match(r"warning   .*foreign\.safetensors does not hold its alpha", warning)
    assert "-lora-scale1-" in video.name
    assert Lora.read(str(foreign)).adapter is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": ()}, "--lora is missing"),
        ({"num_videos": 0}, "--num_videos 0; must be at least 1"),
        ({"batch_size": 0}, "--batch_size 0; must be at least 1"),
        ({"compare": "base"}, "--compare base; must be two or more"),
        ({"compare": "base,0"}, "--compare base,0; must be two or more different"),
        ({"compare": "base,much"}, "--compare base,much; must be two or more"),
        ({"compare": "base,1", "lora_scale": 0.5}, "give one of them"),
        ({"lora": (), "pretrained_model_name_or_path": "x", "compare": "base,1"}, "no LoRA to compare with"),
        ({"recipe": "a.json"}, "--lora|--prompt a red"),
        ({"recipe": "a.json", "prompt": None, "seed": 3}, "--seed 3 with --recipe, which says it; leave it out"),
        ({"prompt": None}, "give either --prompt TEXT or --prompts FILE"),
        ({"prompts": "prompts.txt"}, "give either --prompt TEXT or --prompts FILE"),
        ({"prompt": "  "}, "must not be empty"),
        ({"num_inference_steps": 0}, "must be 1 to 1000"),
        ({"guidance_scale": float("nan")}, "--guidance_scale nan"),
        ({"lora_scale": float("inf")}, "--lora_scale inf"),
        ({"lora": (), "pretrained_model_name_or_path": "x", "lora_scale": 0.5}, "no LoRA to scale"),
        ({"seed": -1}, "--seed -1"),
        ({"fps": 0.0}, "--fps 0.0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        InferConfig(**{"lora": "run", "prompt": PROMPT, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(content, tmp_path):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--prompts .*prompts\.txt"):
        InferConfig(lora=("run",), prompts=str(path)).rows()


# The command


def test_the_command_makes_videos_from_a_toml_file_and_flags(lora, tmp_path):
    (tmp_path / "infer.toml").write_text('num_inference_steps = 1\nseed = 9\noutput_dir = "wrong"\n')
    done = run_command(
        *("-m", "infer", "--config", str(tmp_path / "infer.toml"), "--lora", str(lora.parent), "--prompt", PROMPT),
        *("--no_id_token", "--output-dir", str(tmp_path / "videos")),
    )
    assert done.returncode == 0, done.stderr
    *head, line, gallery = done.stdout.splitlines()
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert [told.split()[0] for told in head] == ["base", "LoRA", "videos"]
    assert re.fullmatch(r"LoRA      .*, step 7, rank 4, weight 1", head[1])
    assert head[2] == f"videos    1 of 9x32x48, into {tmp_path / 'videos'}"
    assert gallery == f"gallery   {tmp_path / 'videos' / 'index.html'}; open it in a browser"
    assert re.fullmatch(re.escape(str(video)) + r"  \d+\.\d s  " + PROMPT, line)
    assert done.stderr == ""
    recipe = recipe_of(video)
    assert (recipe["seed"], recipe["effective_prompt"], recipe["num_inference_steps"]) == (9, PROMPT, 1)


def test_a_mistake_is_one_line_and_status_2(lora):
    done = run_command("-m", "infer", "--lora", str(lora), "--prompt", PROMPT, "--width", "50")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: width 50: must be a multiple of 16; use 48 or 64\n"


def test_a_request_is_checked_without_torch(lora, tmp_path):
    code = (
        "import sys, infer.__main__\n"
        "from infer.config import InferConfig\n"
        "assert not {'torch', 'numpy', 'diffusers', 'pyarrow'} & set(sys.modules)\n"
        "from infer.request import resolve\n"
        "assert resolve(InferConfig(lora=sys.argv[1], output_dir=sys.argv[2], prompt='a cat')).recipes\n"
        "assert not {'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = run_command("-c", code, str(lora), str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_the_toml_file_explains_every_key_at_its_default():
    lines = (ROOT / "configs" / "infer.toml").read_text(encoding="utf-8").splitlines()
    keys = [match[1] for line in lines if (match := re.match(r"(?:# )?(\w+) = .* # \S|(?:# )?(\w+) = ", line))]
    fields = {field.name: field.default for field in dataclasses.fields(InferConfig)}
    assert sorted(keys) == sorted(fields)
    told = tomllib.loads("\n".join(lines))
    assert {name: fields[name] for name in told} == told
    assert all(fields[name] in (None, ()) for name in fields.keys() - told.keys())
    argv = ["--config", str(ROOT / "configs" / "infer.toml"), "--lora", "run", "--prompt", PROMPT]
    assert parse_config(InferConfig, argv, "infer") == InferConfig(lora=("run",), prompt=PROMPT)
