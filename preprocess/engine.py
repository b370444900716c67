"""Who encodes what is missing: this process on its device, or actors of a Ray cluster (`--engine`).

An engine takes prompts and clips from the spool and leaves parts in the cache. All prompts come before the first clip:
T5 and the VAE are never resident together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Protocol

from preprocess.clips import DecodeAhead
from preprocess.config import PreprocessConfig
from preprocess.decode import DecodePool
from preprocess.publish import Stores
from preprocess.spool import Spool
from preprocess.units import Failure, Made, Units
from preprocess.validation import alone_prompts
from shared.cache import Cache
from shared.errors import ConfigError
from shared.models import Checkpoint


class Engine(Protocol):
    """What encodes. Everything that it made is in the stores when its calls have come to their ends."""

    @property
    def made(self) -> Made:
        """What was put into the cache so far."""

    def encode_prompts(self) -> None:
        """Encode the prompts that the spool tells to be missing."""

    def encode_clips(self) -> Iterator[Failure]:
        """Encode the spool's jobs; those that could not be read or encoded come out."""


class LocalEngine:
    """Encodes in this process, on its device.

    Args:
        writer: the writer's folder.
        pool: decodes the clips ahead, from the moment when the context is entered: while T5 is still at work.
    """

    def __init__(
        self,
        stores: Stores,
        checkpoint: Checkpoint,
        config: PreprocessConfig,
        spool: Spool,
        writer: Path,
        pool: DecodePool,
    ) -> None:
        self._units, self._spool = Units(stores, checkpoint, config, writer, alone_prompts(config)), spool
        self._ahead = DecodeAhead(spool.jobs(), pool)

    def __enter__(self) -> LocalEngine:
        self._ahead.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, trace)

    @property
    def made(self) -> Made:
        """As Engine."""
        return self._units.made

    def encode_prompts(self) -> None:
        """As Engine."""
        _, missing = self._spool.prompt_counts()
        self._units.encode_prompts(self._spool.missing_prompts(), missing)

    def encode_clips(self) -> Iterator[Failure]:
        """As Engine."""
        yield from self._units.encode_clips(self._ahead, self._spool.job_count)


def check_engine(config: PreprocessConfig) -> None:
    """Refuse an engine whose package is missing, before hours go into the sources.

    Raises:
        ConfigError: it is.
    """
    if config.engine == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "--engine ray: the package ray is not installed; run `pip install '.[ray]' -c constraints.txt` in the "
            "checkout, on each node"
        )


def open_engine(
    cache: Cache,
    stores: Stores,
    checkpoint: Checkpoint,
    config: PreprocessConfig,
    spool: Spool,
    writer: Path,
    pool: DecodePool,
) -> AbstractContextManager[Engine]:
    """The engine that `--engine` names; what it holds goes with its context."""
    if config.engine == "local":
        return LocalEngine(stores, checkpoint, config, spool, writer, pool)
    from preprocess.cluster import RayEngine  # late: an extra, and half a second

    return RayEngine(cache, stores, checkpoint, config, spool)
