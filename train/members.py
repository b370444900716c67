"""Members of a cache as arrays: read by range, from a local copy where there is one, and checked.

The crc32 is compared, and NaN looked for, at the first read of each member by each process; sizes, dtypes and shapes
always. Whatever is wrong with a member names its sample.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache import Cache, Store
from shared.dataset import STORE_OF, DataSet
from shared.errors import CacheError, NetworkError
from shared.shards import Location, decode_array, read_member
from train.local_cache import LocalCache

EXPONENT = np.uint16(0x7C00)  # of float16: all of its bits are set in NaN and infinity alone
KINDS = ("latent", "image", "embedding")


@dataclass(frozen=True)
class Member:
    """An array of a sample.

    Attributes:
        sample_id: whose it is, for messages.
        kind: of KINDS.
        shape: that it must have.
        dataset: which of the run's it is of.
    """

    sample_id: str
    kind: str
    key: bytes
    location: Location
    shape: tuple[int, ...]
    dataset: int = 0

    def __str__(self) -> str:
        return f"sample {self.sample_id}, {self.kind} {self.key.hex()}"


class CheckedMembers:
    """Which members a process has checked, in 8 bytes each: millions of them are to fit beside a model."""

    def __init__(self) -> None:
        self._digests = array("Q")  # sorted
        self._lock = threading.Lock()

    def __contains__(self, location: Location) -> bool:
        with self._lock:
            digest = _digest(location)
            place = bisect_left(self._digests, digest)
            return place < len(self._digests) and self._digests[place] == digest

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, location: Location) -> None:
        """Remember a member, once."""
        with self._lock:
            digest = _digest(location)
            place = bisect_left(self._digests, digest)
            if self._digests[place : place + 1] != array("Q", [digest]):
                self._digests.insert(place, digest)


def _digest(location: Location) -> int:
    """64 bits of where a member lies; a part's name is a digest already."""
    return (int(location.part[:16], 16) + location.offset) % (1 << 64)


class MemberReader:
    """Reads members of a data set; threads may share it. What a spawned worker is given: it holds no open file.

    Args:
        dataset: the data set that the members are of.
        local_cache: where copies are kept.
    """

    def __init__(self, dataset: DataSet, local_cache: LocalCache | None = None) -> None:
        self._url = dataset.cache.url
        facts = dataset.info["facts"]
        kinds = [kind for kind in KINDS if facts.get(STORE_OF[kind]) is not None]
        self._folders = {kind: dataset.store_folder(kind) for kind in kinds}
        self._facts: dict[str, dict[str, Any]] = {kind: facts[STORE_OF[kind]] for kind in kinds}
        self._local_cache = local_cache
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()  # over the three that follow
        self._cache: Cache | None = None
        self._stores: dict[str, Store] = {}
        self._gone: set[str] = set()  # parts
        self._moved: dict[bytes, Location] = {}  # of keys whose part was gone
        self._checked = CheckedMembers()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_cache", "_stores", "_gone", "_moved", "_checked")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def dtype(self, kind: str) -> np.dtype:
        """What the arrays of a kind are stored in."""
        return np.dtype(self._facts[kind]["cache_dtype"])

    def read(self, member: Member) -> np.ndarray:
        """The array, read-only.

        Raises:
            CacheError: it is gone, has changed, is not finite or not what the data set says.
            NetworkError: the cache cannot be reached.
            ConfigError: local copies cannot be kept.
        """
        location = self._moved.get(member.key, member.location)
        try:
            try:
                values = self._read_at(member, location)
            except FileNotFoundError:  # the part was repaired away or collected: the key may lie in another one
                location = self._found_elsewhere(member, location)
                values = self._read_at(member, location)
                self._moved[member.key] = location
        except NetworkError as error:
            raise NetworkError(f"{member}: {error}") from error
        except (CacheError, OSError) as error:  # OSError: gone, or of a disk that fails
            raise CacheError(f"{member}: {error}") from error
        self._checked.add(location)
        return values

    def _read_at(self, member: Member, location: Location) -> np.ndarray:
        is_first = location not in self._checked
        payload = self._local_cache.get(location) if self._local_cache else None
        if payload is None:
            check = is_first or self._local_cache is not None  # nothing that was not compared is copied
            payload = read_member(self._opened().storage, self._folders[member.kind], location, check=check)
            if self._local_cache:
                self._local_cache.add(location, payload)
        values = decode_array(payload, "its bytes")
        dtype = self.dtype(member.kind)
        if values.dtype != dtype or values.shape != member.shape:
            raise CacheError(
                f"is {values.dtype} {list(values.shape)}; the data set says {dtype} {list(member.shape)}; "
                "run stage 1 again"
            )
        if is_first and not all_finite(values):
            raise CacheError(f"holds NaN or infinity; run `python -m preprocess.verify {self._url}`")
        return values

    def _opened(self) -> Cache:
        with self._lock:
            self._cache = self._cache or Cache(self._url)
            return self._cache

    def _found_elsewhere(self, member: Member, gone: Location) -> Location:
        """Where a key lies whose part is gone.

        Raises:
            FileNotFoundError, CacheError: nowhere.
        """
        cache = self._opened()
        with self._lock:  # the first to miss a part reads the indexes; the others use what it found
            is_news = gone.part not in self._gone
            self._gone.add(gone.part)
            store = self._stores.get(member.kind)
            location = _location(store, member.key)
            if store is None or (is_news and (location is None or location.part in self._gone)):
                told = self._facts[member.kind]
                facts = {name: value for name, value in told.items() if name not in ("kind", "format_version")}
                store = self._stores[member.kind] = cache.store(STORE_OF[member.kind], facts)
                location = _location(store, member.key)
        if location is None:
            raise CacheError(f"{store.storage.full(store.folder)}: does not hold it; run stage 1 again")
        return location


def _location(store: Store | None, key: bytes) -> Location | None:
    row = int(store.find([key])[0]) if store else -1
    return store.location(row) if store and row >= 0 else None


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. Of float16 the exponents are looked at, at three times numpy's speed."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    exponents = values.view(np.uint16) & EXPONENT
    return int(exponents.max(initial=0)) != EXPONENT
