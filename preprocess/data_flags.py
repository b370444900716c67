"""What stage 1 and the captioner are both told of their data: where videos and captions are, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from shared.errors import ConfigError

if TYPE_CHECKING:
    from preprocess.manifest import Record

MOST_DECODERS = 8  # that are taken without being asked for


def decoders_for(cores: int) -> int:
    """Decoding processes that so many cores allow: one core is left to the encoder."""
    return min(max(cores - 1, 1), MOST_DECODERS)


@dataclass(frozen=True)
class DataFlags:
    """The flags of a manifest and of the children that decode its videos."""

    DATA: ClassVar[str] = "Data: videos and captions"
    instance_data_root: str | None = None
    """Folder that the manifest's paths are relative to."""
    dataset_name: str | None = None
    """Manifest: a .csv, .tsv, .json, .jsonl or .parquet file, a folder, or a hub data set."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set."""
    caption_column: str = "caption"
    """Column of the captions; without --dataset_name a text file, a caption a line."""
    video_column: str = "video"
    """Column of the videos; without --dataset_name a text file, a path a line."""
    follow_links: bool = False
    """Take videos that are symbolic links out of the data root."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""
    dataloader_num_workers: int = 0
    """Decoding processes, at least 0; 0: as many as the cores allow, at most 8."""
    decode_timeout: float = 120.0
    """Seconds, above 0, that reading one clip may take before its decoder is killed and the clip rejected."""

    def __post_init__(self) -> None:
        if self.dataloader_num_workers < 0:
            raise ConfigError(f"--dataloader_num_workers {self.dataloader_num_workers}; must not be negative")
        if not self.decode_timeout > 0:
            raise ConfigError(f"--decode_timeout {self.decode_timeout}; must be above 0 seconds")

    @property
    def decoders(self) -> int:
        """Decoding processes."""
        return self.dataloader_num_workers or decoders_for(os.cpu_count() or 2)

    def records(self, *, to_caption: bool = False, besides: Path | None = None) -> Iterator[Record]:
        """The records of the manifest; the arguments are those of `iter_manifest`."""
        from preprocess.manifest import iter_manifest  # late: --help and a typo are answered at once

        return iter_manifest(
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            instance_data_root=self.instance_data_root,
            caption_column=self.caption_column,
            video_column=self.video_column,
            follow_links=self.follow_links,
            cache_dir=self.cache_dir,
            to_caption=to_caption,
            besides=besides,
        )
