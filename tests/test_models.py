"""What a checkpoint's files say, for the five kinds of CogVideoX, and what is said of files that are not one."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import ModelError
from shared.models import (
    Checkpoint,
    choose_dtype,
    load_text_encoder,
    load_transformer,
    load_vae,
    open_checkpoint,
)
from tests import tiny_model

# Each as maths.md tells it; the widths are the tiny model's.
COMMON = {
    "out_channels": 16,
    "latent_channels": 16,
    "patch_size": 2,
    "attention_head_dim": 16,
    "max_text_seq_length": 226,
    "text_embed_dim": 32,
}
FIRST = {**COMMON, "patch_size_t": None, "ofs_embed_dim": None, "sample_height": 60, "sample_width": 90,
         "sample_frames": 49, "invert_scale_latents": False}  # fmt: skip
SECOND = {**COMMON, "patch_size_t": 2, "sample_height": 300, "sample_width": 300, "sample_frames": 81,
          "invert_scale_latents": True, "scaling_factor": 0.7, "rotary": True, "learned_positions": False}  # fmt: skip
FACTS = {
    "2b": {**FIRST, "in_channels": 16, "scaling_factor": 1.15258426, "rotary": False, "learned_positions": False},
    "5b": {**FIRST, "in_channels": 16, "scaling_factor": 0.7, "rotary": True, "learned_positions": False},
    "5b-i2v": {**FIRST, "in_channels": 32, "scaling_factor": 0.7, "rotary": True, "learned_positions": True},
    "1.5-5b": {**SECOND, "in_channels": 16, "ofs_embed_dim": None},
    "1.5-5b-i2v": {**SECOND, "in_channels": 32, "ofs_embed_dim": 512},
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Checkpoint]:
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: open_folder(tiny_model.build(folder / kind, kind)) for kind in tiny_model.KINDS}


@pytest.fixture
def checkpoint(tiny_2b, tmp_path) -> Checkpoint:
    """A checkpoint that a test may change."""
    return open_folder(Path(shutil.copytree(tiny_2b, tmp_path / "checkpoint")))


def open_folder(folder: Path, variant: str | None = None) -> Checkpoint:
    return open_checkpoint(str(folder), revision=None, variant=variant, cache_dir=None, weights=())


def edit(checkpoint: Checkpoint, part: str, **changes) -> Checkpoint:
    """The checkpoint, opened anew, with other values in a part's config; None removes a key."""
    path = checkpoint.folder / part / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return open_folder(checkpoint.folder)


# What configs say.


@pytest.mark.parametrize("kind", tiny_model.KINDS)
def test_facts_are_what_the_configs_say(kinds, kind):
    assert dataclasses.asdict(kinds[kind].facts) == FACTS[kind]


@pytest.mark.parametrize(
    ("kind", "fps", "size", "image", "words"),
    [
        ("2b", 8, (480, 720), False, "CogVideoX 1.0 text-to-video (sin-cos positions)"),
        ("5b", 8, (480, 720), False, "CogVideoX 1.0 text-to-video (RoPE)"),
        ("5b-i2v", 8, (480, 720), True, "CogVideoX 1.0 image-to-video (RoPE)"),
        ("1.5-5b", 16, (768, 1360), False, "CogVideoX 1.5 text-to-video (RoPE)"),
        ("1.5-5b-i2v", 16, (768, 1360), True, "CogVideoX 1.5 image-to-video (RoPE)"),
    ],
)
def test_native_clip_and_task_of_each_kind(kinds, kind, fps, size, image, words):
    facts = kinds[kind].facts
    assert (facts.native_fps, facts.native_size, facts.image_to_video, facts.kind) == (fps, size, image, words)


def test_facts_do_not_come_from_the_name(kinds, tmp_path):
    folder = shutil.copytree(kinds["2b"].folder, tmp_path / "CogVideoX1.5-5B-I2V")
    assert open_folder(folder).facts == kinds["2b"].facts


