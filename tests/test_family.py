"""All five checkpoints: what training gives the transformer is what diffusers' pipeline gives it, in all stages."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from infer.__main__ import main as infer
from infer.generate import load_pipeline
from infer.image import fit_image, open_image
from shared.cache import Cache
from shared.config import parse_config
from shared.dataset import open_dataset
from shared.errors import CacheError, ConfigError, LoraError
from shared.geometry import Bucket
from shared.lora import FILE_NAME, TARGET_MODULES, add_lora, load_lora_state, read_metadata
from shared.models import Checkpoint, load_transformer
from shared.seeds import seed_for
from shared.sizes import check_bucket, check_dtype
from tests import tiny_model
from tests.conftest import ROOT, moving_square, write_video
from tests.test_lora_inference import apply_lora, checkpoint_at
from tests.test_objective import Recorder, make_batch, schedule_of
from tests.test_preprocess import preprocess, resized_frames
from tests.training import rows_of, train_here
from train.config import TrainConfig
from train.draws import draw_bool
from train.holdout import DRAWS
from train.objective import batch_loss, padding
from train.reading import LatentDataset, collate
from train.samples import DrawSettings, Samples, kinds_for

KINDS = tuple(tiny_model.KINDS)
I2V = ("5b-i2v", "1.5-5b-i2v")
SHAPES = [(9, 64, 96), (13, 64, 96), (9, 96, 64), (13, 96, 64)]  # an odd and an even count of latent frames
NATIVE = SHAPES[0]  # what 5B-I2V's learned positions are for
TIMESTEP = 437
PLAIN = DrawSettings(seed=0, global_batch=8, stratified=False, random_flip=0.0, caption_dropout=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of each kind; 5B-I2V's table is for NATIVE."""
    root = tmp_path_factory.mktemp("family")
    natives = {"5b-i2v": NATIVE}
    return {kind: tiny_model.build(root / kind, kind, native=natives.get(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Two clips of 13 frames, their captions, and a picture of another shape."""
    folder = tmp_path_factory.mktemp("manifest")
    for number in range(2):
        write_video(folder / f"{number}.mp4", moving_square(number, 13, 72, 104))
        (folder / f"{number}.txt").write_text(f"a square of colour number {number}", encoding="utf-8")
    Image.fromarray(moving_square(5, 1, 90, 120)[0]).save(folder.parent / "start.png")
    return folder


@pytest.fixture(scope="module")
def picture(manifest) -> Path:
    return manifest.parent / "start.png"


def encode(kind: str, model: Path, manifest: Path, cache: Path, shape=NATIVE) -> Path:
    """Stage 1 at a shape."""
    frames, height, width = shape
    dropped = ["--drop_learned_positions"] if kind == "5b-i2v" and shape != NATIVE else []
    size = ["--height", height, "--width", width, "--max_num_frames", frames, "--fps", "8", *dropped]
    preprocess(cache, model, manifest, size=size)
    return cache


@pytest.fixture(scope="module")
def caches(models, manifest, tmp_path_factory) -> dict[str, Path]:
    """Each kind's data set `squares` of two clips at NATIVE."""
    root = tmp_path_factory.mktemp("caches")
    return {kind: encode(kind, models[kind], manifest, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def runs(models, caches, tmp_path_factory) -> dict[str, Path]:
    """Each kind's LoRA after two steps."""
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        assert train_here(caches[kind], root / kind, max_train_steps=2, train_batch_size=2) == 0
    return {kind: root / kind for kind in KINDS}


def dropped_at(kind: str, shape) -> bool:
    return kind == "5b-i2v" and shape != NATIVE


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_file_for_stage_2_that_fits_it(kind):
    path = ROOT / "configs" / f"{kind}.toml"
    config = parse_config(TrainConfig, ["--config", str(path)], "train")
    name = str(config.pretrained_model_name_or_path).lower().removeprefix("thudm/cogvideox").removeprefix("-")
    assert name == kind
    assert config.mixed_precision == ("fp16" if kind == "2b" else "bf16")
    keys = set(tomllib.loads(path.read_text(encoding="utf-8")))
    assert ("image_factor" in keys) == (kind in I2V)
    assert ("drop_learned_positions" in keys) == (kind == "5b-i2v")


# What the transformer is given


def pipeline_inputs(pipeline: Any, batch: Any, latents: torch.Tensor, shape, **given: Any) -> dict[str, Any]:
    """What a real call of a pipeline gives its transformer for these latents at TIMESTEP."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps = lambda count, device: setattr(
        pipeline.scheduler, "timesteps", torch.tensor([TIMESTEP])
    )
    pipeline.scheduler.num_inference_steps = 1
    seen: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs), with_kwargs=True
    )
    frames, height, width = shape
    pipeline(
        prompt_embeds=batch.prompt_embeds,
        latents=latents,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        **given,
    )
    hook.remove()
    (inputs,) = seen
    assert inputs.pop("attention_kwargs") is None
    return inputs


def trainer_batch(checkpoint: Checkpoint, pipeline: Any, shape, picture: Path, factor: str = "pipeline"):
    """A batch of one at TIMESTEP, its image's moments the VAE's own; and what the pipeline takes the image as."""
    frames, height, width = Bucket(*shape).latent_shape
    padded = frames + padding(frames, checkpoint.facts.patch_size_t)
    batch = make_batch([TIMESTEP], frames, height, width, padded=padded)
    if not checkpoint.facts.image_to_video:
        return batch, {}
    image = fit_image(open_image(picture), *shape[1:])
    pixels = pipeline.video_processor.preprocess(image, height=shape[1], width=shape[2])
    with torch.no_grad():
        moments = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.parameters
    noise = torch.randn(1, 16, 1, height, width, generator=torch.Generator().manual_seed(5))
    scale = torch.tensor([checkpoint.facts.image_factor(factor)])
    batch = dataclasses.replace(batch, image_moments=moments, image_posterior_noise=noise, image_factors=scale)
    return batch, {"image": image, "generator": torch.Generator().manual_seed(5)}


@pytest.fixture(scope="module")
def pipelines(models) -> dict[str, Any]:
    """diffusers' own pipeline of each kind."""
    classes = {kind: CogVideoXImageToVideoPipeline if kind in I2V else CogVideoXPipeline for kind in KINDS}
    return {kind: classes[kind].from_pretrained(models[kind]) for kind in KINDS}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_is_given_what_the_pipeline_gives_it(models, pipelines, picture, kind, shape):
    """Same latents, image, prompt and timestep: one denoising step of a real pipeline, its transformer watched."""
    checkpoint, pipeline, recorder = checkpoint_at(models[kind]), pipelines[kind], Recorder()
    batch, given = trainer_batch(checkpoint, pipeline, shape, picture)
    batch_loss(recorder, batch, checkpoint.facts, schedule_of(checkpoint), torch.float32)
    own = recorder.inputs
    pipeline.transformer.patch_embed.use_learned_positional_embeddings = kind == "5b-i2v" and shape == NATIVE

    theirs = pipeline_inputs(pipeline, batch, own["hidden_states"][:, :, :16], shape, **given)

    frames, height, width = Bucket(*shape).latent_shape
    padded = frames + (frames % 2 if kind.startswith("1.5") else 0)
    assert own["hidden_states"].shape == (1, padded, 32 if kind in I2V else 16, height, width)
    assert theirs.keys() == own.keys()
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        assert theirs[name].dtype == own[name].dtype
        assert torch.equal(theirs[name], own[name]), name
    assert (theirs["image_rotary_emb"] is None) == (own["image_rotary_emb"] is None) == (kind == "2b")
    for one, other in zip(theirs["image_rotary_emb"] or (), own["image_rotary_emb"] or (), strict=True):
        assert torch.equal(one, other)
    if kind == "1.5-5b-i2v":
        assert torch.equal(own["ofs"], torch.tensor([2.0]))
        assert torch.equal(theirs["ofs"], own["ofs"])
    else:
        assert own.get("ofs") is theirs.get("ofs") is None
    if kind in I2V:
        condition = own["hidden_states"][0, :, 16:]
        assert condition[0].std() > 0.1
        assert not condition[1:].any()


@pytest.mark.parametrize("factor", ["pipeline", "scale", "one"])
@pytest.mark.parametrize("kind", I2V)
def test_stage_3_multiplies_the_image_by_the_factor_of_training(models, picture, kind, factor):
    checkpoint, recorder = checkpoint_at(models[kind]), Recorder()
    pipeline = load_pipeline(checkpoint, checkpoint.config("scheduler"), "float32", image_factor=factor)
    batch, given = trainer_batch(checkpoint, pipeline, NATIVE, picture, factor)
    batch_loss(recorder, batch, checkpoint.facts, schedule_of(checkpoint), torch.float32)
    own = recorder.inputs["hidden_states"]
    theirs = pipeline_inputs(pipeline, batch, own[:, :, :16], NATIVE, **given)["hidden_states"]
    torch.testing.assert_close(theirs, own, rtol=1e-6, atol=0)
    expected = {"one": 1.0, "scale": 0.7, "pipeline": 1 / 0.7 if kind == "1.5-5b-i2v" else 0.7}[factor]
    assert checkpoint.facts.image_factor(factor) == pytest.approx(expected)


# What is read and drawn for an image


@pytest.fixture(scope="module")
def reading(models, caches):
    """The 1.5 image-to-video data set, its samples, and what its images are stored as."""
    dataset = open_dataset(Cache(str(caches["1.5-5b-i2v"])), "squares")
    facts = checkpoint_at(models["1.5-5b-i2v"]).facts
    return dataset, facts, Samples(dataset, kinds_for(facts))


def test_a_visit_sees_one_of_the_cached_variants(reading):
    dataset, facts, samples = reading
    reader, seen = LatentDataset(dataset, facts, PLAIN), set()
    for step in range(30):
        request = samples.request(1, step, 0, 1.0, PLAIN)
        stacked = reader._readers[0].read(reader._members(request)["image_moments"])
        row = reader[request]
        (variant,) = [number for number in range(4) if np.array_equal(stacked[number], row["image_moments"])]
        seen.add(variant)
        generator = torch.Generator().manual_seed(seed_for(0, step, 0, "image_posterior"))
        assert torch.equal(row["image_posterior_noise"], torch.randn(16, 1, 8, 12, generator=generator))
        assert row["image_factors"] == pytest.approx(1 / 0.7)
        again = LatentDataset(dataset, facts, PLAIN)[request]
        assert np.array_equal(again["image_moments"], row["image_moments"])
    assert seen == {0, 1, 2, 3}
    assert request.reads == 3


def test_images_are_dropped_a_place_at_a_time_and_never_from_what_is_held_out(reading):
    dataset, facts, samples = reading
    draws = dataclasses.replace(PLAIN, noised_image_dropout=0.3)
    reader = LatentDataset(dataset, facts, draws, image_factor="scale")
    requests = [samples.request(0, step, place, 1.0, draws) for step in range(4) for place in range(8)]
    batch = collate([reader[request] for request in requests])
    assert not isinstance(batch, Exception)
    expected = [not draw_bool(0, request.step, request.place, "image_dropout", 0.3) for request in requests]
    assert batch.image_factors is not None
    assert batch.image_factors.tolist() == pytest.approx([0.7 * kept for kept in expected])
    assert 0 < sum(expected) < len(requests)
    held = LatentDataset(dataset, facts, DRAWS)
    factors = [held[samples.request(0, step, 0, 1.0, DRAWS)]["image_factors"] for step in range(100)]
    assert min(factors) > 0


def test_a_dropped_image_is_zeros(models, reading):
    _, facts, _ = reading
    checkpoint, recorder = checkpoint_at(models["1.5-5b-i2v"]), Recorder()
    noise = torch.ones(1, 16, 1, 8, 12)
    batch = dataclasses.replace(
        make_batch([3], padded=4), image_moments=torch.ones(1, 32, 1, 8, 12), image_posterior_noise=noise,
        image_factors=torch.zeros(1),
    )  # fmt: skip
    batch_loss(recorder, batch, facts, schedule_of(checkpoint), torch.float32)
    assert not recorder.inputs["hidden_states"][:, :, 16:].any()


def test_text_to_video_reads_no_images_of_a_data_set_that_has_them(models, caches):
    """5B and 5B-I2V may share a data set."""
    dataset, facts = open_dataset(Cache(str(caches["5b-i2v"])), "squares"), checkpoint_at(models["5b"]).facts
    samples = Samples(dataset, kinds_for(facts))
    request = samples.request(0, 0, 0, 1.0, PLAIN)
    assert request.image is None
    assert request.reads == 2
    assert "image_moments" not in LatentDataset(dataset, facts, PLAIN)[request]


# A LoRA's way through the stages


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_in_the_pipeline_predicts_what_the_trainer_predicts(models, caches, pipelines, picture, runs, kind):
    checkpoint = checkpoint_at(models[kind])
    trained = load_transformer(checkpoint, torch.float32)
    add_lora(trained, rank=4, alpha=2.0, target_modules=TARGET_MODULES, seed=9)
    load_lora_state(trained, runs[kind] / FILE_NAME)
    pipeline = load_pipeline(checkpoint, checkpoint.config("scheduler"), "float32")
    base = load_pipeline(checkpoint, checkpoint.config("scheduler"), "float32")
    apply_lora(pipeline, runs[kind] / FILE_NAME, 1.0)

    dataset, facts = open_dataset(Cache(str(caches[kind])), "squares"), checkpoint.facts
    samples, recorder = Samples(dataset, kinds_for(facts)), Recorder()
    reader = LatentDataset(dataset, facts, PLAIN)
    batch = collate([reader[samples.request(number, 5, number, 1.0, PLAIN)] for number in range(2)])
    assert not isinstance(batch, Exception)
    batch_loss(recorder, batch, facts, schedule_of(checkpoint), torch.float32)
    with torch.no_grad():
        wanted, found, without = (
            transformer(**recorder.inputs)[0] for transformer in (trained, pipeline.transformer, base.transformer)
        )
    assert torch.equal(found, wanted)
    assert (found - without).abs().max() > 1e-3

    for shape in SHAPES:  # a draw of chance at each
        batch, _ = trainer_batch(checkpoint, pipelines[kind], shape, picture)
        batch_loss(recorder, batch, facts, schedule_of(checkpoint), torch.float32)
        for transformer in (trained, pipeline.transformer):
            transformer.patch_embed.use_learned_positional_embeddings = kind == "5b-i2v" and shape == NATIVE
        with torch.no_grad():
            assert torch.equal(pipeline.transformer(**recorder.inputs)[0], trained(**recorder.inputs)[0]), shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_it_found_and_trained_on(runs, kind, models):
    _, facts = read_metadata(runs[kind] / FILE_NAME)
    assert facts is not None
    assert facts.kind == checkpoint_at(models[kind]).facts.kind
    assert facts.image_factor == ("pipeline" if kind in I2V else None)
    assert facts.drop_learned_positions is False
    assert all(row["loss"] > 0 for row in rows_of(runs[kind]))


def make_video(folder: Path, *flags: Any) -> dict[str, Any]:
    """Stage 3 with two steps; the recipe of its one video."""
    words = ["--prompt", "a square", "--num_inference_steps", "2", "--output_dir", folder, *flags]
    assert infer([str(word) for word in words]) == 0
    (recipe,) = folder.glob("*.json")
    return json.loads(recipe.read_text(encoding="utf-8"))


def shapes_of(kind: str) -> list[tuple[int, int, int]]:
    """Two sizes and two counts of frames; 5B-I2V's table is for one."""
    return [NATIVE] if kind == "5b-i2v" else [NATIVE, SHAPES[-1]]


@pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind in KINDS for shape in shapes_of(kind)], ids=str)
def test_the_lora_changes_the_video_and_scale_0_restores_it(models, runs, picture, tmp_path, kind, shape):
    image = ("--image", picture) if kind in I2V else ()
    frames, height, width = shape
    size = ("--num_frames", frames, "--height", height, "--width", width)
    base = make_video(tmp_path / "base", "--pretrained_model_name_or_path", models[kind], *size, *image)
    asked = () if shape == NATIVE else size  # what the LoRA was trained at need not be said
    with_lora = make_video(tmp_path / "lora", "--lora", runs[kind], *asked, *image)
    without = make_video(tmp_path / "zero", "--lora", runs[kind], "--lora_scale", "0", *asked, *image)
    assert (with_lora["frames"], with_lora["height"], with_lora["width"]) == shape
    assert with_lora["frames_sha256"] != base["frames_sha256"]
    assert without["frames_sha256"] == base["frames_sha256"]
    if image:
        assert with_lora["image"]["path"] == str(picture)
        other = tmp_path / "other.png"
        Image.open(picture).rotate(180).save(other)
        changed = make_video(tmp_path / "changed", "--lora", runs[kind], *asked, "--image", other)
        assert changed["frames_sha256"] != with_lora["frames_sha256"]
        assert changed["image"]["sha256"] != with_lora["image"]["sha256"]


@pytest.mark.slow
def test_validation_videos_start_from_their_pictures(models, manifest, picture, tmp_path, capsys):
    size = ["--height", "64", "--width", "96", "--max_num_frames", "9", "--fps", "8"]
    prompted = ("--validation_prompt", "a red square:::a blue square")
    preprocess(tmp_path / "cache", models["1.5-5b-i2v"], manifest, *prompted, size=size)
    other = tmp_path / "other.png"
    Image.open(picture).rotate(180).save(other)
    flags: dict[str, Any] = {"max_train_steps": 1, "validation_steps": 1, "validation_inference_steps": 1}
    for images, told in (
        (None, "--validation_images is missing: the checkpoint is CogVideoX 1.5 image-to-video"),
        (":::".join([str(other)] * 3), "3 pictures for 2 prompts"),
        ("nowhere.png", "nowhere.png: cannot be read as a picture"),
    ):
        with pytest.raises(ConfigError, match=told):
            train_here(
                tmp_path / "cache", tmp_path / "no", **flags, **({"validation_images": images} if images else {})
            )
    with_images = {**flags, "validation_images": f"{picture}:::{other}"}
    assert train_here(tmp_path / "cache", tmp_path / "run", **with_images) == 0
    recipes = [json.loads(file.read_text()) for file in (tmp_path / "run" / "validation" / "step-1").glob("*.json")]
    started = {recipe["prompt"]: Path(recipe["image"]["path"]) for recipe in recipes}
    assert {path.parent for path in started.values()} == {tmp_path / "run" / "validation" / "images"}
    read = {prompt: path.read_bytes() for prompt, path in started.items()}
    assert read == {"a red square": picture.read_bytes(), "a blue square": other.read_bytes()}
    assert "warning" not in capsys.readouterr().out


def test_validation_images_are_refused_for_text_to_video(caches, picture, tmp_path):
    with pytest.raises(ConfigError, match=r"--validation_images .*start from none"):
        train_here(caches["5b"], tmp_path / "run", max_train_steps=1, validation_images=picture)


def test_dropped_positions_are_recorded_and_obeyed(models, manifest, picture, tmp_path, monkeypatch, capsys):
    """At another size and count than the table's, on both sides without it; rehearsed, as on a GPU."""
    monkeypatch.setattr("train.loop.is_needed", lambda device: True)
    shape, model = (13, 96, 64), models["5b-i2v"]
    cache = encode("5b-i2v", model, manifest, tmp_path / "cache", shape)
    with pytest.raises(CacheError, match=r"size 13x96x64: .* learned positions for 9x64x96 only; use 9x64x96, or"):
        train_here(cache, tmp_path / "run", max_train_steps=1)
    dropped: dict[str, Any] = {"max_train_steps": 1, "drop_learned_positions": True, "image_factor": "one"}
    assert train_here(cache, tmp_path / "run", **dropped) == 0
    assert "memory    13x96x64: " in capsys.readouterr().out
    _, facts = read_metadata(tmp_path / "run" / FILE_NAME)
    assert facts is not None
    assert facts.drop_learned_positions
    assert facts.image_factor == "one"
    recipe = make_video(tmp_path / "videos", "--lora", tmp_path / "run", "--image", picture)
    assert (recipe["frames"], recipe["height"], recipe["width"]) == shape
    assert recipe["drop_learned_positions"]
    assert recipe["image_factor"] == "one"


def test_without_the_table_the_first_layer_gives_what_the_weights_give(models):
    checkpoint = checkpoint_at(models["5b-i2v"])
    whole, dropped = (
        load_transformer(checkpoint, torch.float32, drop_learned_positions=drop) for drop in (False, True)
    )
    text, video = torch.zeros(1, 226, 32), torch.zeros(1, 3, 32, 8, 12)
    with torch.no_grad():
        difference = whole.patch_embed(text, video) - dropped.patch_embed(text, video)
    torch.testing.assert_close(difference, whole.patch_embed.pos_embedding, rtol=0, atol=1e-5)
    assert difference.std() > 0.5


@pytest.mark.parametrize("kind", I2V)
def test_levers_on_memory_change_no_loss(caches, tmp_path, kind):
    plain = train_here(caches[kind], tmp_path / "plain", max_train_steps=2)
    levers: dict[str, Any] = {"ff_chunks": 3, "offload_activations": True}
    assert train_here(caches[kind], tmp_path / "levers", max_train_steps=2, **levers) == plain == 0
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("plain", "levers")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dropped_images_and_the_factor_change_the_losses(caches, tmp_path):
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "plain": {"noised_image_dropout": 0.0},
        "dropped": {"noised_image_dropout": 1.0},
        "scale": {"noised_image_dropout": 0.0, "image_factor": "scale"},
    }
    for name, settings in variants.items():
        assert train_here(caches["1.5-5b-i2v"], tmp_path / name, max_train_steps=1, **settings) == 0
        found[name] = rows_of(tmp_path / name)[0]["loss"]
    assert len(set(found.values())) == 3


def test_an_image_is_fitted_as_stage_1_fits_a_frame(tmp_path):
    clip = write_video(tmp_path / "a.mp4", moving_square(3, 1, 90, 130))
    import av

    with av.open(str(clip)) as container:
        (frame,) = container.decode(video=0)
        Image.fromarray(frame.to_ndarray(format="rgb24")).save(tmp_path / "a.png")
    fitted = np.asarray(fit_image(open_image(tmp_path / "a.png"), 64, 96))
    expected = resized_frames(clip, 64, 96)[0, :, 0].permute(1, 2, 0)
    np.testing.assert_allclose(fitted / 127.5 - 1, expected, atol=1e-6)


# What is refused


def test_a_lora_of_one_kind_is_refused_on_another(models, runs, picture, tmp_path):
    for kind in KINDS:
        for other in KINDS:
            if kind == other:
                continue
            image = ("--image", picture) if other in I2V else ()
            words = ("--lora", runs[kind], "--pretrained_model_name_or_path", models[other], *image)
            with pytest.raises(LoraError, match="was trained on CogVideoX 1"):
                make_video(tmp_path, *words)


def test_an_image_is_asked_for_and_refused_by_kind(models, runs, picture, tmp_path):
    with pytest.raises(ConfigError, match="--image is missing"):
        make_video(tmp_path, "--lora", runs["5b-i2v"])
    with pytest.raises(ConfigError, match=r"--image .*start\.png: .* starts from none"):
        make_video(tmp_path, "--lora", runs["5b"], "--image", picture)
    (tmp_path / "no.png").write_bytes(b"no picture")
    for path in (tmp_path / "no.png", tmp_path / "gone.png"):
        with pytest.raises(ConfigError, match=r"cannot be read as a picture"):
            make_video(tmp_path / "videos", "--lora", runs["5b-i2v"], "--image", path)


@pytest.mark.parametrize(
    ("kind", "size", "told"),
    [
        ("1.5-5b", (81, 2416, 1360), "use 81x2400x1360"),
        ("1.5-5b-i2v", (5, 16, 4000), "use 5x16x2400"),
        ("5b-i2v", (9, 96, 64), "use 9x64x96, or leave them out with --drop_learned_positions"),
        ("5b-i2v", (13, 64, 96), "use 9x64x96, or leave them out with --drop_learned_positions"),
    ],
)
def test_a_size_that_a_checkpoint_cannot_take_is_refused_before_anything_is_done(
    models, manifest, picture, tmp_path, monkeypatch, kind, size, told
):
    for loader in ("preprocess.encode.load_vae", "preprocess.encode.load_text_encoder", "infer.generate.load_vae"):
        monkeypatch.setattr(loader, lambda *_: pytest.fail("weights were loaded"))
    frames, height, width = size
    with pytest.raises(ConfigError, match=told):
        preprocess(
            tmp_path / "cache", models[kind], manifest,
            size=["--height", height, "--width", width, "--max_num_frames", frames, "--min_num_frames", 5],
        )  # fmt: skip
    assert not (tmp_path / "cache").exists()
    words = ("--num_frames", frames, "--height", height, "--width", width)
    image = ("--image", picture) if kind in I2V else ()
    with pytest.raises(ConfigError, match=told):
        make_video(tmp_path / "videos", "--pretrained_model_name_or_path", models[kind], *words, *image)


def test_every_size_is_taken_where_positions_are_computed(models):
    for kind in ("2b", "5b"):
        facts = checkpoint_at(models[kind]).facts
        check_bucket(Bucket(201, 2416, 4000), facts, kind, drop_learned_positions=False)


def test_learned_positions_that_are_not_there_cannot_be_dropped(models, caches, manifest, tmp_path):
    with pytest.raises(ConfigError, match=r"--drop_learned_positions: .* has no learned positions"):
        train_here(caches["5b"], tmp_path / "run", max_train_steps=1, drop_learned_positions=True)
    with pytest.raises(ConfigError, match=r"--drop_learned_positions: .* has no learned positions"):
        preprocess(tmp_path / "cache", models["2b"], manifest, "--drop_learned_positions")
    with pytest.raises(ConfigError, match=r"--image_factor one: .* without images"):
        train_here(caches["5b"], tmp_path / "run", max_train_steps=1, image_factor="one")
    with pytest.raises(ConfigError, match=r"--noised_image_dropout 0\.3: .* without images"):
        train_here(caches["5b"], tmp_path / "run", max_train_steps=1, noised_image_dropout=0.3)


def test_a_clip_that_does_not_fill_the_learned_count_is_rejected(models, tmp_path):
    """Elsewhere it would be encoded with fewer frames; here no positions were learned for them."""
    write_video(tmp_path / "clips.mp4", moving_square(0, 13, 72, 104))
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, frames in (("long", 13), ("short", 5)):
        write_video(folder / f"{name}.mp4", moving_square(0, frames, 72, 104))
        (folder / f"{name}.txt").write_text(name)
    size = ["--height", "64", "--width", "96", "--max_num_frames", "9", "--min_num_frames", "5", "--fps", "8"]
    opened = preprocess(tmp_path / "cache", models["5b-i2v"], folder, size=size)
    assert [row["frames"] for row in opened.rows] == [9]
    assert [row["reason"] for row in opened.rejected] == ["too_short"]


def test_float16_for_a_bfloat16_checkpoint_is_refused_unless_allowed(models, caches, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "stored_dtype", lambda checkpoint, part: "bfloat16")
    told = r"--dtype float16: the .* is stored in bfloat16, .* or give --allow_dtype"
    with pytest.raises(ConfigError, match=told):
        preprocess(tmp_path / "cache", models["5b"], manifest, "--dtype", "float16")
    with pytest.raises(ConfigError, match=told):
        make_video(tmp_path, "--pretrained_model_name_or_path", models["5b"], "--dtype", "float16")
    with pytest.raises(ConfigError, match=r"--mixed_precision fp16: the transformer .* or give --allow_dtype"):
        train_here(caches["5b"], tmp_path / "run", max_train_steps=1, mixed_precision="fp16")
    with pytest.raises(ConfigError, match="needs a GPU"):  # allowed: what is told is the next reason
        train_here(caches["5b"], tmp_path / "run", max_train_steps=1, mixed_precision="fp16", allow_dtype=True)
    check_dtype(checkpoint_at(models["5b"]), "vae", "float16", "--dtype float16", allowed=True)
    check_dtype(checkpoint_at(models["5b"]), "vae", "bfloat16", "--dtype bfloat16", allowed=False)
