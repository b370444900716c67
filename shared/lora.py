"""A LoRA: adding it to a transformer, and a file that describes itself.

`pytorch_lora_weights.safetensors` holds the matrices under diffusers' names and, in its metadata,
`lora_adapter_metadata` (PEFT's configuration, as diffusers writes it: alpha is in the file, so the LoRA is loaded at
weight 1.0 with the strength it was trained at) and `latentreel` (what it was trained on, for stage 3).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
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
    dropout: float = 0.0  # of the LoRA's inputs while training; PEFT's configuration would drop them ever after
    clips: int | None = None  # of the data set; None: written by a version that did not say
    image_factor: str | None = None  # of first frames, a choice of `Facts.image_factor`; None: text-to-video
    drop_learned_positions: bool = False


def add_lora(
    transformer: Any,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    seed: int,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> None:
    """Inject a LoRA in float32 into a frozen transformer; its A matrices are drawn from `seed`, B are zero.

    Args:
        target_modules: linear layers, by the ends of their names.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        use_dora: with a magnitude for each output, at first that of the frozen weights, so that nothing changes.

    Raises:
        LoraError: no linear layer of that name.
    """
    import torch
    from peft import LoraConfig

    _check_targets(transformer, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights=True,
        target_modules=list(target_modules),
        lora_dropout=0.0,  # train/dropout.py draws by place; and diffusers would drop inputs when it loads the file
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for parameter in trainable(transformer):
        parameter.data = parameter.data.float()
    for _, layer in lora_layers(transformer):
        if use_dora:  # again, as PEFT rounded the magnitudes to the dtype of the frozen weights
            magnitude = layer.lora_magnitude_vector[ADAPTER].weight
            magnitude.data = torch.linalg.norm(layer.get_base_layer().weight.to(magnitude.dtype), dim=1)


def _check_targets(transformer: Any, target_modules: Sequence[str]) -> None:
    """PEFT passes over a name that matches nothing as long as another one matches."""
    import torch

    kinds = {name: isinstance(module, torch.nn.Linear) for name, module in transformer.named_modules()}
    there = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", name) for name, is_linear in kinds.items() if is_linear})
    for target in target_modules:
        matched = [is_linear for name, is_linear in kinds.items() if f".{name}".endswith(f".{target}")]
        if matched and all(matched):
            continue
        endings = sorted({name.split(".", count)[-1] for name in there for count in range(name.count(".") + 1)})
        near = difflib.get_close_matches(target, endings)
        raise LoraError(
            f"--target_modules {target}: {'is not a linear layer' if matched else 'no layer has a name that ends so'}"
            f"{'; did you mean ' + ' or '.join(near) + '?' if near else ''}; there are {', '.join(there)}"
        )


def lora_layers(transformer: Any) -> Iterator[tuple[str, Any]]:
    """PEFT's layers (name, module) that `add_lora` put in the place of the target modules, in a fixed order."""
    for name, module in transformer.named_modules():
        if ADAPTER in getattr(module, "lora_A", ()):
            yield name, module


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


def adapter_metadata(transformer: Any) -> dict[str, Any]:
    """PEFT's configuration of the LoRA as a file holds it, under diffusers' names."""
    adapter = transformer.peft_config[ADAPTER].to_dict()
    packed = {f"{PREFIX}{key}": sorted(value) if isinstance(value, set) else value for key, value in adapter.items()}
    return dict(json.loads(json.dumps(packed)))


def describe_lora(adapter: dict[str, Any], facts: LoraFacts) -> dict[str, str]:
    """The metadata of a LoRA file.

    Args:
        adapter: as `adapter_metadata` has it.
    """
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True),
        "latentreel": canonical_json(asdict(facts)).decode(),
    }


def save_lora(transformer: Any, folder: Path, facts: LoraFacts, name: str = FILE_NAME) -> Path:
    """Write a LoRA file into `folder`, complete or not at all.

    Raises:
        LoraError: a matrix is empty or not finite: nothing is written.
    """
    import torch

    state = lora_state(transformer)
    for key, value in state.items():
        if not value.numel() or not torch.isfinite(value).all():
            raise LoraError(f"{key}: shape {tuple(value.shape)}, must be finite and not empty; nothing was written")
    metadata = describe_lora(adapter_metadata(transformer), facts)
    path = folder / name
    temporary = folder / f".{name}.tmp"
    with temporary.open("wb") as file:
        file.write(pack_lora(state, metadata))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(folder)
    return path


def pack_lora(state: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file with its header in a fixed order: the library writes metadata in a random one."""
    from safetensors.torch import save

    data = save(state, metadata)
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
        first = differing[0]
        raise LoraError(
            f"{path}: {len(differing)} matrices differ from this run's LoRA, the first {first}: "
            f"{found.get(first, 'none')} in the file, {shapes.get(first, 'none')} in the run"
        )
    with torch.no_grad():
        set_peft_model_state_dict(
            transformer, {name.removeprefix(PREFIX): value for name, value in state.items()}, adapter_name=ADAPTER
        )


def find_lora(path: str, flag: str = "--lora") -> Path:
    """The LoRA file that `path` names: a file, or a folder (a run, a checkpoint) that holds `FILE_NAME`.

    Raises:
        LoraError: neither.
    """
    given = Path(path).expanduser()
    file = given / FILE_NAME if given.is_dir() else given
    if not file.is_file():
        raise LoraError(
            f"{flag} {path}: no such file, and no folder with {FILE_NAME}; give a run's --output_dir or a file"
        )
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
        raise LoraError(f"{path}: not a safetensors file ({error}); give a LoRA's, whole") from error
    if not any("lora" in name for name in names):
        raise LoraError(f"{path}: holds {len(names)} tensors, none of a LoRA; give a LoRA of CogVideoX")
    try:
        adapter, told = (json.loads(metadata.get(name, "null")) for name in ("lora_adapter_metadata", "latentreel"))
        known = {field.name for field in fields(LoraFacts)}
        facts = None if told is None else {name: value for name, value in told.items() if name in known}
        return adapter, None if facts is None else LoraFacts(**facts)
    except (ValueError, TypeError, AttributeError) as error:
        raise LoraError(f"{path}: its metadata are not what this version writes ({error})") from error
