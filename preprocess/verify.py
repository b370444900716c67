"""`python -m preprocess.verify`: see `--help` and docs/cache_commands.md.

Stores first, part by part; then the data sets, whose keys must be in them; then what crashes left behind. With
`--repair` a bad part is made again at once, so that the data sets are compared with what is there afterwards.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from preprocess.inventory import (
    StoreFolder,
    leftovers,
    open_cache,
    pictures,
    prompt_entries,
    say,
    store_folders,
    versions,
)
from preprocess.parts import Part, check_part
from preprocess.repair import mend_part, restore_facts, stage_1_command
from shared.cache import MEMBERS, STRANDED_SECONDS, Cache, dead_writers
from shared.config import parse_config
from shared.console import Progress
from shared.dataset import MEMBER_KINDS, DataSet, location_columns, open_dataset, version_digest
from shared.errors import CacheError, UserError, run_command
from shared.pictures import read_picture
from shared.shards import FORMAT_VERSION, Location


@dataclass(frozen=True)
class VerifyConfig:
    """Compare a cache with its own digests and checksums. Exit status: 0 clean, 1 damaged or incomplete, 2 no cache."""

    cache: Positional[str]
    """The cache: a folder or a URL."""
    repair: bool = False
    """Make bad parts again of their good keys and drop the bad ones: the next stage-1 run encodes exactly those. Remove
    what crashes left behind. Exit status 0 when nothing damaged is left."""
    quick: bool = False
    """Read no payload: only whether files exist, their sizes, the indexes' digests and the tars' headers."""


@dataclass
class Held:
    """What a store holds: its parts, its keys, and the places where these lie."""

    parts: set[str] = field(default_factory=set)
    keys: set[bytes] = field(default_factory=set)
    places: set[bytes] = field(default_factory=set)


class Verification:
    """One look at a cache, told line by line.

    Args:
        writer: a writer's folder: repair; None: only tell.

    Attributes:
        damaged: lines of damage that is still there.
        bad_keys: that were found.
        missing: samples and prompts of data sets that no store holds.
        incomplete: the data sets that these are of.
    """

    def __init__(self, cache: Cache, writer: Path | None, *, quick: bool) -> None:
        self._cache, self._storage, self._writer, self._quick = cache, cache.storage, writer, quick
        self._held: dict[str, Held | None] = {}  # by folder of a store; None: of another version of the format
        self.parts = self.keys = self.size_bytes = self.versions = 0
        self.damaged = self.bad_keys = self.missing = 0
        self.incomplete: dict[str, DataSet] = {}
        self._pictures: set[str] = set()

    def _bad(self, *lines: str) -> None:
        self.damaged += len(lines)
        for line in lines:
            say(f"bad: {line}")

    def stores(self) -> None:
        """Look at every part of every store."""
        stores = [store for store in store_folders(self._cache) if self._is_ours(store)]
        parts = [(store, part) for store in stores for part in store.parts()]
        for store, name in Progress(parts, name="parts", unit="part"):
            found: Part | None
            found = check_part(store, name, quick=self._quick)
            self.bad_keys += len(found.bad)
            faults = list(found.faults())
            self._bad(*faults)
            if faults and self._writer:
                found = self._mend(found, self._writer)
            if found:
                self._hold(found)

    def _is_ours(self, store: StoreFolder) -> bool:
        """Whether a store is of this version of the format, as its fingerprint.json says."""
        self._held[store.folder] = Held()
        try:
            version = store.facts().get("format_version")
        except CacheError as error:
            self._bad(str(error))
            known = restore_facts(self._cache, store, self._writer) if self._writer else None
            if known:
                self.damaged -= 1
                say(f"mended: {store.folder}/fingerprint.json: written again as data set {known} knows it")
            return True
        if version != FORMAT_VERSION:
            say(f"skipped: {store.folder}: format version {version}; this program knows {FORMAT_VERSION}")
            self._held[store.folder] = None
        return version == FORMAT_VERSION

    def _mend(self, found: Part, writer: Path) -> Part | None:
        """Make a part again. Returns what was found of the new one; None: nothing of it was good."""
        name = mend_part(found, writer)
        self.damaged -= len(list(found.faults()))
        kept, path = len(found.good), f"{found.store.folder}/{found.name}"
        say(f"mended: {path}: kept {kept} keys" + (f" in {name}" if name else "") + f", dropped {len(found.bad)}")
        if name is None:
            return None
        again = check_part(found.store, name, quick=False)
        self._bad(*again.faults())
        return again

    def _hold(self, found: Part) -> None:
        held = self._held[found.store.folder]
        assert held is not None
        held.parts.add(found.name)
        self.parts += 1
        self.size_bytes += found.size_bytes
        for row in found.rows:
            if row["member"] == MEMBERS[found.store.kind]:
                held.keys.add(row["key"])
                self.keys += 1
                if "crc32" in row:
                    place = Location(found.name, row["offset"], row["size_bytes"], row["crc32"])
                    held.places.add(_pack(row["key"], place))

    def pictures(self) -> None:
        """Look whether each picture is the one that it is called after."""
        for path in pictures(self._storage):
            self._pictures.add(path)
            try:
                if not self._quick:
                    read_picture(self._storage, path)
            except CacheError as error:
                self._bad(str(error).removeprefix(f"{self._storage.url}/"))
                if self._writer:
                    self._storage.remove(path)
                    self._pictures.remove(path)
                    self.damaged -= 1
                    say(f"mended: {path}: removed; stage 1 puts it there again")

    def datasets(self) -> None:
        """Look at every version of every data set: its name, and whether the stores hold its keys."""
        for name in self._storage.names("datasets"):
            known = versions(self._cache, name)
            current = self._look_at_current(name, known)
            known.sort(key=lambda digest: digest != current)  # the command to run again is the current version's
            for digest in Progress(known, name=name, unit="version"):
                self.versions += 1
                try:
                    self._look_at_version(open_dataset(self._cache, name, digest))
                except UserError as error:
                    self._bad(str(error).removeprefix(f"{self._storage.url}/"))

    def _look_at_current(self, name: str, known: list[str]) -> str | None:
        path = f"datasets/{name}/CURRENT"
        try:
            size_bytes = self._storage.size(path)
            current = self._storage.read(path).decode(errors="replace").strip() if size_bytes < 100 else "a long text"
        except FileNotFoundError:
            if known:
                say(f"leftover: datasets/{name}: no version is current yet; run stage 1 again")
            return None
        except OSError as error:
            current = f"unreadable ({error.strerror})"
        if current not in known:
            self._bad(f"{path}: is {current!r}, which is no version of it; run stage 1 again")
        return current

    def _look_at_version(self, dataset: DataSet) -> None:
        keys = [f"{kind}_key" for kind in MEMBER_KINDS]
        places = [column for kind in MEMBER_KINDS for column in location_columns(kind)]

        def rows() -> Iterator[dict[str, Any]]:
            for row in dataset.rows("sample_id", "source", "bucket", "weight", *keys, *places):
                self._look_for(f"sample {row['sample_id']} ({row['source']})", dataset, row, MEMBER_KINDS)
                yield row

        for entry in prompt_entries(dataset):
            what = f"prompt {entry.get('effective_prompt')!r:.60}"
            self._look_for(what, dataset, entry, ("embedding",))
            if entry.get("image") is not None and entry["image"] not in self._pictures:
                self._miss(dataset, what, f"its picture {entry['image']}")
        try:
            digest = version_digest(dataset.info, rows())
        except (TypeError, ValueError) as error:
            digest = f"none ({error})"
        if digest != dataset.digest:
            self._bad(f"{dataset.folder}/samples.parquet: its digest is {digest}; run stage 1 again")

    def _look_for(self, what: str, dataset: DataSet, row: dict[str, Any], kinds: tuple[str, ...]) -> None:
        """Look for the members of one sample or prompt: their keys, and their places where the part is still there."""
        missing, moved = [], []
        for kind in kinds:
            key = row[f"{kind}_key"]
            if key is None:
                missing += [f"its {kind}"] if kind in ("latent", "embedding") else []
                continue
            held = self._held.get(dataset.store_folder(kind), Held())
            if held is None:
                continue
            if key not in held.keys:
                missing.append(f"{kind} {key.hex()}")
                continue
            values: list[Any] = [row.get(column) for column in location_columns(kind)]
            try:
                place = Location(*values)
                if place.part in held.parts and _pack(key, place) not in held.places:
                    moved.append(kind)
            except CacheError:
                moved.append(kind)
        if missing:
            self._miss(dataset, what, f"{', '.join(missing)} in no part")
        if moved:
            told = f"{dataset.name}, version {dataset.digest[:12]}, {what}: {', '.join(moved)}"
            self._bad(f"{told} not where the data set says; run stage 1 again")

    def _miss(self, dataset: DataSet, what: str, lacks: str) -> None:
        self.missing += 1
        self.incomplete.setdefault(dataset.name, dataset)
        say(f"missing: {dataset.name}, version {dataset.digest[:12]}, {what}: {lacks}; run stage 1 again")

    def sources(self) -> None:
        """Look whether stage 1 can read what it remembers of videos, which it can do without."""
        if self._quick:
            return
        from preprocess.sources import FILE, known_sources  # late: it knows the decoders

        try:
            for _ in known_sources(self._storage):
                pass
        except (CacheError, AttributeError, KeyError, TypeError, ValueError) as error:
            told = str(error) if isinstance(error, CacheError) else f"{FILE}: is not what stage 1 writes ({error})"
            self._bad(told.removeprefix(f"{self._storage.url}/"))
            if self._writer:
                self._storage.remove(FILE)
                self.damaged -= 1
                say(f"mended: {FILE}: removed; what it remembered is learnt again")

    def leftovers(self) -> None:
        """Tell what crashes left behind; with a writer remove what no living process can be at work on."""
        for path, what, is_ours in leftovers(self._storage):
            old = time.time() - self._storage.modified(path) > STRANDED_SECONDS
            say(f"leftover: {path}: {what}" + ("" if old or not is_ours else ", not yet an hour old"))
            if self._writer and is_ours and old:
                self._storage.remove(path)
                say(f"removed: {path}")

    def summary(self) -> Iterator[str]:
        """What was found in all, and what to run next."""
        url, megabytes = self._cache.url, self.size_bytes / 1e6
        yield f"looked at {self.parts} parts ({self.keys} keys, {megabytes:,.1f} MB) and {self.versions} versions"
        if self.damaged and self._writer:
            yield f"damaged: {self.damaged} lines above say what could not be mended, and what to do"
        elif self.damaged:
            yield f"damaged: {self.bad_keys} keys; run `python -m preprocess.verify {url} --repair`"
        for dataset in self.incomplete.values():
            yield f"incomplete: data set {dataset.name}; run again: {stage_1_command(dataset)}"
        if not self.damaged and not self.incomplete:
            yield "clean"


def _pack(key: bytes, place: Location) -> bytes:
    return struct.pack(">16s16sQQQ", key, bytes.fromhex(place.part), place.offset, place.size_bytes, place.crc32)


def main(argv: list[str]) -> int:
    """Verify a cache, and repair it where asked to."""
    config = parse_config(VerifyConfig, argv, "python -m preprocess.verify")
    cache = open_cache(config.cache)
    for folder in dead_writers(cache.storage.local("writers")) if cache.storage.is_local else ():
        say(f"leftover: writers/{folder.name}: of a writer that died")
    with cache.writer() if config.repair else nullcontext(None) as writer:  # a writer removes what the dead left
        look = Verification(cache, writer, quick=config.quick)
        try:
            for task in (look.stores, look.pictures, look.sources, look.datasets, look.leftovers):
                task()
        except OSError as error:
            raise CacheError(f"{cache.url}: {error}; mend the disk or the permissions first") from error
    for line in look.summary():
        say(line)
    return 1 if look.damaged or (look.missing and not config.repair) else 0


if __name__ == "__main__":
    run_command(main)
