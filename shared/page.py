"""A page of a stage: one HTML file that opens from the disk, with its look and its script inside.

A stage brings NAME.html.j2, which extends `page.html.j2` here, NAME.css and NAME.js; `page.css` and `page.js` come
before these, so that all pages look and behave alike. What others wrote is text: the templates escape it. A page asks
nothing of a network; its videos are files beside it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
LARGE_BYTES = 32 << 20  # larger videos are linked, not played in the page


def render_page(folder: Path, name: str, **values: Any) -> str:
    """The HTML of a page.

    Args:
        folder: of the stage, where `<name>.html.j2`, `<name>.css` and `<name>.js` are.
        values: for the template; each one that it names must be there.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape  # late: stage 1 ends with it
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def joined(suffix: str) -> Markup:
        files = (HERE / f"page.{suffix}", folder / f"{name}.{suffix}")
        return Markup("\n".join(file.read_text(encoding="utf-8") for file in files))

    template = environment.get_template(f"{name}.html.j2")
    html = template.render(css=joined("css"), js=joined("js"), videos_large_mb=LARGE_BYTES >> 20, **values)
    return html.encode("utf-8", "replace").decode()  # JSON may hold half a pair of surrogates, which UTF-8 has not


def video_cell(path: Path, place: Path, size_bytes: int, size: tuple[float, float] | None) -> dict[str, Any]:
    """What the `video` macro shows of a video.

    Args:
        place: where the page will lie; the path is told from there.
        size: width and height in pixels, where they are known: the page does not jump then as the video is loaded.
    """
    relative = os.path.relpath(path.resolve(), place.resolve().parent)
    return {
        "url": quote(os.fsencode(relative)),  # a name may be no UTF-8
        "name": path.stem,
        "size_mb": size_bytes / 1e6,
        "large": size_bytes > LARGE_BYTES,
        "size": size,
    }
