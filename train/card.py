"""The card of a LoRA, README.md in its folder: what it is, what it makes, and an example that runs.

It says what the LoRA's file and the run's folder say. Paths are relative, the same in the folder and on the hub; those
of this machine are left out.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.errors import LoraError
from shared.lora import FILE_NAME, LoraFacts, read_metadata
from shared.prompts import user_prompt
from shared.storage import write_atomically
from train.record import ValidationVideo, read_recipe, read_videos

NAME = "README.md"
NO_REPOSITORY = "you/your-lora"  # to be filled in
EXAMPLE_PROMPT = "a person walks along a ridge"  # where no video was made of one
# What an example does where a LoRA was trained otherwise than diffusers' pipeline runs it.
NO_POSITIONS = """pipeline.transformer.patch_embed.use_learned_positional_embeddings = False  # as in training
"""
OTHER_FACTOR = """
prepare_latents, scale = pipeline.prepare_latents, pipeline.vae.config.scaling_factor
gain = {factor} / (1 / scale if pipeline.vae.config.invert_scale_latents else scale)


def prepare(*args, **options):
    latents, image = prepare_latents(*args, **options)
    return latents, gain * image  # first frames are multiplied as they were in training


pipeline.prepare_latents = prepare
"""
FACTORS = {"scale": "scale", "one": "1"}  # --image_factor, but for the pipeline's own


def write_card(folder: Path, hub_model_id: str | None, license: str) -> Path:
    """Write README.md beside a finished LoRA.

    Args:
        hub_model_id: the repository that the example loads from.
        license: an identifier of the hub's; `other` points at the base model's.

    Raises:
        LoraError: no LoRA of LatentReel is there.
    """
    path = folder / FILE_NAME
    adapter, facts = read_metadata(path)
    if adapter is None or facts is None:
        raise LoraError(f"{path}: its metadata do not say what it was trained on; a card needs a LoRA of LatentReel")
    text = "\n".join(_card(facts, adapter, gallery(folder), hub_model_id or NO_REPOSITORY, license)) + "\n"
    write_atomically(folder / NAME, text)
    return folder / NAME


def gallery(folder: Path) -> list[ValidationVideo]:
    """The videos of the last step that has any."""
    there = [video for video in read_videos(folder) if video.size_bytes and video.prompt]
    return [video for video in there if video.step == there[-1].step]


def _card(
    facts: LoraFacts, adapter: dict[str, Any], videos: list[ValidationVideo], hub_model_id: str, license: str
) -> Iterator[str]:
    title = hub_model_id.rpartition("/")[2]
    yield from _front_matter(facts, videos, license)
    yield f"\n# {title}\n"
    yield f"A LoRA of {_base_link(facts)} ({facts.kind}), trained with LatentReel."
    if facts.id_token:
        yield f"\nBegin prompts with its id token, {_code(facts.id_token)}."
    if videos:
        yield f"\n<Gallery />\n\n## Videos of step {videos[0].step}\n"
        for video in videos:
            seed = "" if video.seed is None else f", seed {video.seed}"
            yield f"- [{_text(_effective_prompt(video, facts))}]({_address(video)}){seed}"
    yield "\n## Use\n"
    yield "**Load it at weight 1.0, not alpha / rank**: alpha is in the file, and diffusers applies it.\n"
    yield f"```python\n{_example(facts, videos, hub_model_id)}```\n"
    yield "It needs `pip install torch 'diffusers>=0.42' transformers accelerate peft sentencepiece protobuf av`.\n"
    yield "## How it was trained\n\n| | |\n|---|---|"
    yield from (f"| {name} | {value} |" for name, value in _rows(facts, adapter))


def _front_matter(facts: LoraFacts, videos: list[ValidationVideo], license: str) -> Iterator[str]:
    """YAML; strings as JSON has them, which YAML reads."""
    yield f"---\nlicense: {json.dumps(license)}"
    if license == "other":
        yield "license_name: see-base-model"
        if _is_on_hub(facts):
            yield f"license_link: {json.dumps('https://huggingface.co/' + facts.base_model)}"
    if _is_on_hub(facts):
        yield f"base_model: {json.dumps(facts.base_model)}\nbase_model_relation: adapter"
    task = "image-to-video" if _starts_from_picture(facts) else "text-to-video"
    yield f"library_name: diffusers\npipeline_tag: {task}"
    yield f"tags:\n- {task}\n- diffusers\n- lora\n- cogvideox\n- template:diffusion-lora"
    if facts.id_token:
        yield f"instance_prompt: {json.dumps(facts.id_token)}"
    if videos:
        yield "widget:"
    for video in videos:
        yield f"- text: {json.dumps(_effective_prompt(video, facts))}"
        yield f"  output:\n    url: {json.dumps(_address(video))}"
    yield "---"


def _rows(facts: LoraFacts, adapter: dict[str, Any]) -> Iterator[tuple[str, str]]:
    scale = "alpha / sqrt(rank)" if adapter["transformer.use_rslora"] else "alpha / rank"
    kind = "DoRA" if adapter["transformer.use_dora"] else "LoRA"
    clips = "" if facts.clips is None else f": {facts.clips} clips"
    yield "base model", _base_link(facts) + (f", revision {_code(facts.revision)}" if facts.revision else "")
    yield "id token", _code(facts.id_token) if facts.id_token else "none"
    yield "kind", f"{kind}, scaled by {scale}"
    yield "rank", str(facts.rank)
    yield "alpha", f"{facts.alpha:g}"
    yield "layers", ", ".join(_code(name) for name in facts.target_modules)
    yield "steps", str(facts.step)
    yield "data set", f"{_text(facts.dataset)}, version {facts.dataset_digest[:12]}{clips}"
    yield "most common shape", f"{facts.frames} frames of {facts.width} x {facts.height} at {facts.fps:g} a second"
    yield "seed", str(facts.seed)
    yield "frozen weights while training", facts.dtype
    if facts.image_factor is not None:
        yield "first frames are multiplied", f"as {_code('--image_factor ' + facts.image_factor)} does"
    if facts.drop_learned_positions:
        yield "learned positions", "left out: the base model's table must not be used with it"


def _example(facts: LoraFacts, videos: list[ValidationVideo], hub_model_id: str) -> str:
    """Python that makes the first video of the gallery, or one of another prompt."""
    prompt = user_prompt(EXAMPLE_PROMPT, facts.id_token)
    told: dict[str, Any] = {
        "frames": facts.frames,
        "height": facts.height,
        "width": facts.width,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": False,
        "seed": 42,
    }
    if videos:
        recipe = read_recipe(videos[0])
        told |= {name: value for name, value in recipe.items() if name in told and isinstance(value, int | float)}
        told["use_dynamic_cfg"] = recipe.get("use_dynamic_cfg") is True
        prompt = _effective_prompt(videos[0], facts)
    given = {"revision": facts.revision, "variant": facts.variant}
    extra = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
    starts = _starts_from_picture(facts)
    pipeline = "CogVideoXImageToVideoPipeline" if starts else "CogVideoXPipeline"
    load = ", load_image" if starts else ""
    image = "image=load_image('start.png'),  # the picture that the video starts from\n    " if starts else ""
    as_trained = NO_POSITIONS if facts.drop_learned_positions else ""
    if facts.image_factor in FACTORS:
        as_trained += OTHER_FACTOR.format(factor=FACTORS[facts.image_factor])
    return f"""import torch