def test_keys_that_the_first_checkpoints_do_not_have_may_be_missing(checkpoint):
    before = checkpoint.facts
    edit(checkpoint, "vae", invert_scale_latents=None)
    absent = dict.fromkeys(["patch_size_t", "ofs_embed_dim", "use_learned_positional_embeddings"])
    assert edit(checkpoint, "transformer", **absent).facts == before


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("vae", {"temporal_compression_ratio": 8}, "compresses 8 x in space and 8 x in time; must be 8 x and 4 x"),
        ("vae", {"block_out_channels": [8, 8, 8]}, "compresses 4 x in space"),
        ("vae", {"temporal_compression_ratio": None}, "have no 'temporal_compression_ratio'"),
        ("vae", {"scaling_factor": None}, "have no 'scaling_factor'; it must be a CogVideoX checkpoint"),
        ("transformer", {"use_rotary_positional_embeddings": None}, "have no 'use_rotary"),
        ("transformer", {"patch_size": 1}, "patch_size = 1; must be 2"),
    ],
)
def test_another_kind_of_model_is_refused(checkpoint, part, changes, said):
    with pytest.raises(ModelError, match=said):
        _ = edit(checkpoint, part, **changes).facts


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "not a JSON object"), ("\xff", "not JSON")])
def test_a_damaged_config_is_named(checkpoint, text, said):
    (checkpoint.folder / "vae" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=rf"vae/config\.json: {said}"):
        _ = checkpoint.facts


@pytest.mark.parametrize(
    ("key", "value", "changes_encoding"),
    [
        ("scaling_factor", 0.5, False),
        ("invert_scale_latents", True, False),
        ("sample_height", 96, False),
        ("force_upcast", False, False),
        ("_diffusers_version", "9", False),
        ("latent_channels", 8, True),
        ("act_fn", "relu", True),
        ("norm_eps", 1e-3, True),
        ("norm_num_groups", 2, True),
        ("layers_per_block", 3, True),
        ("block_out_channels", [8, 8, 8, 16], True),
        ("pad_mode", "constant", True),
        ("use_quant_conv", True, True),
        ("a_key_of_tomorrow", 1, True),
    ],
)
def test_the_encoding_config_is_what_changes_moments(checkpoint, key, value, changes_encoding):
    before = checkpoint.encoding_config()
    after = edit(checkpoint, "vae", **{key: value}).encoding_config()
    assert (after != before) == changes_encoding
    assert after.get(key) == (value if changes_encoding else None)


# Weight files.


def write_weights(folder: Path, name: str, *dtypes: torch.dtype) -> Path:
    """A safetensors file with one tensor for each dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(number): torch.zeros(2, dtype=dtype) for number, dtype in enumerate(dtypes)}, folder / name,
              metadata={"format": "pt"})  # fmt: skip
    return folder / name


@pytest.fixture
def vae(tmp_path) -> Path:
    """The folder of a VAE without weights yet."""
    folder = tmp_path / "vae"
    folder.mkdir()
    return folder


def at(vae: Path, variant: str | None = None) -> Checkpoint:
    return Checkpoint("name", None, variant, vae.parent)


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ([torch.float16], "float16"),
        ([torch.bfloat16], "bfloat16"),
        ([torch.float32], "float32"),
        ([torch.float32, torch.bfloat16, torch.bfloat16], "bfloat16"),
    ],
)
def test_the_stored_dtype_is_that_of_most_weights(vae, dtypes, stored):
    write_weights(vae, "diffusion_pytorch_model.safetensors", *dtypes)
    assert at(vae).stored_dtype("vae") == stored


def test_weights_of_another_type_are_refused(vae):
    write_weights(vae, "diffusion_pytorch_model.safetensors", torch.int8)
    with pytest.raises(ModelError, match="stored as I8"):
        at(vae).stored_dtype("vae")


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", b"\x00" * 64, b"\xff" * 64, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]"],
)
def test_what_is_no_safetensors_file_is_named(vae, data):
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors: not a safetensors file"):
        at(vae).stored_dtype("vae")


def test_a_single_file_is_the_weights(vae):
    path = write_weights(vae, "diffusion_pytorch_model.safetensors", torch.float32)
    assert at(vae).weight_files("vae") == [path]


def write_sharded(vae: Path, index: str, names: list[str]) -> list[Path]:
    (vae / index).write_text(json.dumps({"weight_map": {f"w{name}": name for name in [*names[::-1], names[0]]}}))
    return [write_weights(vae, name, torch.float32) for name in names]


def test_an_index_names_the_weights(vae):
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    paths = write_sharded(vae, "diffusion_pytorch_model.safetensors.index.json", names)
    write_weights(vae, "unrelated.safetensors", torch.float32)
    assert at(vae).weight_files("vae") == paths
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"00002-of-00002\.safetensors: is missing"):
        at(vae).weight_files("vae")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "x"}}'])
def test_a_damaged_index_is_named(vae, text):
    (vae / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json: not an index"):
        at(vae).weight_files("vae")


def test_a_variant_has_files_of_its_own(vae):
    """Named as diffusers names them: the variant before the suffix, and at the end of the index's stem."""
    plain = write_weights(vae, "diffusion_pytorch_model.safetensors", torch.float32)
    half = write_weights(vae, "diffusion_pytorch_model.fp16.safetensors", torch.float16)
    sharded = write_sharded(
        vae, "diffusion_pytorch_model.safetensors.index.bf16.json",
        [f"diffusion_pytorch_model.bf16-0000{number}-of-00002.safetensors" for number in (1, 2)],
    )  # fmt: skip
    assert at(vae).weight_files("vae") == [plain]
    assert at(vae, "fp16").weight_files("vae") == [half]
    assert at(vae, "fp16").stored_dtype("vae") == "float16"
    assert at(vae, "bf16").weight_files("vae") == sharded
    with pytest.raises(ModelError, match=r"has no diffusion_pytorch_model\.int8\.safetensors"):
        at(vae, "int8").weight_files("vae")


