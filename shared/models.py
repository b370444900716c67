"""CogVideoX checkpoints: where their files are, what their configs say, and loading one part at a time.

Every fact comes from a config file, never from a name. Only safetensors are loaded, never pickles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.digests import file_digest
from shared.errors import ModelError
from shared.geometry import SIDE_MULTIPLE, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from shared.hub import fetch_files

if TYPE_CHECKING:
    import torch

# Where each part's config and weights are; what each stage needs of a checkpoint is a choice of these.
CONFIG_FILES = {"transformer": "config.json", "vae": "config.json", "text_encoder": "config.json",
                "scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}  # fmt: skip
WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# Of the VAE's config, what does not change what it encodes.
NOT_ENCODING = {
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents", "force_upcast",
    "sample_height", "sample_width",  # the default tile's size: recorded with the tiling itself
}  # fmt: skip
STORED_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class Facts:
    """What a checkpoint's configs say, as far as the stages care. Sizes are in latents unless they say otherwise."""

    in_channels: int  # of the transformer: latents, and the image condition where there is one
    out_channels: int
    latent_channels: int
    patch_size: int
    patch_size_t: int | None
    attention_head_dim: int
    ofs_embed_dim: int | None
    rotary: bool
    learned_positions: bool
    sample_height: int
    sample_width: int
    sample_frames: int  # pixels
    max_text_seq_length: int
    text_embed_dim: int
    scaling_factor: float
    invert_scale_latents: bool

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer takes an image condition beside the latents."""
        return self.in_channels == 2 * self.latent_channels

    def image_factor(self, choice: str) -> float:
        """What encodings of first frames are multiplied by.

        Args:
            choice: `pipeline`, as diffusers' pipeline does: by the scaling factor, or by its inverse where the VAE's
                config sets `invert_scale_latents`; `scale`: by the scaling factor; `one`: they are left as they are.
        """
        if choice == "one":
            return 1.0
        return 1 / self.scaling_factor if choice == "pipeline" and self.invert_scale_latents else self.scaling_factor

    @property
    def native_fps(self) -> int:
        """Frames per second that the checkpoint was trained at: 8 for CogVideoX 1.0, 16 for 1.5."""
        return 8 if self.patch_size_t is None else 16

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels. 1.5 configs hold a table's size instead; its authors' size is taken."""
        if self.patch_size_t is not None:
            return 768, 1360
        return self.sample_height * SPATIAL_COMPRESSION, self.sample_width * SPATIAL_COMPRESSION

    @property
    def kind(self) -> str:
        """The kind of checkpoint in words, for messages."""
        generation = "1.0" if self.patch_size_t is None else "1.5"
        positions = "RoPE" if self.rotary else "sin-cos positions"
        task = "image-to-video" if self.image_to_video else "text-to-video"
        return f"CogVideoX {generation} {task} ({positions})"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are on this machine.

    Attributes:
        name: a hub id, or the absolute path of a folder.
        revision: the hub's commit, or None for a folder.
        folder: where the files are.
    """

    name: str
    revision: str | None
    variant: str | None
    folder: Path

    def config(self, part: str) -> dict[str, Any]:
        """A part's config file.

        Raises:
            ModelError: it is missing or not JSON.
        """
        path = self.folder / part / CONFIG_FILES[part]
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(f"{path}: is missing; {self.name} must be a whole CogVideoX checkpoint") from error
        except ValueError as error:
            raise ModelError(f"{path}: not JSON ({error}); download the checkpoint again") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path}: not a JSON object; download the checkpoint again")
        return config

    @cached_property
    def facts(self) -> Facts:
        """What the transformer's and the VAE's config say.

        Raises:
            ModelError: they are not CogVideoX's.
        """
        transformer, vae = self.config("transformer"), self.config("vae")
        try:
            facts = Facts(
                in_channels=transformer["in_channels"],
                out_channels=transformer["out_channels"],
                latent_channels=vae["latent_channels"],
                patch_size=transformer["patch_size"],
                patch_size_t=transformer.get("patch_size_t"),
                attention_head_dim=transformer["attention_head_dim"],
                ofs_embed_dim=transformer.get("ofs_embed_dim"),
                rotary=transformer["use_rotary_positional_embeddings"],
                learned_positions=transformer.get("use_learned_positional_embeddings", False),
                sample_height=transformer["sample_height"],
                sample_width=transformer["sample_width"],
                sample_frames=transformer["sample_frames"],
                max_text_seq_length=transformer["max_text_seq_length"],
                text_embed_dim=transformer["text_embed_dim"],
                scaling_factor=vae["scaling_factor"],
                invert_scale_latents=vae.get("invert_scale_latents", False),
            )
            spatial, temporal = 2 ** (len(vae["block_out_channels"]) - 1), vae["temporal_compression_ratio"]
        except KeyError as error:
            raise ModelError(f"{self.name}: its configs have no {error}; it must be a CogVideoX checkpoint") from error
        if (spatial, temporal) != (SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION):
            raise ModelError(
                f"{self.name}: its VAE compresses {spatial} x in space and {temporal} x in time; "
                f"must be {SPATIAL_COMPRESSION} x and {TEMPORAL_COMPRESSION} x, as every CogVideoX's"
            )
        if facts.patch_size * SPATIAL_COMPRESSION != SIDE_MULTIPLE:
            raise ModelError(f"{self.name}: patch_size = {facts.patch_size}; must be 2, as every CogVideoX's")
        return facts

    def weight_files(self, part: str) -> list[Path]:
        """The safetensors files of a part, sorted; those of the variant when one was asked for.

        Raises:
            ModelError: there are none.
        """
        stem, variant = WEIGHTS[part], f".{self.variant}" if self.variant else ""
        folder = self.folder / part
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.exists():
            return [whole]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if not index.exists():
            raise ModelError(f"{folder}: has no {whole.name}; convert or download the weights as safetensors")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not an index of weight files; download the checkpoint again") from error
        for name in names:
            if not (folder / name).exists():
                raise ModelError(f"{folder / name}: is missing; download the checkpoint again")
        return [folder / name for name in names]

    def stored_dtype(self, part: str) -> str:
        """The dtype that most of a part's weights are stored in: `float32`, `bfloat16` or `float16`."""
        counts: dict[str, int] = {}
        for tensor in _safetensors_header(self.weight_files(part)[0]).values():
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + 1
        most = max(counts, key=lambda dtype: counts[dtype])
        if most not in STORED_DTYPES:
            raise ModelError(f"{self.folder / part}: weights stored as {most}; must be one of {list(STORED_DTYPES)}")
        return STORED_DTYPES[most]

    def weights_digest(self, part: str, *, rehash: bool = False) -> list[str]:
        """The sha256 of each weight file of a part."""
        return [file_digest(path, rehash=rehash) for path in self.weight_files(part)]

    def encoding_config(self) -> dict[str, Any]:
        """The VAE's config as far as it changes what is encoded."""
        config = self.config("vae")
        return {key: value for key, value in config.items() if key not in NOT_ENCODING and not key.startswith("_")}

    def tokenizer_digest(self, *, rehash: bool = False) -> list[str]:
        """The sha256 of each file of the tokenizer, in the order of their names."""
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            raise ModelError(f"{folder}: is missing; {self.name} must be a whole CogVideoX checkpoint")
        return [file_digest(path, rehash=rehash) for path in sorted(folder.iterdir()) if path.is_file()]


