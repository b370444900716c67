"""`python -m preprocess.caption`: see `--help` and docs/captions.md."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from preprocess import files
from preprocess.captions import SUFFIXES, beside, notes
from preprocess.data_flags import DataFlags
from preprocess.tables import suffix_of
from shared.config import parse_config
from shared.console import LABEL, say, warn
from shared.errors import ConfigError, run_command

if TYPE_CHECKING:
    from preprocess.captioning import Outcome
    from preprocess.generation import Decoding

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CAPTION = "{caption}"  # in a template: where the caption goes
SHOWN = 100  # rejected clips that are told one by one; OUTPUT.rejected has them all


@dataclass(frozen=True)
class CaptionConfig(DataFlags):
    """Write a manifest with captions by a model, of one where they may be missing. Exit status: 0 done, 2 refused, or
    no clip has a caption."""

    OUTPUT: ClassVar[str] = "Output"
    output: str = ""
    """Manifest to write: a .jsonl, .csv or .tsv file; one that is there is gone on from."""
    overwrite: bool = False
    """Replace captions that are there already, those of the manifest and those of an earlier run."""

    MODELS: ClassVar[str] = "Models"
    caption_model: str | None = None
    """Image-text-to-text model of transformers that captions: a folder or a hub id."""
    caption_revision: str | None = None
    """Branch, tag or commit of --caption_model on the hub."""
    caption_prompt: str | None = None
    """Text file with what the model is asked; default: configs/caption_prompt.txt."""
    rewrite_model: str | None = None
    """Causal language model of transformers that rewrites the captions: a folder or a hub id."""
    rewrite_revision: str | None = None
    """Branch, tag or commit of --rewrite_model on the hub."""
    rewrite_template: str | None = None
    """Text file with what that model is told, {caption} for the caption; default: configs/caption_template.txt."""

    SEEN: ClassVar[str] = "What the captioning model sees"
    frames: int = 8
    """Frames that the model sees of a clip, spread evenly in time."""
    frame_size: int = 448
    """Longer side of these frames in pixels, at most."""
    clip_seconds: float | None = None
    """Seconds from the start of each video or segment that the caption is about; default: all of it."""

    TEXTS: ClassVar[str] = "Texts"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the models run in; auto: as their weights are stored (float16 on a CPU: float32)."""
    batch_size: int = 1
    """Clips that a model captions, or rewrites, together."""
    max_new_tokens: int = 256
    """Tokens of a text, at most."""
    temperature: float = 0.0
    """0 writes the likeliest words; more draws them, seeded by clip."""
    seed: int = 42
    """Seed of these draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if suffix_of(Path(self.output)) not in SUFFIXES or files.is_url(self.output):
            raise ConfigError(
                f"--output {self.output!r}; must be a file on this machine, such as captions.jsonl or .csv"
            )
        if self.dataset_name and os.path.abspath(self.dataset_name) == os.path.abspath(self.output):
            raise ConfigError(f"--output {self.output}: is the manifest itself; give another path")
        if self.caption_model is None and self.rewrite_model is None:
            raise ConfigError("--caption_model is missing; give an image-text-to-text model, or --rewrite_model alone")
        for name in ("frames", "frame_size", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1")
        if self.clip_seconds is not None and not 0 < self.clip_seconds < math.inf:
            raise ConfigError(f"--clip_seconds {self.clip_seconds}; must be above 0 seconds")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature}; must be a number of 0 or more, such as 0.7")
        self.prompt()
        self.template()

    @property
    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        from preprocess.generation import Decoding  # late: torch

        return Decoding(self.temperature, self.max_new_tokens)

    def prompt(self) -> str:
        """What the captioning model is asked."""
        return _text("--caption_prompt", self.caption_prompt, CONFIGS / "caption_prompt.txt")

    def template(self) -> str:
        """What the rewriting model is told of each caption."""
        text = _text("--rewrite_template", self.rewrite_template, CONFIGS / "caption_template.txt")
        if CAPTION not in text:
            raise ConfigError(
                f"--rewrite_template {self.rewrite_template}: has no {CAPTION}; write it where the caption goes"
            )
        return text


def _text(flag: str, given: str | None, default: Path) -> str:
    path = Path(given).expanduser() if given else default
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: cannot be read as UTF-8 text ({error}); give a text file") from error
    if not text:
        raise ConfigError(f"{flag} {path}: is empty; write what the model is to do")
    return text


def report(config: CaptionConfig, outcome: Outcome) -> Iterator[str]:
    """What a run did, line by line."""
    sources = [row.caption_source for row in outcome.rows]
    told = ", ".join(f"{sources.count(kind)} {kind}" for kind in ("model", "rewrite", "manifest") if kind in sources)
    found = f"; {outcome.found} found of an unfinished run" if outcome.found else ""
    yield f"captions  {outcome.captioned} written, {outcome.rewritten} rewritten{found}"
    yield f"manifest  {config.output}, {len(outcome.rows)} clips; by source: {told}"
    if outcome.silent:
        yield f"silent    {outcome.silent} captions stay as they were: --rewrite_model wrote nothing"
    if outcome.differing:
        yield f"kept      {outcome.differing} captions of {config.output} that the manifest gives otherwise now"
    if outcome.unnamed:
        yield f"kept      {outcome.unnamed} clips that the manifest does not name, at the end of {config.output}"
    if outcome.rejected:
        yield f"rejected  {len(outcome.rejected)} clips, listed in {beside(Path(config.output), 'rejected')}"
    yield from notes(outcome.rows)
    yield f"next      python -m preprocess --dataset_name {shlex.quote(config.output)}{_root(outcome, config)}"


def _root(outcome: Outcome, config: CaptionConfig) -> str:
    """The flags that stage 1 needs to find videos which do not lie below the manifest's folder."""
    absolute = [os.path.dirname(row.video) for row in outcome.rows if row.video.startswith("/")]
    root = f" --instance_data_root {shlex.quote(os.path.commonpath(absolute))}" if absolute else ""
    return root + (" --follow_links" if config.follow_links else "")


def main(argv: list[str]) -> int:
    """Caption the clips of a manifest."""
    config = parse_config(CaptionConfig, argv, "python -m preprocess.caption")
    from preprocess.captioning import caption  # late: --help and a typo are answered at once

    outcome = caption(config)
    for video, reason, detail in outcome.rejected[:SHOWN]:
        warn(f"{video}: {reason} ({detail})", "rejected", reason=reason)
    if len(outcome.rejected) > SHOWN:
        warn(f"{len(outcome.rejected) - SHOWN} more", "rejected")
    for line in report(config, outcome):
        say(line[:LABEL].strip(), line[LABEL:].strip())
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # an orderly end: children go, what the journal has stays
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run_command(main)
