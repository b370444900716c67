"""What lies in a cache: its stores and their parts, the versions of its data sets, and what these refer to.

Read for the commands that look after a cache (verify, gc, ls, export). What is damaged is a CacheError, one line each.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from preprocess.share import list_shares, open_share, share_keys
from shared.cache import KEY_BYTES, MEMBERS, Cache
from shared.config import check_name
from shared.console import show
from shared.dataset import MEMBER_KINDS, DataSet, open_dataset
from shared.errors import CacheError
from shared.pictures import FOLDER, digest_in, is_picture_name, is_picture_path
from shared.shards import is_index_as_written, read_index
from shared.storage import Storage, digest_of

INDEX_BYTES = 256 << 20  # of an index, at most: it is read as a whole


@dataclass(frozen=True)
class StoreFolder:
    """A store as it lies in the cache, whatever is in it.

    Attributes:
        kind: `latents`, `images` or `embeddings`.
        fingerprint: the folder's name.
    """

    storage: Storage
    kind: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """Relative to the cache."""
        return f"{self.kind}/{self.fingerprint}"

    def parts(self) -> list[str]:
        """The names of its parts: those that have an index."""
        names = self.storage.names(self.folder)
        return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name[0] != "."]

    def facts(self) -> dict[str, Any]:
        """What the fingerprint is of.

        Raises:
            CacheError: fingerprint.json is missing, or says something else.
        """
        path = f"{self.folder}/fingerprint.json"
        try:
            facts = json.loads(self.storage.read(path))
            fingerprint = digest_of(facts, KEY_BYTES).hex()
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{path}: not JSON") from error
        if fingerprint != self.fingerprint or not isinstance(facts, dict):
            raise CacheError(f"{path}: is of the fingerprint {fingerprint}, not of its folder's")
        return facts

    def read_index(self, part: str, *, strict: bool = False) -> tuple[pa.Table, dict[str, Any]]:
        """The index of a part and the facts in its metadata.

        Args:
            strict: refuse it where bytes have changed that change nothing of what it says.

        Raises:
            CacheError: it is no index, or of another part.
            OSError: it cannot be read, or has just been removed.
        """
        path = f"{self.folder}/{part}.parquet"
        size_bytes = self.storage.size(path)
        if size_bytes > INDEX_BYTES:
            raise CacheError(f"{path}: {size_bytes} bytes are more than an index has")
        data = self.storage.read(path)
        table, facts = read_index(data, path)
        if facts["part"] != part:
            raise CacheError(f"{path}: is the index of part {facts['part']}")
        if strict and not is_index_as_written(data):
            raise CacheError(f"{path}: its bytes have changed since they were written, though not what they say")
        return table, facts


def open_cache(url: str) -> Cache:
    """A cache that exists.

    Raises:
        CacheError: there is none.
    """
    cache = Cache(url)
    if not any(cache.storage.names(folder) for folder in (*MEMBERS, "datasets", "writers")):
        raise CacheError(f"{cache.url}: holds no cache; give the folder or URL that stage 1 was given as --cache")
    return cache


def store_folders(cache: Cache) -> list[StoreFolder]:
    """All stores, by kind and fingerprint."""
    return [
        StoreFolder(cache.storage, kind, name)
        for kind in MEMBERS
        for name in cache.storage.names(kind)
        if is_digest(name, KEY_BYTES)
    ]


def is_digest(name: str, size_bytes: int) -> bool:
    """Whether a name is a digest of so many bytes in hex."""
    return re.fullmatch(rf"[0-9a-f]{{{2 * size_bytes}}}", name) is not None


def dataset_names(cache: Cache) -> list[str]:
    """The names of the data sets."""
    return [name for name in cache.storage.names("datasets") if cache.storage.names(f"datasets/{name}/versions")]


def versions(cache: Cache, name: str) -> list[str]:
    """The digests of a data set's versions."""
    return [digest for digest in cache.storage.names(f"datasets/{name}/versions") if is_digest(digest, 32)]


