"""`python -m preprocess.export`: see `--help` and docs/cache_commands.md."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from preprocess.inventory import find_version, is_digest, open_cache, printable
from shared.cache import KEY_BYTES, Store
from shared.config import check_name, parse_config
from shared.console import Progress, say
from shared.dataset import MEMBER_KINDS, DataSet
from shared.errors import CacheError, ConfigError, run_command
from shared.shards import decode_array
from shared.storage import canonical_json, open_atomically

MEMBER_OF = {
    "latent": "moments.npy", "mirrored": "mirrored.npy", "image": "image.npy", "embedding": "prompt_embeds.npy",
}  # fmt: skip
FACTS = ("caption", "effective_prompt", "bucket", "fps", "frame_indices", "source", "weight")
NOTE = (
    "moments and mirrored are mean and log-variance of the VAE's posterior, [2C, T, H, W], neither drawn from nor "
    "scaled: draw mean + exp(log_variance / 2) * noise, then scale as the checkpoint's VAE config says"
)


@dataclass(frozen=True)
class ExportConfig:
    """Write a data set as plain WebDataset tars, a sample after the other. Exit status: 0 done, 2 refused."""

    cache: Positional[str]
    """The cache: a folder or a URL."""
    output: str
    """The tars' paths, such as 'out/{shard:06d}.tar'."""
    dataset: str = "default"
    """Name of the data set in the cache."""
    version: str | None = None
    """First digits of a version; default: the current one."""
    samples_per_shard: int = 1000
    """Samples a tar holds at most."""
    overwrite: bool = False
    """Replace tars that are there."""

    def __post_init__(self) -> None:
        check_name(self.dataset)
        if self.samples_per_shard < 1:
            raise ConfigError(f"--samples_per_shard {self.samples_per_shard}; must be at least 1")
        if "://" in self.output:
            raise ConfigError(f"--output {self.output}; must be a path on this machine")
        try:
            different = self.path(0) != self.path(1)
        except (AttributeError, LookupError, ValueError) as error:
            raise ConfigError(f"--output {self.output}; {error}; give such as 'out/{{shard:06d}}.tar'") from error
        if not different:
            raise ConfigError(f"--output {self.output}; must hold the shard's number, such as 'out/{{shard:06d}}.tar'")

    def path(self, shard: int) -> Path:
        """The tar of a number."""
        return Path(self.output.format(shard=shard))


def samples(dataset: DataSet) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Each sample's id and members, in manifest order; one is in memory at a time.

    Raises:
        CacheError: a member is not in the cache, or damaged; names the sample.
    """
    stores: dict[str, Store] = {}
    for row in dataset.rows("sample_id", *FACTS, *(f"{kind}_key" for kind in MEMBER_KINDS)):
        name = str(row["sample_id"])
        if not is_digest(name, KEY_BYTES):
            raise CacheError(f"sample {name!r:.60}: is no id that stage 1 gives; run stage 1 again")
        members: dict[str, bytes] = {}
        for kind in MEMBER_KINDS:
            key = row[f"{kind}_key"]
            if key is None:
                continue
            folder = dataset.store_folder(kind)
            if folder not in stores:
                stores[folder] = dataset.open_store(kind)
            members[MEMBER_OF[kind]] = _read(stores[folder], key, f"sample {name}, {kind} {key.hex()}")
        try:
            members["json"] = canonical_json({**{fact: row[fact] for fact in FACTS}, "note": NOTE})
        except ValueError as error:
            raise CacheError(f"sample {name}: {error}; run stage 1 again") from error
        yield name, members


def _read(store: Store, key: bytes, what: str) -> bytes:
    try:
        payload = store.read(key)
    except (CacheError, OSError) as error:
        raise CacheError(f"{what}: {error}") from error
    if not np.isfinite(decode_array(payload, what)).all():
        raise CacheError(f"{what}: holds NaN or infinity; run `python -m preprocess.verify {store.storage.url}`")
    return payload


def write_tar(path: Path, members: Iterator[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples as a tar that has its name when it is complete; the same samples give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payloads in members:
            for member, payload in sorted(payloads.items()):
                header = tarfile.TarInfo(f"{name}.{member}")  # modification time 0, no owner
                header.size = len(payload)
                tar.addfile(header, BytesIO(payload))


def _check_paths(config: ExportConfig, count: int) -> list[Path]:
    """The tars to write.

    Raises:
        ConfigError: they are there already, or more of them, which would be taken for a part of this export.
    """
    paths = [config.path(shard) for shard in range(count)]
    there = [path for path in paths if path.exists()]
    if there and not config.overwrite:
        raise ConfigError(f"--output {there[0]}: is there already; give --overwrite to replace it, or another path")
    if config.path(count).exists():
        raise ConfigError(f"--output {config.path(count)}: is of a longer export than these {count}; remove it first")
    return paths


def main(argv: list[str]) -> int:
    """Export a data set."""
    config = parse_config(ExportConfig, argv, "python -m preprocess.export")
    dataset = find_version(open_cache(config.cache), config.dataset, config.version)
    total = len(dataset.columns("weight"))
    paths = _check_paths(config, -(-total // config.samples_per_shard))
    stream: Any = iter(Progress(samples(dataset), total=total, name="samples", unit="sample"))
    try:
        for path in paths:
            write_tar(path, islice(stream, config.samples_per_shard))
    except OSError as error:
        raise ConfigError(f"--output {config.output}: {error}; mend the disk or the permissions first") from error
    size_bytes = sum(path.stat().st_size for path in paths)
    say("data set", f"{printable(dataset.name)}, version {dataset.digest[:12]}")
    told = f"{total} samples in {len(paths)} tars, {size_bytes / 1e6:,.1f} MB: {paths[0]} to {paths[-1].name}"
    say("exported", printable(told), samples=total, size_bytes=size_bytes)
    say("note", NOTE)
    return 0


if __name__ == "__main__":
    run_command(main)
