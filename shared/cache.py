"""The cache: where everything lies, which keys a store holds, and who is writing.

    CACHE/
      latents/<fingerprint>/      fingerprint.json  <part>.tar  <part>.parquet     video moments
      images/<fingerprint>/       the same                                          noised first frames
      embeddings/<fingerprint>/   the same                                          prompts
      pictures/                   <sha256>.<format>                                 of validation (shared/pictures.py)
      sources.parquet             what was learnt of each source video
      datasets/<name>/            CURRENT and versions/<digest>/  (shared/dataset.py)
      writers/<id>/               a live writer's unfinished files and its lock

A fact is stored once, under a key that is the digest of all that it depends on, in the store whose fingerprint is the
digest of all else that changes its numbers. So nothing can be stale, and nothing is made twice. See docs/format.md.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import CacheError
from shared.shards import FORMAT_VERSION, Location, Shard, read_index, read_member, value_bytes
from shared.storage import FileLock, Storage, canonical_json, digest_of

KEY_BYTES = 16
MEMBERS = {"latents": "moments.npy", "images": "image.npy", "embeddings": "prompt_embeds.npy"}  # of each kind of store
IN_USE = ".in_use"  # in writers/: a lock that each writer shares
STRANDED_SECONDS = 3600  # a writer's folder without a name is a crash in its first instant when it is older


def latent_key(video_digest: str, frame_indices: Sequence[int], geometry: dict[str, Any], pixels_version: int) -> bytes:
    """The key of a clip's moments.

    Args:
        video_digest: sha256 of the video file's bytes, hex.
        frame_indices: visible frames taken, in order.
        geometry: the size resized to, the crop box, mirrored or not.
        pixels_version: of the code that decodes, converts, rotates and resizes.
    """
    facts = ["latent", video_digest, [int(index) for index in frame_indices], geometry, pixels_version]
    return digest_of(facts, KEY_BYTES)


def image_key(video_digest: str, frame_index: int, geometry: dict[str, Any], pixels_version: int) -> bytes:
    """The key of the noised encodings of a clip's first frame.

    Args:
        frame_index: the visible frame.
        video_digest, geometry, pixels_version: as in `latent_key`.
    """
    return digest_of(["image", video_digest, int(frame_index), geometry, pixels_version], KEY_BYTES)


def embedding_key(effective_prompt: str) -> bytes:
    """The key of a prompt's embedding: of the text as the model reads it, id token included."""
    return digest_of(["prompt", effective_prompt], KEY_BYTES)


class Store:
    """All parts under one fingerprint: which keys they hold, and where.

    Args:
        storage: the cache's.
        kind: `latents`, `images` or `embeddings`.
        fingerprint: of everything that changes the numbers and is not in a key; JSON values.
    """

    def __init__(self, storage: Storage, kind: str, fingerprint: dict[str, Any]) -> None:
        self.storage = storage
        self.kind = kind
        self.facts = {"kind": kind, "format_version": FORMAT_VERSION, **fingerprint}
        self.fingerprint = digest_of(self.facts, KEY_BYTES).hex()
        self.folder = f"{kind}/{self.fingerprint}"
        self._parts: list[str] = []
        self._keys = np.empty(0, f"S{KEY_BYTES}")  # sorted, each once: where the first part by name has it
        self._rows = np.empty(0, [("part", "i4"), ("offset", "i8"), ("size", "i8"), ("crc", "u4"), ("tokens", "i4")])

    def refresh(self) -> None:
        """Read the indexes that were published since the last look."""
        names = self.storage.names(self.folder)
        known = {f"{part}.parquet" for part in self._parts}
        parts, keys, rows = [*self._parts], [self._keys[:0]], [self._rows[:0]]
        for name in (name for name in names if name.endswith(".parquet") and name not in known):
            table, facts = read_index(self.storage.read(f"{self.folder}/{name}"), self.storage.full(name))
            if name != f"{facts['part']}.parquet":
                raise CacheError(f"{self.storage.full(self.folder)}/{name}: is the index of part {facts['part']}")
            table = table.filter(_is_member(table, MEMBERS[self.kind]))
            found = np.empty(len(table), self._rows.dtype)
            found["part"] = len(parts)
            found["offset"] = table["offset"].to_numpy()
            found["size"] = table["size_bytes"].to_numpy()
            found["crc"] = table["crc32"].to_numpy()
            found["tokens"] = table["tokens"].fill_null(-1).to_numpy()
            keys += [np.frombuffer(value_bytes(chunk), self._keys.dtype) for chunk in table["key"].chunks]
            rows.append(found)
            parts.append(facts["part"])
        if len(rows) > 1:  # only now: an index that is refused must not leave half of a look behind
            self._parts, self._keys, self._rows = self._merged(parts, np.concatenate(keys), np.concatenate(rows))

    def _merged(self, parts: list[str], keys: np.ndarray, rows: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
        """What is known with new keys and their rows, which come part by part in the order of the parts' names.

        What is known is copied, not sorted again: a run looks again after each part that it publishes.
        """
        keys, first = np.unique(keys, return_index=True)  # of equal keys the first part's by name
        rows = rows[first]
        if not len(self._keys):
            return parts, keys, rows
        places = np.searchsorted(self._keys, keys)
        again = self._keys[np.minimum(places, len(self._keys) - 1)] == keys
        old_rows = self._rows.copy() if again.any() else self._rows
        for place, row in zip(places[again], rows[again], strict=True):
            if parts[row["part"]] < parts[old_rows[place]["part"]]:
                old_rows[place] = row
        added = places[~again]
        return parts, np.insert(self._keys, added, keys[~again]), np.insert(old_rows, added, rows[~again])

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """For each key the row that `location` and `tokens` take, until the next refresh; -1: not in the store."""
        known = self._keys  # once: a thread that publishes may refresh meanwhile
        wanted = np.array(list(keys), known.dtype)
        if not len(known):
            return np.full(len(wanted), -1)
        rows = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[rows] == wanted, rows, -1)

    def location(self, row: int) -> Location:
        """Where the member of a row that `find` gave lies."""
        assert row >= 0, "not in the store: the last row's place would be taken for it"
        part, offset, size, crc, _ = self._rows[row].tolist()
        return Location(self._parts[part], offset, size, crc)

    def tokens(self, row: int) -> int:
        """Tokens of a prompt, before truncation."""
        return int(self._rows[row]["tokens"])

    def read(self, key: bytes) -> bytes:
        """The member's bytes of one key.

        Raises:
            CacheError: the store does not hold it.
        """
        row = int(self.find([key])[0])
        if row < 0:
            raise CacheError(f"{self.storage.full(self.folder)}: does not hold {key.hex()}; run stage 1 again")
        return read_member(self.storage, self.folder, self.location(row))

    def publish(self, shard: Shard) -> None:
        """Make a finished part visible: the tar, then the index that declares it complete."""
        if not self.storage.exists(f"{self.folder}/fingerprint.json"):
            self.storage.write(f"{self.folder}/fingerprint.json", canonical_json(self.facts), shard.tar.parent)
        self.storage.publish(shard.tar, f"{self.folder}/{shard.part}.tar")
        self.storage.publish(shard.index, f"{self.folder}/{shard.part}.parquet")
        self.refresh()


