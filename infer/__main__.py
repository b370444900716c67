"""`python -m infer`: see `--help` and docs/infer.md."""

from __future__ import annotations

from infer.config import InferConfig
from shared.config import parse_config
from shared.errors import run_command


def main(argv: list[str]) -> int:
    """Run stage 3 and print a line for each video as it is made."""
    config = parse_config(InferConfig, argv, "python -m infer")
    from infer.request import resolve  # late, as what follows: --help and mistakes are answered before torch loads

    request = resolve(config)
    from infer.generate import generate

    for video in generate(request):
        print(f"{video.path}  {video.seconds:.1f} s  {' '.join(video.prompt.split())}", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
