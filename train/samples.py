"""The samples of a data set, in compact columns: what each is called, its bucket, and where its members lie.

samples.parquet is read once, in pieces of its columns that training needs. A sample takes 21 bytes, and 32 for each
kind of member that the data set has: the text of names and keys would take many times that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import KEY_BYTES
from shared.dataset import DataSet, location_columns
from shared.errors import CacheError
from shared.models import Facts
from shared.shards import Location, value_bytes
from train.draws import draw_bool, draw_timestep

KINDS = ("latent", "mirrored", "embedding")  # of the members that training reads, whatever the checkpoint
_FACTS = ("part", "offset", "size_bytes", "crc32")  # of a place; parts by number, from 1 on
_NONE = 0  # in place of a part's number: the sample has no such member
_DIGITS = np.full(256, 16, np.uint8)  # the value of each hex digit by its character; 16: none
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def kinds_for(facts: Facts) -> tuple[str, ...]:
    """The kinds of members that training a checkpoint reads."""
    return (*KINDS, "image") if facts.image_to_video else KINDS


@dataclass(frozen=True)
class Request:
    """One place of a global batch: what to read for it and what its draws depend on."""

    step: int
    place: int
    weight: float  # 0 for a stand-in where no sample fills the place
    sample_id: str
    latent_key: bytes
    latent: Location
    embedding_key: bytes
    embedding: Location
    bucket: str  # the shape of the clip
    dataset: int = 0  # which of the run's it is of
    image_key: bytes | None = None  # the first frame, several times with noise; None: text-to-video
    image: Location | None = None

    @property
    def reads(self) -> int:
        """How many members are read for it."""
        return 2 if self.image is None else 3


@dataclass(frozen=True)
class DrawSettings:
    """What the draws of a run depend on, beside step and place."""

    seed: int
    global_batch: int
    stratified: bool
    random_flip: float
    caption_dropout: float
    noised_image_dropout: float = 0.0

    def timestep(self, step: int, place: int) -> int:
        """The timestep of a place of a step."""
        return draw_timestep(self.seed, step, place, self.global_batch, stratified=self.stratified)


class Samples:
    """The rows of a data set that training needs, by sample number: N of them.

    Args:
        kinds: of the members that are asked for; those that no sample has take nothing.

    Attributes:
        fps: frames a second, the median.
        bucket_names: sorted.
        buckets: [N] each sample's bucket, as its place in bucket_names; in the smallest type that holds it.
        weights: [N] float32, as the manifest gives them.

    Raises:
        CacheError: samples.parquet is damaged, or a name in it cannot be one.
    """

    def __init__(self, dataset: DataSet, kinds: tuple[str, ...] = KINDS) -> None:
        count = dataset.num_rows
        self._ids = np.empty((count, KEY_BYTES), np.uint8)
        self.weights = np.empty(count, np.float32)
        self._members = {kind: _Members(kind, count) for kind in kinds}
        columns = [name for kind in kinds for name in (f"{kind}_key", *location_columns(kind))]
        names, buckets, fps = _Names(), np.empty(count, np.uint16), np.empty(count)
        start = 0
        for batch in dataset.batches("sample_id", "bucket", "fps", "weight", *columns):
            rows = slice(start, start + len(batch))
            fps[rows] = batch["fps"].to_numpy(zero_copy_only=False)
            self.weights[rows] = batch["weight"].to_numpy(zero_copy_only=False)
            try:
                self._ids[rows] = _hex_bytes(batch["sample_id"])
                buckets = _put(buckets, rows, names.numbers(batch["bucket"]))
                for member in self._members.values():
                    member.put(rows, batch)
            except ValueError as error:
                path = dataset.cache.storage.full(f"{dataset.folder}/samples.parquet")
                raise CacheError(f"{path}: rows {start} to {rows.stop - 1}: {error}; run stage 1 again") from error
            start = rows.stop
        told = names.known
        self.bucket_names: list[str] = sorted(told)
        ranks = np.argsort(np.argsort(told))  # bucket numbers follow their names, not the order of the rows
        self.buckets = ranks.astype(np.min_scalar_type(max(len(told) - 1, 0)))[buckets]
        self.fps = float(np.median(fps, overwrite_input=True))
        empty = dataset.info["empty_prompt"]
        place = Location(*(empty[column] for column in location_columns("embedding")))
        self._empty = (bytes.fromhex(empty["embedding_key"]), place)

    def __len__(self) -> int:
        return len(self.buckets)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return (
            self._ids.nbytes
            + self.weights.nbytes
            + self.buckets.nbytes
            + sum(member.nbytes for member in self._members.values())
        )

    def sample_id(self, number: int) -> str:
        """The stable name of a sample."""
        return self._ids[number].tobytes().hex()

    def keys(self, kind: str) -> np.ndarray:
        """The keys [N, KEY_BYTES] uint8 of a kind of member that every sample has."""
        return self._members[kind].keys

    def has(self, number: int, kind: str) -> bool:
        """Whether a sample has a member of this kind."""
        return number in self._members[kind]

    def member(self, number: int, kind: str) -> tuple[bytes, Location]:
        """The key of a sample's member, and where it lies.

        Raises:
            CacheError: the sample has none, or its place cannot be.
        """
        if not self.has(number, kind):
            raise CacheError(f"sample {self.sample_id(number)}: has no {kind}; run stage 1 again")
        return self._members[kind][number]

    def request(self, number: int, step: int, place: int, weight: float, draws: DrawSettings) -> Request:
        """What to read for a sample at a place, with its mirror image and caption drawn."""
        seed, flip = draws.seed, draws.random_flip
        mirrored = self.has(number, "mirrored") and draw_bool(seed, step, place, "mirror", flip)
        latent = self.member(number, "mirrored" if mirrored else "latent")
        dropped = draw_bool(seed, step, place, "caption_dropout", draws.caption_dropout)
        embedding = self._empty if dropped else self.member(number, "embedding")
        bucket = self.bucket_names[self.buckets[number]]
        image = self.member(number, "image") if "image" in self._members else (None, None)
        return Request(step, place, weight, self.sample_id(number), *latent, *embedding, bucket, 0, *image)


class _Members:
    """Keys and places of one kind of member, by sample number; nothing is set aside before a sample has one.

    Args:
        count: of the samples.
    """

    def __init__(self, kind: str, count: int) -> None:
        self._kind, self._count = kind, count
        self._parts = _Names()
        self._keys: np.ndarray | None = None
        self._facts: list[np.ndarray] = []  # in the order of _FACTS

    def put(self, rows: slice, batch: pa.RecordBatch) -> None:
        """Take the rows of a batch."""
        keys = batch[f"{self._kind}_key"]
        if keys.null_count == len(keys):
            return
        if self._keys is None:
            self._keys = np.zeros((self._count, KEY_BYTES), np.uint8)
            self._facts = [np.zeros(self._count, np.uint32) for _ in _FACTS]
        self._keys[rows] = np.frombuffer(value_bytes(keys), np.uint8).reshape(-1, KEY_BYTES)
        there = keys.is_valid().to_numpy(zero_copy_only=False)
        part, *facts = (batch[name] for name in location_columns(self._kind))
        numbers = [self._parts.numbers(part) + 1, *(_integers(fact) for fact in facts)]
        for place, values in enumerate(numbers):  # a place that cannot be stays one: Location refuses it when asked for
            self._facts[place] = _put(self._facts[place], rows, np.where(there, values, _NONE))

    @property
    def keys(self) -> np.ndarray:
        """[N, KEY_BYTES] uint8."""
        assert self._keys is not None
        return self._keys

    def __contains__(self, number: int) -> bool:
        return self._keys is not None and self._facts[0][number] != _NONE

    def __getitem__(self, number: int) -> tuple[bytes, Location]:
        assert self._keys is not None
        part, *facts = (int(fact[number]) for fact in self._facts)
        return self._keys[number].tobytes(), Location(self._parts.known[part - 1], *facts)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return sum(fact.nbytes for fact in self._facts) + (0 if self._keys is None else self._keys.nbytes)


class _Names:
    """Names that repeat, numbered from 0 on in the order in which they came.

    Attributes:
        known: the names by number.
    """

    def __init__(self) -> None:
        self.known: list[str] = []
        self._numbers: dict[str, int] = {}

    def numbers(self, names: pa.Array) -> np.ndarray:
        """The number of each name [N]; a null is numbered as the empty name.

        Raises:
            ValueError: one is not UTF-8.
        """
        encoded = names.fill_null("").dictionary_encode()
        there = encoded.dictionary.to_pylist()  # few beside N: what follows each other lies together
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in there]
        self.known += islice(self._numbers, len(self.known), None)
        return np.array(numbers, np.int64)[encoded.indices.to_numpy()]


def _integers(column: pa.Array) -> np.ndarray:
    """The values as int64; -1 for a null."""
    return column.cast(pa.int64()).fill_null(-1).to_numpy()


def _put(column: np.ndarray, rows: slice, values: np.ndarray) -> np.ndarray:
    """The column with these rows filled in: itself, or a wider one when its type cannot hold a value."""
    if len(values) and not 0 <= values.min() <= values.max() <= np.iinfo(column.dtype).max:
        column = column.astype(np.int64)
    column[rows] = values
    return column


def _hex_bytes(names: pa.Array) -> np.ndarray:
    """The bytes [N, KEY_BYTES] that names spell in hex.

    Raises:
        ValueError: one is null, of another length, or has other digits.
    """
    digits, wrong = 2 * KEY_BYTES, ValueError(f"a sample_id is not of {2 * KEY_BYTES} hex digits")
    if names.null_count or not pc.all(pc.equal(pc.binary_length(names), digits)).as_py():
        raise wrong
    values = _DIGITS[np.frombuffer(value_bytes(names), np.uint8).reshape(-1, digits)]
    if (values > 15).any():
        raise wrong
    return values[:, ::2] << 4 | values[:, 1::2]