from diffusers import {pipeline}
from diffusers.utils import encode_video{load}

pipeline = {pipeline}.from_pretrained({_base_name(facts)!r}, dtype=torch.{facts.dtype}{extra})
{as_trained}pipeline.load_lora_weights({hub_model_id!r}, weight_name={FILE_NAME!r})
if torch.cuda.is_available():
    pipeline.enable_model_cpu_offload()
    pipeline.vae.enable_tiling()
frames = pipeline(
    {image}prompt={prompt!r},
    num_frames={told["frames"]},
    height={told["height"]},
    width={told["width"]},
    num_inference_steps={told["num_inference_steps"]},
    guidance_scale={told["guidance_scale"]},
    use_dynamic_cfg={told["use_dynamic_cfg"]},
    generator=torch.Generator("cpu").manual_seed({told["seed"]}),
).frames[0]
encode_video(frames, fps={round(facts.fps)}, output_path="video.mp4")
"""


def _starts_from_picture(facts: LoraFacts) -> bool:
    return facts.image_factor is not None


def _is_on_hub(facts: LoraFacts) -> bool:
    return not Path(facts.base_model).is_absolute()


def _base_name(facts: LoraFacts) -> str:
    """A hub id, or the name of a folder without where it lay."""
    return facts.base_model if _is_on_hub(facts) else Path(facts.base_model).name


def _base_link(facts: LoraFacts) -> str:
    name = _text(_base_name(facts))
    return f"[{name}](https://huggingface.co/{quote(facts.base_model)})" if _is_on_hub(facts) else name


def _effective_prompt(video: ValidationVideo, facts: LoraFacts) -> str:
    return user_prompt(" ".join((video.prompt or "").split()), facts.id_token)


def _address(video: ValidationVideo) -> str:
    return quote(f"validation/step-{video.step}/{video.path.name}")


def _text(value: str) -> str:
    """Shown as it is, whatever it holds: neither HTML nor Markdown."""
    shown = html.escape(value, quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in shown)


def _code(value: str) -> str:
    return f"<code>{_text(value)}</code>"
