"""One part of a store under suspicion: every row of its index against its tar.

Nothing is allocated because an index or a tar claims it: a tar passes by once, from front to back, in pieces.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.inventory import StoreFolder, is_digest
from shared.cache import KEY_BYTES, MEMBERS
from shared.errors import CacheError
from shared.shards import MAX_MEMBERS, read_npy_header
from shared.storage import Storage

BLOCK = tarfile.BLOCKSIZE
PIECE_BYTES = 4 << 20  # of a payload that is in memory
MEMBER_BYTES = 1 << 30  # of a member, at most
NPY_HEAD_BYTES = 4096  # hold the header of any array that we write
AXES = {"moments.npy": 4, "image.npy": 5, "prompt_embeds.npy": 2}


class _MemberError(Exception):
    """What is wrong with a member."""


@dataclass
class Part:
    """What was found of one part.

    Attributes:
        index_fault: what is wrong with the index.
        tar_fault: what is wrong with the tar as a whole.
        rows: of the index; where that is bad, of the tar's own headers.
        bad: by key, what is wrong with which of its members.
        sha256: of the tar; None: not read.
    """

    store: StoreFolder
    name: str
    index_fault: str | None = None
    tar_fault: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[bytes, dict[str, list[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    size_bytes: int = 0
    sha256: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.index_fault or self.tar_fault or self.bad)

    @property
    def good(self) -> dict[bytes, list[dict[str, Any]]]:
        """The rows of each key with which nothing is wrong."""
        found: dict[bytes, list[dict[str, Any]]] = defaultdict(list)
        for row in self.rows:
            if row["key"] not in self.bad:
                found[row["key"]].append(row)
        return found

    def faults(self) -> Iterator[str]:
        """A line for the index, for the tar, and for each bad key."""
        path = f"{self.store.folder}/{self.name}"
        if self.index_fault:
            yield f"{path}.parquet: {self.index_fault}"
        if self.tar_fault:
            yield f"{path}.tar: {self.tar_fault}"
        for key, faults in self.bad.items():
            told = "; ".join(f"{', '.join(members)}: {fault}" for fault, members in faults.items())
            yield f"{path}.tar: {key.hex()} {told}"

    def blame(self, row: dict[str, Any], fault: str) -> None:
        """Note what is wrong with a member."""
        name = row["member"]
        self.bad[row["key"]][fault].append(name if re.fullmatch(r"[\w.]{1,40}", name) else f"{name!r:.40}")

    def blame_all(self, fault: str) -> None:
        """Note what is wrong with the tar as a whole, so that nothing in it can be had."""
        self.tar_fault = fault
        for row in self.rows:
            self.blame(row, f"the tar {fault}")


class _Tape:
    """A tar that passes by once, from front to back; hashed on the way where `whole`."""

    def __init__(self, storage: Storage, path: str, whole: bool) -> None:
        self._storage, self._path, self._whole = storage, path, whole
        self._sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size_bytes: int) -> bytes:
        data = self._storage.read_range(self._path, self.position, size_bytes)
        self.position += size_bytes
        if self._whole:
            self._sha256.update(data)
        return data

    def forward(self, position: int) -> None:
        """Go on to a later position."""
        while self._whole and self.position < position:
            self.read(min(PIECE_BYTES, position - self.position))
        self.position = position

    def digest(self, size_bytes: int) -> str | None:
        """sha256 of the whole tar, when it was read."""
        self.forward(size_bytes)
        return self._sha256.hexdigest() if self._whole else None


def check_part(store: StoreFolder, name: str, *, quick: bool) -> Part:
    """What is wrong with a part; nothing when it was removed meanwhile.

    Args:
        quick: read no payload, unless something else is wrong.
    """
    found = Part(store, name)
    try:
        _check(found, quick)
    except FileNotFoundError:
        if not store.storage.exists(f"{store.folder}/{name}.parquet"):
            return Part(store, name)  # its index went first: it was collected or mended by another process
        found.blame_all("is missing")
    except (CacheError, OSError) as error:
        found.blame_all(f"cannot be read ({getattr(error, 'strerror', None) or error})")
    return found if found.is_good or not quick else check_part(store, name, quick=False)


def _check(found: Part, quick: bool) -> None:
    store, storage, path = found.store, found.store.storage, f"{found.store.folder}/{found.name}.tar"
    facts: dict[str, Any] = {}
    try:
        table, facts = store.read_index(found.name, strict=True)
        found.rows = table.to_pylist()
    except FileNotFoundError:
        raise
    except (CacheError, OSError, ValueError) as error:  # ValueError: a text that is not UTF-8
        found.index_fault = str(error).removeprefix(f"{store.folder}/{found.name}.parquet: ").partition("; run ")[0]
    if found.index_fault and quick:
        return  # enough to look closer
    size_bytes = storage.size(path)
    if found.index_fault:
        found.rows = list(_walk(storage, path, size_bytes))
    elif size_bytes != facts["tar_size_bytes"]:
        found.tar_fault = f"has {size_bytes} bytes, its index promises {facts['tar_size_bytes']}"
    tape = _Tape(storage, path, whole=not quick and not found.tar_fault)  # of another size it has another sha256
    for row in sorted(found.rows, key=lambda row: row["offset"]):
        try:
            _check_member(tape, row, size_bytes, quick)
        except _MemberError as fault:
            found.blame(row, str(fault))
    if found.index_fault and store.kind == "embeddings":
        _count_tokens(storage, path, found.rows)
    _check_keys(found)
    found.size_bytes, found.sha256 = size_bytes, tape.digest(size_bytes)
    if found.sha256 and found.sha256[: len(found.name)] != found.name:
        found.tar_fault = found.tar_fault or "has another sha256 than its name"
        for row in found.rows if found.index_fault else ():
            found.blame(row, "nothing proves it, as the index is damaged too")


def _check_member(tape: _Tape, row: dict[str, Any], tar_bytes: int, quick: bool) -> None:
    """Compare a member with its row. What the row does not say, as it is of the tar's own headers, is put into it."""
    offset, size_bytes = row["offset"], row["size_bytes"]
    if size_bytes > MEMBER_BYTES:
        raise _MemberError(f"claims {size_bytes} bytes, more than a member has")
    if offset < BLOCK or offset + size_bytes > tar_bytes:
        raise _MemberError(f"{size_bytes} bytes at {offset} lie outside the tar of {tar_bytes} bytes")
    if offset - BLOCK < tape.position:
        raise _MemberError(f"at {offset} it lies within the member before it")
    tape.forward(offset - BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(tape.read(BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _MemberError(f"its tar header is damaged ({error})") from error
    name = f"{row['key'].hex()}.{row['member']}"
    if (header.name, header.size, header.type) != (name, size_bytes, tarfile.REGTYPE):
        raise _MemberError(f"its tar header is of {header.name!r:.80}, {header.size} bytes")
    if quick:
        tape.forward(offset + size_bytes)
        return
    crc32, array = _measure(tape, size_bytes, row["member"].endswith(".npy"))
    if row.setdefault("crc32", crc32) != crc32:
        raise _MemberError("its bytes have changed since they were written (crc32)")
    if isinstance(array, str):
        raise _MemberError(array)
    dtype, shape = array or (None, None)
    if (row.setdefault("shape", shape), row.setdefault("dtype", dtype)) != (shape, dtype):
        raise _MemberError(f"holds {dtype} {shape}, the index says {row['dtype']} {row['shape']}")
    if shape and len(shape) != AXES.get(row["member"], len(shape)):
        raise _MemberError(f"has the shape {shape}; must have {AXES[row['member']]} axes")


def _measure(tape: _Tape, size_bytes: int, is_array: bool) -> tuple[int, tuple[str, list[int]] | str | None]:
    """crc32 of the payload that comes next; dtype and shape of an array, or what is wrong with it."""
    piece = tape.read(min(size_bytes, NPY_HEAD_BYTES))
    left, crc32 = size_bytes - len(piece), zlib.crc32(piece)
    dtype, finite = np.dtype("u1"), True
    found: tuple[str, list[int]] | str | None = "is not an .npy array of floats" if is_array else None
    with suppress(CacheError):
        if is_array:
            dtype, shape, start = read_npy_header(piece, "")
            fits = start + math.prod(shape) * dtype.itemsize == size_bytes
            found = (dtype.name, shape) if fits else f"its header claims {dtype} {shape}, not its {size_bytes} bytes"
            piece = piece[start:]
    while True:
        whole = len(piece) - len(piece) % dtype.itemsize
        finite = finite and bool(np.isfinite(np.frombuffer(piece[:whole], dtype)).all())
        if not left:
            return crc32, found if finite else "holds NaN or infinity"
        rest = piece[whole:]
        piece = tape.read(min(left, PIECE_BYTES))
        left, crc32 = left - len(piece), zlib.crc32(piece, crc32)
        piece = rest + piece


def _check_keys(found: Part) -> None:
    """What no single member shows: a key without its array or tokens, or with a member twice."""
    main, seen = MEMBERS[found.store.kind], set()
    complete = {row["key"] for row in found.rows if row["member"] == main}
    for row in found.rows:
        place = row["key"], row["member"]
        if place in seen:
            found.blame(row, "is there twice")
        if row["key"] not in complete:
            found.blame(row, f"its key has no {main}")
        if found.store.kind == "embeddings" and not (type(row["tokens"]) is int and row["tokens"] >= 0):
            found.blame(row, "no count of tokens is known")
        seen.add(place)


def _walk(storage: Storage, path: str, size_bytes: int) -> Iterator[dict[str, Any]]:
    """The members of a tar by its own headers, as rows of an index, up to where these make no sense."""
    position = 0
    for _ in range(MAX_MEMBERS):
        if position + BLOCK > size_bytes:
            return
        try:
            header = tarfile.TarInfo.frombuf(storage.read_range(path, position, BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return
        key, _, member = header.name.partition(".")
        if not is_digest(key, KEY_BYTES) or not member.isprintable() or header.size <= 0:
            return
        place = {"offset": position + BLOCK, "size_bytes": header.size}
        yield {"key": bytes.fromhex(key), "member": member, **place, "tokens": None}
        position += BLOCK + -(-header.size // BLOCK) * BLOCK


def _count_tokens(storage: Storage, path: str, rows: list[dict[str, Any]]) -> None:
    """Put into the rows what each `KEY.json` of a tar of prompts says."""
    tokens = {}
    for row in rows:
        if row["member"] == "json" and "crc32" in row and row["size_bytes"] <= NPY_HEAD_BYTES:
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                tokens[row["key"]] = json.loads(storage.read_range(path, row["offset"], row["size_bytes"]))["tokens"]
    for row in rows:
        row["tokens"] = tokens.get(row["key"])
