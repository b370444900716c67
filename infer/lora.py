"""A LoRA as stage 3 meets it: a file, ours or another's, and whether it fits the transformer. Reads headers only."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.digests import file_digest
from shared.errors import LoraError
from shared.lora import PREFIX, LoraFacts, find_lora, read_metadata
from shared.models import Checkpoint

MATRIX = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Lora:
    """A LoRA file and what it says of itself.

    Attributes:
        adapter: PEFT's configuration (rank, alpha, targets); None: the file has none, so that its alpha is lost.
        facts: what it was trained on; None: it is not from LatentReel.
    """

    path: Path
    adapter: dict[str, Any] | None
    facts: LoraFacts | None

    @classmethod
    def read(cls, path: str) -> Lora:
        """The LoRA that `path` (a run, a checkpoint, a file) names.

        Raises:
            LoraError: there is none.
        """
        file = find_lora(path)
        return cls(file, *read_metadata(file))

    def describe(self) -> dict[str, Any]:
        """What a recipe says of it."""
        return {
            "path": str(self.path.resolve()),
            "sha256": file_digest(self.path),
            "adapter": self.adapter,
            "latentreel": asdict(self.facts) if self.facts else None,
        }

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Compare each matrix with the module that it is for.

        Raises:
            LoraError: names the first matrix that the checkpoint's transformer has no place for.
        """
        modules: dict[str, list[int]] = {}
        for file in checkpoint.weight_files("transformer"):
            modules |= {name.removesuffix(".weight"): shape for name, shape in _shapes(file).items()}
        for name, shape in _shapes(self.path).items():
            match = MATRIX.fullmatch(name)
            if match is None:
                raise LoraError(f"{self.path}: {name} is not named as a LoRA of CogVideoX's transformer in diffusers")
            module, axis = match["module"], 0 if match["side"] == "B" else 1
            if module not in modules:
                raise LoraError(f"{self.path}: {name} is for a module that {checkpoint.name} does not have")
            if shape[axis] != modules[module][axis]:
                raise LoraError(
                    f"{self.path}: {name} is {shape}, and {checkpoint.name} has {modules[module]} there; "
                    f"it was trained on a checkpoint of another size"
                )


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_slice(name).get_shape() for name in list(file.keys())}
