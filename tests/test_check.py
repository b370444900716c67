"""Before step 1: a data set that does not fit the checkpoint, and a LoRA file that does not keep what it is given."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from shared.cache import Cache
from shared.dataset import open_dataset
from shared.digests import file_digest
from shared.errors import CacheError, LoraError, UserError
from shared.lora import FILE_NAME, TARGET_MODULES, LoraFacts, add_lora, lora_state
from shared.models import load_transformer, open_checkpoint
from tests import tiny_model
from tests.training import train_here
from train import check
from train.check import check_dataset, check_lora_file


@pytest.fixture
def model(tiny_2b, tmp_path):
    """A checkpoint that a test may change; digests of its weights are not known on this machine."""
    return shutil.copytree(tiny_2b, tmp_path / "model")


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch, request):
    """Nothing large is loaded before the data set is known to fit."""
    if "transformer" not in request.fixturenames:
        monkeypatch.setattr("train.setup.load_transformer", lambda *_: pytest.fail("weights were loaded"))


def change(model, part, **values):
    path = model / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(cache, model, output_dir, kind=UserError):
    with pytest.raises(kind) as caught:
        train_here(cache, output_dir, pretrained_model_name_or_path=model, max_train_steps=1)
    assert "\n" not in str(caught.value)
    assert {path.name for path in output_dir.iterdir()} == {".lock"}  # no configuration, no metrics
    return str(caught.value)


def opened(folder):
    return open_checkpoint(str(folder), revision=None, variant=None, cache_dir=None, weights=("transformer",))


@pytest.mark.parametrize(
    ("part", "key", "value", "told"),
    [
        ("vae", "norm_num_groups", 2, "vae config norm_num_groups is 4"),
        ("vae", "layers_per_block", 3, "vae config layers_per_block is 1"),
        ("vae", "latent_channels", 4, "vae latent_channels is 16"),
        ("vae", "use_quant_conv", True, "vae config use_quant_conv is False"),
        ("transformer", "text_embed_dim", 64, "text encoder d_model is 32"),
        ("transformer", "max_text_seq_length", 64, "max_text_seq_length is 226"),
    ],
)
def test_another_models_data_set_is_refused_by_field(cache, model, tmp_path, part, key, value, told):
    change(model, part, **{key: value})
    line = refusal(cache, model, tmp_path / "run", CacheError)
    assert line == (
        f"data set squares in {cache}: {told}, {model} has {value!r}; "
        f"run stage 1 with --pretrained_model_name_or_path {model}"
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_weights_are_refused_where_their_digest_is_known(cache, model, tiny_5b, tmp_path, part):
    name = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}[part]
    shutil.copy(tiny_5b / part / name, model / part / name)
    digest = file_digest(model / part / name)
    line = refusal(cache, model, tmp_path / "run", CacheError)
    assert f"{part} weights is " in line
    assert digest in line


def test_weights_are_not_hashed_for_the_comparison(cache, model, tiny_5b, monkeypatch):
    """Gigabytes would be read: where no digest is known, the configs must do."""
    name = "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(tiny_5b / name, model / name)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file was hashed"))
    check_dataset(open_dataset(Cache(str(cache)), "squares"), opened(model), ["9x64x96"])


def test_a_checkpoint_without_vae_and_text_weights_is_enough(cache, model):
    for weights in (*model.glob("vae/*.safetensors"), *model.glob("text_encoder/*.safetensors")):
        weights.unlink()
    check_dataset(open_dataset(Cache(str(cache)), "squares"), opened(model), ["9x64x96"])


def test_what_decoding_alone_depends_on_may_differ(cache, model):
    change(model, "vae", scaling_factor=0.7, invert_scale_latents=True, sample_height=64)
    check_dataset(open_dataset(Cache(str(cache)), "squares"), opened(model), ["9x64x96"])


def test_a_bucket_beyond_the_positions_of_1_5_is_refused(cache, model):
    change(model, "transformer", patch_size_t=2, sample_height=300, sample_width=300)
    dataset = open_dataset(Cache(str(cache)), "squares")
    check_dataset(dataset, opened(model), ["81x768x1360", "9x2400x2400"])
    with pytest.raises(CacheError, match=r"size 9x64x2416: .* for 2400 x 2400 pixels at most; use 9x64x2400"):
        check_dataset(dataset, opened(model), ["81x768x1360", "9x64x2416"])


def test_an_image_to_video_checkpoint_needs_first_frames_and_is_told_how_they_are_made(cache, tmp_path):
    model = tiny_model.build(tmp_path / "i2v", "5b-i2v")
    line = refusal(cache, model, tmp_path / "run", CacheError)
    assert line.startswith(
        f"data set squares in {cache}: has no encodings of first frames, and {model} is CogVideoX 1.0 image-to-video "
        f"(RoPE); make them with `python -m preprocess --cache {cache} --dataset squares "
        f"--pretrained_model_name_or_path {model}`"
    )


def test_a_data_set_that_is_not_there_is_refused_by_name(cache, tmp_path):
    with pytest.raises(CacheError, match="no data set 'circles'; it has squares"):
        train_here(cache, tmp_path / "run", dataset="circles")


# --- the LoRA's file

FACTS = LoraFacts(
    base_model="m", revision=None, variant=None, kind="k", rank=4, alpha=2.0, target_modules=list(TARGET_MODULES),
    dataset="d", dataset_digest="0", id_token=None, seed=1, step=0, dtype="float32", text_dtype="float32",
    cache_dtype="float16", frames=9, height=64, width=96, fps=8.0,
)  # fmt: skip


@pytest.fixture(params=["plain", "use_dora"])
def transformer(tiny_2b, request):
    import torch

    transformer = load_transformer(opened(tiny_2b), torch.float32)
    dora = request.param == "use_dora"
    add_lora(transformer, rank=4, alpha=2.0, target_modules=TARGET_MODULES, seed=1, use_dora=dora)
    return transformer


def test_the_check_leaves_the_lora_and_the_folder_as_they_were(transformer, tmp_path):
    before = lora_state(transformer)
    check_lora_file(transformer, FACTS, tmp_path)
    after = lora_state(transformer)
    assert all(before[name].equal(after[name]) for name in before)
    assert not list(tmp_path.iterdir())


def without_alpha(path):
    save_file(load_file(path), path, metadata={"format": "pt", "latentreel": json.dumps(vars(FACTS))})


def rounded(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: value.bfloat16().float() for name, value in load_file(path).items()}, path, metadata=metadata)


def of_another_kind(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = metadata["lora_adapter_metadata"].replace('use_rslora": false', 'use_rslora": true')
    save_file(load_file(path), path, metadata={**metadata, "lora_adapter_metadata": told})


@pytest.mark.parametrize("spoil", [without_alpha, rounded, of_another_kind])
def test_a_file_that_comes_back_changed_is_refused(transformer, tmp_path, monkeypatch, spoil):
    save = check.save_lora

    def save_spoilt(*args):
        path = save(*args)
        assert path.name == FILE_NAME
        spoil(path)
        return path

    monkeypatch.setattr(check, "save_lora", save_spoilt)
    with pytest.raises(LoraError, match="came back changed"):
        check_lora_file(transformer, FACTS, tmp_path)
