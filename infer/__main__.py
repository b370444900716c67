"""`python -m infer`: see `--help` and docs/infer.md."""

from __future__ import annotations

from infer.config import InferConfig
from shared.config import parse_config
from shared.console import Progress, say
from shared.errors import run_command


def main(argv: list[str]) -> int:
    """Run stage 3 and print a line for each video as it is made."""
    config = parse_config(InferConfig, argv, "python -m infer")
    from infer.request import resolve  # late, as what follows: --help and mistakes are answered before torch loads

    request = resolve(config)
    from infer.gallery import write_gallery
    from infer.generate import generate

    for video in Progress(generate(request), name="videos", unit="video", total=request.count, leave=False):
        took = f"{video.seconds:.1f} s" if video.made else "there already"
        told = f"{video.path}  {took}  {' '.join(video.prompt.split())}"
        say("video", told, label=False, path=video.path, seconds=video.seconds, made=video.made)
        if video.matches is not None:
            told = "are those of the recipe, to the last bit" if video.matches else "differ from the recipe's: see docs"
            say("frames", told, matches=video.matches)
        if video.made:
            write_gallery(request.folder)
    page = write_gallery(request.folder)
    say("gallery", f"{page}; open it in a browser", path=page)
    return 0


if __name__ == "__main__":
    run_command(main)
