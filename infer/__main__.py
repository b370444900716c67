"""`python -m infer`: see `--help` and docs/infer.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer.config import InferConfig
from shared.config import parse_config
from shared.console import Progress, say
from shared.errors import run_command

if TYPE_CHECKING:
    from infer.request import Request

DIFFER = "differ from the recipe's: another device, other versions, or a batch (docs/infer.md)"


def main(argv: list[str]) -> int:
    """Run stage 3 and print a line for each video as it is made."""
    config = parse_config(InferConfig, argv, "python -m infer")
    from infer.request import resolve  # late, as what follows: --help and mistakes are answered before torch loads

    request = resolve(config)
    from infer.gallery import write_gallery
    from infer.generate import generate

    tell_request(request)
    for video in Progress(generate(request), name="videos", unit="video", total=request.count, leave=False):
        took = f"{video.seconds:.1f} s" if video.made else "there already"
        told = f"{video.path}  {took}  {' '.join(video.prompt.split())}"
        say("video", told, label=False, path=video.path, seconds=video.seconds, made=video.made)
        if video.matches is not None:
            told = "are those of the recipe, to the last bit" if video.matches else DIFFER
            say("frames", told, matches=video.matches)
        if video.made:
            write_gallery(request.folder)
    page = write_gallery(request.folder)
    say("gallery", f"{page}; open it in a browser", path=page)
    return 0


def tell_request(request: Request) -> None:
    """Say what is about to be made, and what with: loading may take minutes."""
    first = request.recipes[0] if request.recipes else None
    if first is None:
        return
    say("base", f"{request.checkpoint.name}: {request.checkpoint.facts.kind}, {first.dtype}, on {first.device}")
    for lora in request.loras:
        step = "" if lora.facts is None else f", step {lora.facts.step}"
        say("LoRA", f"{lora.path}{step}, rank {lora.rank}, weight {lora.weight:g}")
    sizes = sorted({f"{recipe.frames}x{recipe.height}x{recipe.width}" for recipe in request.recipes})
    beside = f", {len(request.comparisons)} side by side" if request.comparisons else ""
    say("videos", f"{len(request.recipes)} of {', '.join(sizes)}{beside}, into {request.folder}")


if __name__ == "__main__":
    run_command(main)
