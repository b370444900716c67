"""A LoRA: adding it to a transformer, and a file that describes itself.

`pytorch_lora_weights.safetensors` holds the matrices under diffusers' names and, in its metadata,
`lora_adapter_metadata` (PEFT's configuration, as diffusers writes it: alpha is in the file, so the LoRA is loaded at
weight 1.0 with the strength it was trained at) and `latentreel` (what it was trained on, for stage 3).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import LoraError
from shared.storage import canonical_json, fsync_folder

if TYPE_CHECKING:
    import torch

FILE_NAME = "pytorch_lora_weights.safetensors"
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER = "default"  # the adapter's name inside the trainer's transformer; files do not hold it
PREFIX = "transformer."


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA was trained on: enough to run it with nothing else said."""

    base_model: str
    revision: str | None
    variant: str | None
    kind: str
    rank: int
    alpha: float
    target_modules: list[str]
    dataset: str
    dataset_digest: str
    id_token: str | None
    seed: int
    step: int
    dtype: str  # of the frozen base while training
    text_dtype: str  # that T5 ran in
    cache_dtype: str  # that prompt embeddings were rounded to
    frames: int  # of the most common bucket
    height: int
    width: int
    fps: float


def add_lora(transformer: Any, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int) -> None:
    """Inject a LoRA in float32 into a frozen transformer; its A matrices are drawn from `seed`, B are zero.

    Raises:
        LoraError: no module of that name.
    """
    import torch
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights=True, target_modules=list(target_modules), lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            transformer.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise LoraError(f"--target_modules {','.join(target_modules)}: {error}") from error
    for parameter in trainable(transformer):
        parameter.data = parameter.data.float()


def trainable(transformer: Any) -> list[torch.nn.Parameter]:
    """The LoRA's parameters, in a fixed order."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def lora_state(transformer: Any) -> dict[str, torch.Tensor]:
    """Copies of the LoRA's matrices under the names that diffusers gives them in a file, on the CPU, in float32."""
    import torch
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {
        f"{PREFIX}{name}": value.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, value in state.items()
    }


def save_lora(transformer: Any, folder: Path, facts: LoraFacts) -> Path:
    """Write `FILE_NAME` into `folder`, complete or not at all.

    Raises:
        LoraError: a matrix is empty or not finite: nothing is written.
    """
    import torch
    from safetensors.torch import save

    state = lora_state(transformer)
    for name, value in state.items():
        if not value.numel() or not torch.isfinite(value).all():
            raise LoraError(f"{name}: shape {tuple(value.shape)}, must be finite and not empty; nothing was written")
    adapter = transformer.peft_config[ADAPTER].to_dict()
    packed = {f"{PREFIX}{key}": sorted(value) if isinstance(value, set) else value for key, value in adapter.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True),
        "latentreel": canonical_json(asdict(facts)).decode(),
    }
    path = folder / FILE_NAME
    temporary = folder / f".{FILE_NAME}.tmp"
    with temporary.open("wb") as file:
        file.write(_with_sorted_header(save(state, metadata)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(folder)
    return path


def _with_sorted_header(data: bytes) -> bytes:
    """The bytes of a safetensors file with its header in a fixed order: the library writes metadata in a random one."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def load_lora_state(transformer: Any, path: Path) -> None:
    """Put a file's matrices into the LoRA that `add_lora` injected, in float32.

    Raises:
        LoraError: the file's matrices are not exactly this LoRA's.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(path)
    own = lora_state(transformer)
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != found:
        differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise LoraError(f"{path}: {len(differing)} matrices differ from this run's LoRA, the first {differing[0]}")
    with torch.no_grad():
        set_peft_model_state_dict(
            transformer, {name.removeprefix(PREFIX): value for name, value in state.items()}, adapter_name=ADAPTER
        )


def find_lora(path: str) -> Path:
    """The LoRA file that `path` names: a file, or a folder (a run, a checkpoint) that holds `FILE_NAME`.

    Raises:
        LoraError: neither.
    """
    given = Path(path).expanduser()
    file = given / FILE_NAME if given.is_dir() else given
    if not file.is_file():
        raise LoraError(f"--lora {path}: no such file, and no folder with {FILE_NAME}")
    return file


def read_metadata(path: Path) -> tuple[dict[str, Any] | None, LoraFacts | None]:
    """PEFT's configuration and what LatentReel wrote, as a LoRA file's metadata hold them; None for what is not there.

    Raises:
        LoraError: not a safetensors file with LoRA matrices.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path}: not a safetensors file ({error})") from error
    if not any("lora" in name for name in names):
        raise LoraError(f"{path}: holds {len(names)} tensors, none of a LoRA")
    try:
        adapter, told = (json.loads(metadata.get(name, "null")) for name in ("lora_adapter_metadata", "latentreel"))
        known = {field.name for field in fields(LoraFacts)}
        facts = None if told is None else {name: value for name, value in told.items() if name in known}
        return adapter, None if facts is None else LoraFacts(**facts)
    except (ValueError, TypeError, AttributeError) as error:
        raise LoraError(f"{path}: its metadata are not what this version writes ({error})") from error
