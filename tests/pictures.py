"""The pictures in the README, of what `make demo` made: `python -m tests.pictures` writes docs/pictures/*.png.

Needs Chromium. The demo's model is random: what is seen is the pages, with real clips and a LoRA of noise.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.chromium import chromium
from tests.demo import FOLDER, ROOT

PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 300_000
WIDTH, HEIGHT = 1280, 860


def main() -> int:
    """Take the pictures."""
    if not (ROOT / FOLDER / "lora").is_dir():
        raise SystemExit("error: runs/demo is not there; run `make demo`")
    subprocess.run([sys.executable, "-m", "train.report", str(FOLDER / "lora")], cwd=ROOT, check=True)
    PICTURES.mkdir(exist_ok=True)
    (version,) = (ROOT / FOLDER / "cache" / "datasets" / "default" / "versions").iterdir()
    take("preview", version / "preview.html")
    take("report", ROOT / FOLDER / "lora" / "report.html")
    return 0


def take(name: str, page: Path) -> None:
    """The first screen of a page."""
    path = PICTURES / f"{name}.png"
    with chromium() as browser:
        browser.resize(WIDTH, HEIGHT)
        browser.open(page)
        browser.ask(f"document.body.innerHTML = document.body.innerHTML.replaceAll({str(ROOT) + '/'!r}, '')")
        browser.screenshot(path, whole=False)
    size = path.stat().st_size
    assert size <= MOST_BYTES, f"{path}: {size} bytes; must be {MOST_BYTES} at most"
    print(f"{path.relative_to(ROOT)}  {size / 1e3:.0f} kB")


if __name__ == "__main__":
    raise SystemExit(main())