def open_checkpoint(
    name: str, *, revision: str | None, variant: str | None, cache_dir: str | None, weights: tuple[str, ...]
) -> Checkpoint:
    """A checkpoint, fetched from the hub when `name` is not a folder.

    Args:
        weights: parts whose weights are needed; of all others only the configs are fetched.

    Raises:
        ModelError: neither a checkpoint's folder nor a hub id that can be fetched.
    """
    wanted = ["model_index.json", *(f"{part}/{file}" for part, file in CONFIG_FILES.items())]
    wanted += [f"{part}/*{suffix}" for part in weights for suffix in (".safetensors", ".index*.json")]
    wanted += ["tokenizer/*"]
    name, commit, folder = fetch_files(
        name, revision=revision, cache_dir=cache_dir, patterns=wanted, example="THUDM/CogVideoX-2b"
    )
    if commit is None and not (folder / "model_index.json").exists():
        raise ModelError(f"{folder}: has no model_index.json; give the folder of a whole diffusers checkpoint")
    return Checkpoint(name, commit, variant, folder)


def _safetensors_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors: their names, dtypes, shapes and places."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size)) if size <= min(path.stat().st_size, 100_000_000) else None
        except ValueError:
            header = None
    if not isinstance(header, dict) or not header.keys() - {"__metadata__"}:
        raise ModelError(f"{path}: not a safetensors file, or an empty one; download it again")
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def lacking_bytes(path: Path) -> int:
    """Bytes that a safetensors file is too short by, as its own header tells: of a download that broke off.

    Raises:
        ModelError: it has no whole header.
    """
    end = max(int(tensor["data_offsets"][1]) for tensor in _safetensors_header(path).values())
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return 8 + header_bytes + end - path.stat().st_size


def choose_device() -> str:
    """`cuda` where there is one, else `cpu`. Without a GPU's device file torch need not be asked."""
    if not any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(asked: str, stored: str) -> str:
    """The dtype to encode in: what was asked for; `auto` is the stored one, and float32 for float16 on a CPU.

    A CPU multiplies float16 matrices hundreds of times slower than float32.
    """
    if asked != "auto":
        return asked
    return "float32" if stored == "float16" and choose_device() == "cpu" else stored


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The VAE (`AutoencoderKLCogVideoX`), frozen, on the CPU."""
    from diffusers import AutoencoderKLCogVideoX

    checkpoint.weight_files("vae")
    vae = AutoencoderKLCogVideoX.from_pretrained(
        checkpoint.folder, subfolder="vae", torch_dtype=dtype, variant=checkpoint.variant, use_safetensors=True
    )
    return vae.requires_grad_(False).eval()


def load_text_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, Any]:
    """T5's tokenizer and encoder (`T5EncoderModel`), frozen, on the CPU."""
    from transformers import T5EncoderModel, T5Tokenizer
    from transformers.utils import logging

    checkpoint.weight_files("text_encoder")
    logging.disable_progress_bar()
    tokenizer = T5Tokenizer.from_pretrained(checkpoint.folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(
        checkpoint.folder / "text_encoder", dtype=dtype, variant=checkpoint.variant, use_safetensors=True
    )
    return tokenizer, encoder.requires_grad_(False).eval()


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype, *, drop_learned_positions: bool = False) -> Any:
    """The transformer (`CogVideoXTransformer3DModel`), frozen, on the CPU.

    Args:
        drop_learned_positions: leave out the table of learned positions (5B-I2V), whose RoPE stays; the config says so.
    """
    from diffusers import CogVideoXTransformer3DModel

    checkpoint.weight_files("transformer")
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        checkpoint.folder, subfolder="transformer", torch_dtype=dtype, variant=checkpoint.variant, use_safetensors=True
    )
    if drop_learned_positions:
        transformer.patch_embed.use_learned_positional_embeddings = False
        transformer.patch_embed._buffers.pop("pos_embedding", None)
        transformer.register_to_config(use_learned_positional_embeddings=False)
    return transformer.requires_grad_(False)
