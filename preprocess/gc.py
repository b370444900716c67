"""`python -m preprocess.gc`: see `--help` and docs/cache_commands.md."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from tyro.conf import Positional

from preprocess.inventory import StoreFolder, all_references, open_cache, pictures, say, store_folders
from shared.cache import Cache
from shared.config import parse_config
from shared.console import Progress
from shared.errors import CacheError, ConfigError, run_command
from shared.pictures import FOLDER, digest_in

DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class GcConfig:
    """Tell which parts of a cache no data set refers to; remove them with --delete. Exit status: 0 done, 2 refused."""

    cache: Positional[str]
    """The cache: a folder or a URL."""
    delete: bool = False
    """Remove what is told; refused while a writer is at work."""
    older_than: float = 7.0
    """Days since a part was written; a younger one is kept, as the data set that it was made for may be yet to come."""

    def __post_init__(self) -> None:
        if not 0 <= self.older_than < math.inf:
            raise ConfigError(f"--older_than {self.older_than}; must be a number of days, 0 or more")


@dataclass(frozen=True)
class Garbage:
    """Files that nothing refers to.

    Attributes:
        what: for the user.
        files: in the order in which they must go.
        store: they are all that is left of a store.
    """

    what: str
    files: list[str]
    size_bytes: int
    store: str | None = None


def find_garbage(cache: Cache, before: float) -> Iterator[Garbage]:
    """The parts and pictures that no version of a data set refers to, and the stores that are empty without them.

    Args:
        before: seconds since 1970; what was written later is kept.

    Raises:
        CacheError: a version cannot be read, so what it refers to is not known.
    """
    referred = all_references(cache)
    for store in Progress(store_folders(cache), name="stores", unit="store"):
        left = set(cache.storage.names(store.folder))
        for part in store.parts():
            keys = _keys(store, part)
            files = [name for name in (f"{part}.parquet", f"{part}.tar") if name in left]
            if keys is not None and not keys & referred.get(store.folder, set()) and _is_old(store, files, before):
                left -= set(files)
                yield _garbage(store, f"{store.folder}/{part}: {len(keys)} keys", files)
        if left <= {"fingerprint.json"} and store.folder not in referred and _is_old(store, sorted(left), before):
            yield _garbage(store, f"{store.folder}: an empty store", sorted(left), store.folder)
    for path in pictures(cache.storage):
        if digest_in(path) not in referred.get(FOLDER, ()) and cache.storage.modified(path) < before:
            yield Garbage(path, [path], cache.storage.size(path))


def _keys(store: StoreFolder, part: str) -> set[bytes] | None:
    try:
        return set(store.read_index(part)[0]["key"].to_pylist())
    except (CacheError, OSError) as error:
        say(f"kept: {store.folder}/{part}: its keys are not known ({error})")
        return None


def _is_old(store: StoreFolder, files: list[str], before: float) -> bool:
    return all(store.storage.modified(f"{store.folder}/{name}") < before for name in files)


def _garbage(store: StoreFolder, what: str, files: list[str], folder: str | None = None) -> Garbage:
    paths = [f"{store.folder}/{name}" for name in files]
    return Garbage(what, paths, sum(map(store.storage.size, paths)), folder)


def _remove(cache: Cache, garbage: Garbage) -> None:
    for path in garbage.files:
        cache.storage.remove(path)
    if garbage.store:
        with suppress(OSError):  # something has come into it
            cache.storage.local(garbage.store).rmdir()


def main(argv: list[str]) -> int:
    """Tell what nothing refers to, and remove it where asked to."""
    config = parse_config(GcConfig, argv, "python -m preprocess.gc")
    cache = open_cache(config.cache)
    if config.delete and not cache.storage.is_local:
        raise CacheError(
            f"{cache.url}: --delete needs a local cache, as no lock tells whether a writer is at work there"
        )
    count = size_bytes = 0
    before = time.time() - config.older_than * DAY_SECONDS
    with cache.without_writers() if config.delete else nullcontext():  # from before the references are read
        try:
            for garbage in find_garbage(cache, before):
                say(f"{'removed' if config.delete else 'would remove'}: {garbage.what}, {garbage.size_bytes:,} bytes")
                count, size_bytes = count + 1, size_bytes + garbage.size_bytes
                if config.delete:
                    _remove(cache, garbage)
        except OSError as error:
            raise CacheError(f"{cache.url}: {error}; mend the disk or the permissions first") from error
    if not count:
        say(f"nothing to remove: every part is referred to, or younger than {config.older_than:g} days")
    else:
        hint = "" if config.delete else "; give --delete to remove them"
        say(f"{'removed' if config.delete else 'would remove'} {count} in all, {size_bytes / 1e6:,.1f} MB{hint}")
    return 0


if __name__ == "__main__":
    run_command(main)
