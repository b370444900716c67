"""Making again what is bad in a cache, of what can be proven good: new files first, then the bad ones go."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np

from preprocess.config import PreprocessConfig
from preprocess.inventory import StoreFolder, dataset_names, is_digest, versions
from preprocess.parts import Part
from shared.cache import KEY_BYTES, Cache
from shared.dataset import DataSet, open_dataset
from shared.errors import CacheError
from shared.shards import Location, ShardWriter, decode_array, read_member, write_index
from shared.storage import canonical_json, digest_of


def mend_part(found: Part, writer: Path) -> str | None:
    """Make a bad part again of its good keys: the new part first, then the bad index goes, then the bad tar.

    Args:
        writer: the writer's folder, where the new part is built.

    Returns:
        The new part's name, which is the old one where only the index, or bytes of the tar that are no member's,
        were bad; None: nothing was good.
    """
    store, storage, name = found.store, found.store.storage, None
    index = f"{store.folder}/{found.name}.parquet"
    if found.index_fault and found.rows and not found.bad and not found.tar_fault:  # the tar is as it was published
        facts = {"part": found.name, "tar_sha256": found.sha256, "tar_size_bytes": found.size_bytes}
        write_index(writer / f"{found.name}.parquet", found.rows, facts)
        storage.publish(writer / f"{found.name}.parquet", index)
        return found.name
    if found.good:
        name = _publish_good(found, writer)
    if name != found.name:
        storage.remove(index)
        if is_digest(found.name, KEY_BYTES):
            storage.remove(f"{store.folder}/{found.name}.tar")
    return name


def _publish_good(found: Part, writer: Path) -> str:
    """Publish a new part of the good keys. Returns its name."""
    store, storage = found.store, found.store.storage
    shard = ShardWriter(writer)
    try:
        for key, rows in found.good.items():
            members: dict[str, np.ndarray | bytes] = {}
            for row in rows:
                place = Location(found.name, row["offset"], row["size_bytes"], row["crc32"])
                payload = read_member(storage, store.folder, place)
                is_array = row["shape"] is not None
                members[row["member"]] = decode_array(payload, key.hex()) if is_array else payload
            shard.add(key, members, tokens=rows[0]["tokens"])
        finished = shard.finish()
    except BaseException:
        shard.abandon()
        raise
    storage.publish(finished.tar, f"{store.folder}/{finished.part}.tar")
    storage.publish(finished.index, f"{store.folder}/{finished.part}.parquet")
    return finished.part


def restore_facts(cache: Cache, store: StoreFolder, writer: Path) -> str | None:
    """Write a store's fingerprint.json as a data set knows it. Returns the data set's name; None: none knows it."""
    for name in dataset_names(cache):
        for digest in versions(cache, name):
            try:
                told = open_dataset(cache, name, digest).info.get("facts")
            except CacheError:
                continue  # the data sets are looked at in their turn
            facts = told.get(store.kind) if isinstance(told, dict) else None
            if isinstance(facts, dict) and digest_of(facts, KEY_BYTES).hex() == store.fingerprint:
                cache.storage.write(f"{store.folder}/fingerprint.json", canonical_json(facts), writer)
                return name
    return None


def stage_1_command(dataset: DataSet) -> str:
    """The command that makes a data set's missing samples again: as stage 1 was told, in this cache."""
    told = dataset.info.get("config")
    config = told if isinstance(told, dict) else {}
    words = ["python -m preprocess", f"--cache {shlex.quote(dataset.cache.url)}"]
    for flag in fields(PreprocessConfig):
        value = config.get(flag.name, flag.default)
        if flag.name == "cache" or value == flag.default:
            continue
        words.append(f"--{flag.name}" if value is True else f"--{flag.name} {shlex.quote(str(value))}")
    return " ".join(words)
