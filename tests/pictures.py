"""The pictures in the README and docs: `python -m tests.pictures` writes docs/pictures/*.png.

Needs Chromium, and what `make demo` made. The demo's model is random: what is seen is the pages, with real clips, the
curves of two short runs, and videos of coloured noise, which a LoRA changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from tests.chromium import chromium
from tests.demo import FOLDER, ROOT, run

PICTURES = ROOT / "docs" / "pictures"
MADE = FOLDER / "pictures"
MOST_BYTES = 300_000
COLOURS = 256  # of a picture that would be larger


def main() -> int:
    """Make what the demo has not, and take the pictures."""
    if not (ROOT / FOLDER / "cache").is_dir():
        raise SystemExit("error: runs/demo is not there; run `make demo`")
    runs = {rank: MADE / f"rank-{rank}" for rank in (8, 32)}
    for rank, folder in runs.items():
        if not (ROOT / folder).is_dir():
            run(
                ["train", "--cache", FOLDER / "cache", "--output_dir", folder, "--rank", rank, "--lora_alpha", rank]
                + ["--learning_rate", "1e-2", "--lr_scheduler", "cosine"]
                + ["--max_train_steps", "120", "--lr_warmup_steps", "10", "--holdout", "0.3", "--holdout_steps", "10"]
            )
    run(["train.report", *runs.values(), "--output", MADE / "report.html"])
    run(
        ["infer", "--lora", runs[8], "--prompt", "a white rabbit rides a bicycle", "--compare", "base,0.5,1.0"]
        + ["--num_inference_steps", "8", "--output_dir", MADE / "videos"]
    )
    PICTURES.mkdir(exist_ok=True)
    (version,) = (ROOT / FOLDER / "cache" / "datasets" / "default" / "versions").iterdir()
    take("preview", version / "preview.html")
    take("report", ROOT / MADE / "report.html", height=1040)
    take("gallery", ROOT / MADE / "videos" / "index.html")
    return 0


def take(name: str, page: Path, height: int = 860) -> None:
    """The first screen of a page, so many pixels high, without any path of this machine."""
    path = PICTURES / f"{name}.png"
    with chromium() as browser:
        browser.resize(1280, height)
        browser.open(page)
        browser.ask(
            "for (const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); walker.nextNode();)"
            f" walker.currentNode.data = walker.currentNode.data.replaceAll({str(ROOT) + '/'!r}, '')"
        )
        browser.ask("for (const video of document.querySelectorAll('video')) video.preload = 'auto'")
        browser.wait_until("[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)")
        browser.screenshot(path, whole=False)
    if path.stat().st_size > MOST_BYTES:
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    assert size <= MOST_BYTES, f"{path}: {size} bytes; must be {MOST_BYTES} at most"
    print(f"{path.relative_to(ROOT)}  {size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