def find_version(cache: Cache, name: str, prefix: str | None) -> DataSet:
    """A version of a data set by the first digits of its digest; the current one when none are given.

    Raises:
        CacheError: there is none, or more than one.
    """
    if prefix is None:
        return open_dataset(cache, name)
    known = versions(cache, check_name(name))
    found = [digest for digest in known if digest.startswith(prefix.lower())]
    if not known or len(found) != 1:
        listed = ", ".join(digest[:12] for digest in found or known) or "none; `python -m preprocess.ls` shows what is"
        which = "is more than one version" if found else "is no version"
        raise CacheError(f"{cache.url}: {prefix!r} {which} of data set {name!r}; give the first digits of: {listed}")
    return open_dataset(cache, name, found[0])


def prompt_entries(dataset: DataSet) -> list[dict[str, Any]]:
    """The prompts of a version beside its samples' own: the empty one and the validation videos', as rows.

    Raises:
        CacheError: dataset.json does not say.
    """
    try:
        entries = [dataset.info["empty_prompt"], *dataset.info["validation_prompts"]]
        rows = [{**entry, "embedding_key": bytes.fromhex(entry["embedding_key"])} for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        path = dataset.cache.storage.full(f"{dataset.folder}/dataset.json")
        raise CacheError(f"{path}: names no keys of its prompts; run stage 1 again") from error
    for row in rows:
        if row.get("image") is not None and not is_picture_path(row["image"]):
            path = dataset.cache.storage.full(f"{dataset.folder}/dataset.json")
            raise CacheError(f"{path}: {row['image']!r:.80} is no picture of a cache; run stage 1 again")
    return rows


def references(dataset: DataSet) -> dict[str, set[bytes]]:
    """The keys that a version refers to, by the folder of their store; of pictures their digests."""
    found: dict[str, set[bytes]] = defaultdict(set)
    rows = dataset.rows(*(f"{kind}_key" for kind in MEMBER_KINDS))
    for row in prompt_entries(dataset):
        found[dataset.store_folder("embedding")].add(row["embedding_key"])
        if row.get("image") is not None:
            found[FOLDER].add(digest_in(row["image"]))
    for row in rows:
        for kind in MEMBER_KINDS:
            if row[f"{kind}_key"] is not None:
                found[dataset.store_folder(kind)].add(row[f"{kind}_key"])
    return found


def all_references(cache: Cache) -> dict[str, set[bytes]]:
    """The keys that any version of any data set refers to, or a worker's share, by the folder of their store."""
    found: dict[str, set[bytes]] = defaultdict(set)
    for dataset in all_versions(cache):
        for folder, keys in references(dataset).items():
            found[folder] |= keys
    for name in cache.storage.names("datasets"):
        for path in list_shares(cache, name).values():
            for folder, key in share_keys(open_share(cache, path)):
                found[folder].add(key)
    return found


def all_versions(cache: Cache) -> Iterator[DataSet]:
    """Every version of every data set."""
    for name in dataset_names(cache):
        for digest in versions(cache, name):
            yield open_dataset(cache, name, digest)


def pictures(storage: Storage) -> list[str]:
    """The paths of the pictures, by digest."""
    return [f"{FOLDER}/{name}" for name in storage.names(FOLDER) if is_picture_name(name)]


def leftovers(storage: Storage) -> Iterator[tuple[str, str, bool]]:
    """Paths that belong to nothing, what they are, and whether they are of our making."""
    for name in storage.names(FOLDER):
        if not is_picture_name(name):
            yield f"{FOLDER}/{name}", "is no picture", False
    for kind in MEMBERS:
        for store in storage.names(kind):
            if not is_digest(store, KEY_BYTES):
                yield f"{kind}/{store}", "is no store", False
                continue
            names = storage.names(f"{kind}/{store}")
            for name in names:
                stem, _, suffix = name.rpartition(".")
                path = f"{kind}/{store}/{name}"
                if name.startswith(".") and suffix == "tmp":
                    yield path, "was never finished", True
                elif suffix == "tar" and is_digest(stem, KEY_BYTES) and f"{stem}.parquet" not in names:
                    yield path, "a tar without an index", True
                elif suffix not in ("tar", "parquet") and name != "fingerprint.json":
                    yield path, "is no file of a store", False


def printable(text: object) -> str:
    """What a cache says, as one line that moves no cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def say(line: str) -> None:
    """Print a line of what was found, beside a progress bar."""
    show(printable(line))