def _is_member(table: Any, member: str) -> Any:
    import pyarrow.compute as pc

    return pc.equal(table["member"], member)


class Cache:
    """A cache folder or URL."""

    def __init__(self, url: str) -> None:
        self.storage = Storage(url)
        if self.storage.is_local and self.storage.exists("") and not self.storage.local().is_dir():
            raise CacheError(f"{self.url}: is a file; --cache must be a folder or a URL")

    @property
    def url(self) -> str:
        """The folder or URL, absolute."""
        return self.storage.url

    def store(self, kind: str, fingerprint: dict[str, Any]) -> Store:
        """The store of a kind and fingerprint, with its indexes read; it need not exist yet."""
        store = Store(self.storage, kind, fingerprint)
        store.refresh()
        return store

    @contextmanager
    def writer(self) -> Iterator[Path]:
        """A folder of this process's own for unfinished files; dead writers' folders are removed on the way.

        `CACHE/writers/<id>/`, locked as long as the process lives; waits while `without_writers` is in force somewhere.
        Of a remote cache it is on this machine, in a folder of the user's own below $TMPDIR: nothing unfinished is
        remote.
        """
        writers = self._writers()
        writers.mkdir(mode=0o700 if not self.storage.is_local else 0o777, parents=True, exist_ok=True)
        if not self.storage.is_local and writers.stat().st_uid != os.getuid():
            raise CacheError(f"{writers}: belongs to another user; set TMPDIR to a folder of your own")
        with FileLock(writers / IN_USE, shared=True):
            for dead in dead_writers(writers):
                shutil.rmtree(dead, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=".", dir=writers))
            lock = FileLock(folder / "lock")
            try:
                lock.acquire()
                name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
                folder = folder.rename(writers / name)  # locked before it has a name: no one can take it for dead
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()

    def _writers(self) -> Path:
        if self.storage.is_local:
            return self.storage.local("writers")
        return Path(tempfile.gettempdir(), f"latentreel-{os.getuid()}")

    @contextmanager
    def without_writers(self) -> Iterator[None]:
        """Keep writers out of a local cache: those that come wait, and what no data set refers to can be removed.

        Raises:
            CacheError: one is at work.
        """
        writers = self.storage.local("writers")
        writers.mkdir(parents=True, exist_ok=True)
        lock = FileLock(writers / IN_USE)
        if not lock.acquire():
            raise CacheError(f"{self.url}: a writer is at work in it; try again when it has finished")
        try:
            yield
        finally:
            lock.release()


def dead_writers(writers: Path) -> Iterator[Path]:
    """The folders of writers that no longer live: their locks are free, and held while the caller looks at a folder."""
    for folder in writers.iterdir() if writers.is_dir() else ():
        lock = FileLock(folder / "lock")
        try:
            if folder.name.startswith("."):
                if folder.is_dir() and time.time() - folder.stat().st_mtime > STRANDED_SECONDS:
                    yield folder
                continue
            dead = lock.acquire()
        except (FileNotFoundError, NotADirectoryError):  # it has just been named, or removed, by its owner
            continue
        except PermissionError:  # another user's
            continue
        if dead:
            try:
                yield folder
            finally:
                lock.release()
