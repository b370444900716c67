"""The strips of frames that stage 1 kept of its clips (`KEY.preview.jpg`): found in the parts' indexes, read by range.

A strip that cannot be read is told, and is no reason to have no page: what it shows is in the latents' parts already.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from shared.dataset import DataSet
from shared.errors import CacheError
from shared.shards import Location, read_index, read_member

MEMBER = "preview.jpg"
THREADS = 16  # behind a URL a read is mostly waiting


@dataclass(frozen=True)
class Strip:
    """A strip of a clip's frames, as JPEG; or why there is none."""

    jpeg: bytes | None
    fault: str = ""


def read_strips(dataset: DataSet, rows: Sequence[dict[str, Any]], until: float | None = None) -> list[Strip]:
    """The strip of each sample.

    Args:
        rows: of samples.parquet, with `latent_key` and `latent_part`.
        until: of `time.monotonic()`: what is not read by then is left out; None: all is read.
    """
    folder = dataset.store_folder("latent")
    wanted: dict[str, set[bytes]] = defaultdict(set)
    for row in rows:
        wanted[row["latent_part"]].add(row["latent_key"])
    with ThreadPoolExecutor(THREADS, thread_name_prefix="strips") as threads:
        found = threads.map(lambda part: _places(dataset, folder, part, wanted[part], until), wanted)
        places: dict[bytes, Location | str] = {}
        for part in found:
            places |= part
        _look_again(dataset, folder, places, until)
        return list(threads.map(lambda row: _read(dataset, folder, places[row["latent_key"]], until), rows))


def _places(
    dataset: DataSet, folder: str, part: str, keys: set[bytes], until: float | None
) -> dict[bytes, Location | str]:
    """Where the strips of keys lie in a part; of those that are not there why not, and "" where the part is gone."""
    storage, path = dataset.cache.storage, f"{folder}/{part}.parquet"
    if _is_late(until):
        return dict.fromkeys(keys, "not read in time")
    try:
        table, _ = read_index(storage.read(path), storage.full(path))
    except FileNotFoundError:
        return dict.fromkeys(keys, "")
    except (CacheError, OSError) as error:
        return dict.fromkeys(keys, str(error))
    found: dict[bytes, Location | str] = dict.fromkeys(keys, "stage 1 kept none")
    for row in table.select(["key", "member", "offset", "size_bytes", "crc32"]).to_pylist():
        if row["member"] == MEMBER and row["key"] in keys:
            found[row["key"]] = Location(part, row["offset"], row["size_bytes"], row["crc32"])
    return found


def _look_again(dataset: DataSet, folder: str, places: dict[bytes, Location | str], until: float | None) -> None:
    """Look the keys whose part is gone up in the store: a repair may have put them into another one."""
    lost = [key for key, place in places.items() if place == ""]
    if not lost:
        return
    try:
        store = dataset.open_store("latent")
        parts = {
            key: store.location(int(row)).part for key, row in zip(lost, store.find(lost), strict=True) if row >= 0
        }
    except (CacheError, OSError) as error:
        places |= dict.fromkeys(lost, str(error))
        return
    places |= dict.fromkeys(lost, "its part is gone; run stage 1 again")
    for part in set(parts.values()):
        keys = {key for key in parts if parts[key] == part}
        places |= {
            key: place or "its part is gone" for key, place in _places(dataset, folder, part, keys, until).items()
        }


def _read(dataset: DataSet, folder: str, place: Location | str, until: float | None) -> Strip:
    if isinstance(place, str):
        return Strip(None, place)
    if _is_late(until):
        return Strip(None, "not read in time")
    try:
        return Strip(read_member(dataset.cache.storage, folder, place))
    except (CacheError, OSError) as error:
        return Strip(None, str(error))


def _is_late(until: float | None) -> bool:
    return until is not None and time.monotonic() > until