def test_the_variant_names_are_those_that_diffusers_writes(tiny_2b, tmp_path):
    transformer = load_transformer(open_folder(tiny_2b), torch.float32)
    transformer.save_pretrained(tmp_path / "transformer", variant="fp16", max_shard_size="100KB")
    files = Checkpoint("name", None, "fp16", tmp_path).weight_files("transformer")
    assert len(files) > 1
    assert {path.name for path in files} == {path.name for path in (tmp_path / "transformer").glob("*.safetensors")}


def test_pickled_weights_are_none(vae):
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="convert or download the weights as safetensors"):
        at(vae).weight_files("vae")


def test_digests_are_those_of_the_bytes(tiny_2b):
    checkpoint = open_folder(tiny_2b)
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        data = (tiny_2b / part / f"{stem}.safetensors").read_bytes()
        assert checkpoint.weights_digest(part) == [hashlib.sha256(data).hexdigest()]
    files = sorted((tiny_2b / "tokenizer").iterdir())
    assert checkpoint.tokenizer_digest() == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_checkpoint_without_a_tokenizer_is_named(checkpoint):
    shutil.rmtree(checkpoint.folder / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer: is missing"):
        checkpoint.tokenizer_digest()


# Opening and loading.


def test_a_folder_is_opened_where_it_is(tiny_2b, monkeypatch):
    monkeypatch.chdir(tiny_2b.parent)
    opened = open_folder(Path(tiny_2b.name))
    assert (opened.name, opened.revision, opened.folder) == (str(tiny_2b), None, tiny_2b)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "CogVideoX-2b", "a/b/c", ""])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        open_checkpoint(name, revision=None, variant=None, cache_dir=None, weights=())


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["THUDM/CogVideoX-2b", "no such/id"])
def test_a_hub_that_cannot_be_asked_is_said(tmp_path, monkeypatch, name):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"{name}: no such folder, and the hub did not give it"):
        open_checkpoint(name, revision=None, variant=None, cache_dir=str(tmp_path), weights=("vae",))


def test_a_hub_id_that_was_fetched_before_is_opened_offline(tiny_2b, tmp_path, monkeypatch):
    """The folder below is what the hub's cache looks like; the revision is the commit, not the branch."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "c0ffee" * 6 + "c0ff"
    home = tmp_path / "models--org--tiny"
    shutil.copytree(tiny_2b, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    opened = open_checkpoint("org/tiny", revision=None, variant=None, cache_dir=str(tmp_path), weights=("vae",))
    assert (opened.name, opened.revision) == ("org/tiny", commit)
    assert opened.facts == open_folder(tiny_2b).facts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_loaded_frozen_in_the_dtype_asked_for(tiny_2b, dtype):
    checkpoint = open_folder(tiny_2b)
    tokenizer, encoder = load_text_encoder(checkpoint, dtype)
    for model in (load_vae(checkpoint, dtype), load_transformer(checkpoint, dtype), encoder):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("a person walks").input_ids[-1] == tokenizer.eos_token_id


def test_the_dtype_to_encode_in():
    assert choose_dtype("float16", "bfloat16") == "float16"
    assert [choose_dtype("auto", stored) for stored in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "float16")])
def test_float16_is_run_in_float32_on_a_cpu_only(monkeypatch, device, dtype):
    monkeypatch.setattr("shared.models.choose_device", lambda: device)
    assert choose_dtype("auto", "float16") == dtype
