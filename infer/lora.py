"""A LoRA as stage 3 meets it: a file, ours or another's, and whether it fits. Reads headers only.

    --lora PATH[:WEIGHT]                            a run's folder, a checkpoint's, or a file
    --lora OWNER/NAME[/FILE][@REVISION][:WEIGHT]    a repository of the hub

Letters: A [R, I] and B [O, R] of rank R; what is added to a layer's weights [O, I] is alpha / R * B @ A.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.digests import file_digest
from shared.errors import ConfigError, LoraError
from shared.lora import FILE_NAME, PREFIX, LoraFacts, find_lora, read_metadata
from shared.lora_names import COMFYUI_PREFIX, diffusers_name
from shared.models import Checkpoint

if TYPE_CHECKING:
    import torch

MATRIX = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|magnitude_vector)")
COMFYUI = re.compile(
    re.escape(COMFYUI_PREFIX) + r"(?P<module>.+)\.(?:lora_(?P<side>down|up|A|B)\.weight|(?P<alpha>alpha))"
)
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/(?![\w.-]+\.safetensors$)[\w.-]+)(?:/(?P<file>[\w./-]+\.safetensors))?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Lora:
    """A LoRA file and what it says of itself.

    Attributes:
        adapter: PEFT's configuration (rank, alpha, targets); None: the file has none.
        facts: what it was trained on; None: it is not from LatentReel.
        weight: that it is mixed in with, beside `--lora_scale`.
        hub: where it is on the hub, as `--lora` takes it, with the commit; None: a local file.
    """

    path: Path
    adapter: dict[str, Any] | None
    facts: LoraFacts | None
    weight: float = 1.0
    hub: str | None = None

    @classmethod
    def read(cls, told: str, cache_dir: str | None = None) -> Lora:
        """The LoRA that `--lora` names, with its weight.

        Args:
            cache_dir: of the hub's files.

        Raises:
            ConfigError: the weight is not finite.
            LoraError: there is no such LoRA.
        """
        source, weight = split_weight(told)
        match = HUB_ID.fullmatch(source)
        if match and not match["revision"] and Path(match["name"]).parent.is_dir():
            match = None  # a folder `runs` is here, so runs/mistyped is no repository
        if match and not source.startswith((".", "~")) and not Path(source).expanduser().exists():
            path, hub = _fetch(source, match, cache_dir)
            return cls(path, *read_metadata(path), weight, hub)
        path = find_lora(source)
        return cls(path, *read_metadata(path), weight)

    @property
    def is_comfyui(self) -> bool:
        """Whether its matrices are under ComfyUI's names."""
        return any(name.startswith(COMFYUI_PREFIX) for name in _shapes(self.path))

    @property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        pattern, ranks = COMFYUI if self.is_comfyui else MATRIX, [0]
        for name, shape in _shapes(self.path).items():
            match = pattern.fullmatch(name)
            if match and match["side"] in ("A", "down"):
                ranks.append(shape[0])
        return max(ranks)

    @property
    def says_alpha(self) -> bool:
        """Whether the file holds its alpha; one that does not is taken to have its rank."""
        return self.adapter is not None or any(name.endswith(".alpha") for name in _shapes(self.path))

    def describe(self) -> dict[str, Any]:
        """What a recipe says of it."""
        return {
            "path": str(self.path.absolute()),
            "hub": self.hub,
            "sha256": file_digest(self.path),
            "weight": self.weight,
            "adapter": self.adapter,
            "latentreel": asdict(self.facts) if self.facts else None,
        }

    def weights(self) -> str | dict[str, torch.Tensor]:
        """What diffusers loads: the file, or matrices under its names with ComfyUI's alpha / R in B."""
        if not self.is_comfyui:
            return str(self.path)
        from safetensors.torch import load_file

        state, converted = load_file(self.path), {}
        for name, value in state.items():
            match = COMFYUI.fullmatch(name)
            if match is None or match["alpha"]:
                continue
            side = {"down": "A", "up": "B"}.get(match["side"], match["side"])
            if side == "B":
                alpha = state.get(f"{COMFYUI_PREFIX}{match['module']}.alpha")
                value = value if alpha is None else (value.float() * (alpha.item() / value.shape[1])).to(value.dtype)
            converted[f"{PREFIX}{diffusers_name(match['module'])}.lora_{side}.weight"] = value
        return converted

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Compare each matrix with the module that it is for.

        Raises:
            LoraError: names the first matrix that the checkpoint's transformer has no place for.
        """
        modules: dict[str, list[int]] = {}
        for file in checkpoint.weight_files("transformer"):
            modules |= {name.removesuffix(".weight"): shape for name, shape in _shapes(file).items()}
        pattern = COMFYUI if self.is_comfyui else MATRIX
        for name, shape in _shapes(self.path).items():
            match = pattern.fullmatch(name)
            if match is None:
                raise LoraError(f"{self.path}: {name} is not named as a LoRA of CogVideoX's transformer in diffusers")
            module = diffusers_name(match["module"]) if self.is_comfyui else match["module"]
            if module not in modules:
                raise LoraError(f"{self.path}: {name} is for a module that {checkpoint.name} does not have")
            if name.endswith(".alpha"):
                continue
            axis = 1 if match["side"] in ("A", "down") else 0  # B and DoRA's magnitudes: outputs
            if shape[axis] != modules[module][axis]:
                raise LoraError(
                    f"{self.path}: {name} is {shape}, and {checkpoint.name} has {modules[module]} there; "
                    f"it was trained on a checkpoint of another size"
                )


def split_weight(told: str) -> tuple[str, float]:
    """`a:0.8` is LoRA a at weight 0.8; a path that is there with its colon is that path.

    Raises:
        ConfigError: the weight is not finite.
    """
    source, colon, number = told.rpartition(":")
    if not colon or Path(told).expanduser().exists():
        return told, 1.0
    try:
        weight = float(number)
    except ValueError:
        return told, 1.0
    if not source or not math.isfinite(weight):
        raise ConfigError(f"--lora {told}: must be a LoRA and a finite weight, such as runs/my-run:0.8")
    return source, weight


def check_together(loras: list[Lora], *, base_is_given: bool) -> None:
    """Refuse LoRAs that were trained for different models.

    Args:
        base_is_given: the checkpoint is named by a flag, so that LoRAs of different ones of its kind may meet.

    Raises:
        LoraError: names the two, and in what they differ.
    """
    for number, lora in enumerate(loras):
        if any(lora.path.resolve() == other.path.resolve() for other in loras[:number]):
            raise LoraError(f"--lora {lora.path}: is given twice; give it once, with its weight, such as PATH:1.5")
    named = [(lora.path, lora.facts) for lora in loras if lora.facts]
    for path, facts in named[1:]:
        first, wanted = named[0]
        for name in ("kind", "base_model", "image_factor", "drop_learned_positions"):
            if name == "base_model" and base_is_given:
                continue
            if (found := getattr(facts, name)) != getattr(wanted, name):
                hint = "; give --pretrained_model_name_or_path to mix them" if name == "base_model" else ""
                raise LoraError(
                    f"--lora {path}: its {name} is {found}, that of {first} is {getattr(wanted, name)}; they cannot "
                    f"be mixed{hint}"
                )


def _fetch(source: str, match: re.Match[str], cache_dir: str | None) -> tuple[Path, str]:
    """A LoRA file of the hub, and its name with the commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    file = match["file"] or FILE_NAME
    try:
        path = Path(hf_hub_download(match["name"], file, revision=match["revision"], cache_dir=cache_dir))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise LoraError(
            f"--lora {source}: no such file or folder, and the hub did not give {file} of {match['name']}: {error}"
        ) from error
    commit = path.parents[file.count("/")].name  # .../snapshots/<commit>/<file>
    return path, f"{match['name']}/{file}@{commit}"


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_slice(name).get_shape() for name in list(file.keys())}
