"""`python -m train.export`: see `--help` and docs/handing_over.md."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from shared.config import parse_config
from shared.console import say, warn
from shared.errors import ConfigError, run_command
from shared.storage import fsync_folder

if TYPE_CHECKING:
    from shared.lora import LoraFacts


@dataclass(frozen=True)
class ExportConfig:
    """Hand a LoRA over: as ComfyUI or PEFT read it, merged into the transformer, or with a card for the hub."""

    run: Positional[str]
    """The LoRA: a run's --output_dir, a checkpoint's folder, or a file."""
    format: Literal["comfyui", "peft", "fused", "card"]
    """ComfyUI's files, PEFT's folder, a merged transformer for diffusers, or README.md with a gallery in the run."""
    output: str | None = None
    """Folder to write, which must not be there yet; default: export/<format> in the run's; of a card: the run's."""
    pretrained_model_name_or_path: str | None = None
    """Of fused: checkpoint to merge into, a folder or a hub id; default: the one that the LoRA was trained on."""
    revision: str | None = None
    """Of fused: branch, tag or commit of the checkpoint on the hub."""
    variant: str | None = None
    """Of fused: variant of the weight files, such as fp16."""
    cache_dir: str | None = None
    """Of fused: where the hub's files are kept; default: the hub's own place."""
    hub_model_id: str | None = None
    """Of a card: the repository that its example loads from; default: a name to be filled in."""
    hub_license: str = "other"
    """Of a card: the licence of the LoRA, such as apache-2.0; other points at the base model's."""

    def __post_init__(self) -> None:
        for name in ("pretrained_model_name_or_path", "revision", "variant", "cache_dir"):
            if getattr(self, name) is not None and self.format != "fused":
                raise ConfigError(f"--{name} {getattr(self, name)}: is for --format fused; leave it out")
        for name, default in (("hub_model_id", None), ("hub_license", "other")):
            if getattr(self, name) != default and self.format != "card":
                raise ConfigError(f"--{name} {getattr(self, name)}: is for --format card; leave it out")
        if self.output is not None and self.format == "card":
            raise ConfigError(f"--output {self.output}: a card stands in its run's folder; leave it out")


def main(argv: list[str]) -> int:
    """Write what was asked for."""
    config = parse_config(ExportConfig, argv, "python -m train.export")
    from train.base import open_base  # late: --help and a typo are answered at once
    from train.card import write_card
    from train.formats import TrainedLora, write_comfyui, write_fused, write_peft

    lora = TrainedLora.read(config.run)
    if config.format == "card":
        path = write_card(lora.path.parent, config.hub_model_id, config.hub_license)
        say("card", f"{path}: says what the LoRA is; edit it as you like, python -m train.push takes it as it is")
        return 0
    default = lora.path.parent / "export" / config.format
    output = Path(config.output).expanduser() if config.output else default
    with _finished_folder(output) as folder:
        if config.format == "comfyui":
            write_comfyui(lora, folder)
        elif config.format == "peft":
            write_peft(lora, folder)
        else:
            facts = lora.facts
            trained_on = {"name": facts.base_model, "revision": facts.revision, "variant": facts.variant}
            write_fused(lora, open_base(config, trained_on), folder)
    say("export", f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}; see docs/handing_over.md")
    for line in unsaid(lora.facts, config.format):
        warn(f"{output}: {line}")
    return 0


def unsaid(facts: LoraFacts, format: str) -> Iterator[str]:
    """What a LoRA was trained with that a format's readers cannot know, a line each."""
    if facts.drop_learned_positions and format != "fused":
        yield "its reader must leave out the learned positions, as the LoRA was trained without them"
    if facts.image_factor not in (None, "pipeline"):
        yield (
            f"its reader must multiply first frames as --image_factor {facts.image_factor} does; diffusers' pipeline "
            "shows them at another brightness"
        )


@contextmanager
def _finished_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which has its name once it is full.

    Raises:
        ConfigError: there is something of that name.
    """
    if output.exists():
        raise ConfigError(f"--output {output}: is there already; remove it, or give another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    making = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        yield making
        for path in making.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(making)
        making.rename(output)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    fsync_folder(output.parent)


if __name__ == "__main__":
    run_command(main)
