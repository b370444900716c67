"""`python -m preprocess.preview`: see `--help` and docs/preview.md. Stage 1 writes the first page by itself."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from preprocess.census import Census, count_samples
from preprocess.page import Place, render
from preprocess.strips import read_strips
from shared.cache import Cache
from shared.config import check_name, parse_config
from shared.dataset import DataSet
from shared.errors import CacheError, ConfigError, run_command
from shared.storage import write_atomically

PAGE_SAMPLES = 2000
REFUSED = 500  # rejected clips that are told one by one
PUBLISH_SECONDS = 30.0  # that reading strips may take when stage 1 publishes
COLUMNS = (
    "sample_id", "caption", "effective_prompt", "weight", "source", "frame_indices", "source_fps", "fps",
    "source_height", "source_width", "crop", "bucket", "latent_key", "latent_part", "mirrored_key", "tokens",
    "truncated",
)  # fmt: skip


@dataclass(frozen=True)
class PreviewConfig:
    """Show a data set on a page: the frames as they were encoded, captions, rejected clips. 2,000 samples a page."""

    cache: Positional[str]
    """The cache: a folder or a URL."""
    dataset: str = "default"
    """Name of the data set in the cache."""
    version: str | None = None
    """First digits of a version; default: the current one."""
    all: bool = False
    """Show all samples: preview.html, preview-2.html, ..."""
    decode: int = 0
    """Add what the VAE makes of the latents of so many samples, spread over the first page, with their PSNR."""
    pretrained_model_name_or_path: str | None = None
    """Checkpoint whose VAE decodes; default: the one that encoded."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""
    output: str | None = None
    """Folder of this machine for the pages, whose earlier pages go; default: the version's own, in the cache."""

    def __post_init__(self) -> None:
        check_name(self.dataset)
        if self.decode < 0:
            raise ConfigError(f"--decode {self.decode}; must be 0 or more samples")
        if self.output is not None and "://" in self.output:
            raise ConfigError(f"--output {self.output}: a URL; must be a folder of this machine")


@dataclass(frozen=True)
class Page:
    """A page that is to be written: its file's name, its bytes, and how many samples it shows."""

    name: str
    html: bytes
    samples: int


def pages(
    dataset: DataSet, rows: Iterator[dict[str, Any]], census: Census, *, most: int, linked: int,
    until: float | None = None, decoded: dict[str, dict[str, Any]] | None = None,
) -> Iterator[Page]:  # fmt: skip
    """The first pages of a data set; one is in memory at a time.

    Args:
        rows: COLUMNS of samples.parquet.
        most: how many are made.
        linked: how many there are for a reader to go to, those made earlier among them.
        until: as in `read_strips`.
    """
    for number in range(1, most + 1):
        shown = list(islice(rows, PAGE_SAMPLES))
        first = (number - 1) * PAGE_SAMPLES + 1
        place = Place(number, linked, first, first + len(shown) - 1)
        strips = read_strips(dataset, shown, until)
        html = render(dataset, census, shown, strips, place, decoded or {})
        yield Page(Place.name(number), html.encode(), len(shown))


def count_pages(dataset: DataSet) -> int:
    """How many pages show all samples."""
    return max(1, -(-dataset.num_rows // PAGE_SAMPLES))


def linked_pages(dataset: DataSet) -> int:
    """How many pages a first one that is written alone leads to: all, where they lie beside it; else itself.

    They are of the same version, so of the same samples.
    """
    there = set(dataset.cache.storage.names(dataset.folder))
    count = count_pages(dataset)
    return count if all(Place.name(number) in there for number in range(2, count + 1)) else 1


def write_preview(cache: Cache, writer: Path, dataset: DataSet) -> None:
    """Put the first page into a version that has just been published.

    It reads the columns that are counted, 2,000 strips at most, and none after PUBLISH_SECONDS; what could not be read
    is told on the page.

    Args:
        writer: the writer's folder.
    """
    until, rows, linked = time.monotonic() + PUBLISH_SECONDS, dataset.rows(*COLUMNS), linked_pages(dataset)
    for page in pages(dataset, rows, count_samples(dataset, REFUSED), most=1, linked=linked, until=until):
        cache.storage.write(f"{dataset.folder}/{page.name}", page.html, writer)


def main(argv: list[str]) -> int:
    """Write the pages."""
    config = parse_config(PreviewConfig, argv, "python -m preprocess.preview")
    from preprocess.inventory import find_version, open_cache, say

    cache = open_cache(config.cache)
    dataset = find_version(cache, config.dataset, config.version)
    folder = Path(config.output).expanduser() if config.output else None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be made ({error.strerror}); give a folder") from error
    decoded = {}
    if config.decode:
        from preprocess.reconstruction import reconstruct  # late: torch

        shown = list(islice(dataset.rows(*COLUMNS), PAGE_SAMPLES))
        decoded = reconstruct(dataset, shown, config.decode, config.pretrained_model_name_or_path, config.cache_dir)
    census, rows = count_samples(dataset, REFUSED), dataset.rows(*COLUMNS)
    most = count_pages(dataset) if config.all else 1
    linked = linked_pages(dataset) if folder is None and not config.all else most
    with nullcontext(Path()) if folder else cache.writer() as writer:  # who only reads the cache need not write to it

        def write(page: Page) -> None:
            path = f"{dataset.folder}/{page.name}"
            place = folder / page.name if folder else cache.storage.full(path)
            try:
                if folder:
                    write_atomically(folder / page.name, page.html)
                else:
                    cache.storage.write(path, page.html, writer)
            except OSError as error:
                told = f"{place}: cannot be written ({error.strerror or error})"
                raise CacheError(f"{told}; make room, or give another folder as --output") from error
            say(f"preview   {place}: {page.samples} samples, {len(page.html) / 1e6:.1f} MB; open it in a browser")

        made = pages(dataset, rows, census, most=most, linked=linked, decoded=decoded)
        first = next(made)
        for page in made:
            write(page)
        write(first)  # last, so that its links always lead somewhere
    if folder:
        _remove_others(folder, most)
    return 0


def _remove_others(folder: Path, count: int) -> None:
    """Remove the pages that an earlier run left in a folder, of whatever data set, and no page leads to any more."""
    for path in folder.glob("preview-*.html"):
        number = re.fullmatch(r"preview-(\d+)\.html", path.name)
        if number and int(number[1]) > count:
            path.unlink()


if __name__ == "__main__":
    run_command(main)
