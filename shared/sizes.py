"""What a checkpoint takes of sizes, frame counts and dtypes: asked by every stage before it encodes or loads anything.

That frames are 4k + 1 and sides multiples of 16 is of all CogVideoX: `Bucket` sees to it. What differs is positions:

    2B, 5B            computed for any size and count
    1.5               a table: any count, and sides up to its end; diffusers fails deep inside beyond it
    5B-I2V            a learned table of one size and one count: another size fails in diffusers, and for another count
                      it silently takes positions that the checkpoint was never trained with
"""

from __future__ import annotations

from shared.errors import ConfigError
from shared.geometry import SIDE_MULTIPLE, SPATIAL_COMPRESSION, Bucket
from shared.models import Checkpoint, Facts


def exact_bucket(facts: Facts, *, drop_learned_positions: bool) -> Bucket | None:
    """The one shape that a checkpoint takes; None: it takes more than one."""
    if not facts.learned_positions or drop_learned_positions:
        return None
    sides = (side * SPATIAL_COMPRESSION for side in (facts.sample_height, facts.sample_width))
    return Bucket(facts.sample_frames, *sides)


def check_bucket(bucket: Bucket, facts: Facts, name: str, *, drop_learned_positions: bool) -> None:
    """Refuse a shape that the checkpoint cannot take, with the nearest that it can.

    Args:
        name: of the checkpoint, for the message.
        drop_learned_positions: whether the learned table is left out, as `--drop_learned_positions` has it.

    Raises:
        ConfigError: names the shape, what the checkpoint takes and what to give.
    """
    exact = exact_bucket(facts, drop_learned_positions=drop_learned_positions)
    if exact is not None and bucket != exact:
        raise ConfigError(
            f"size {bucket}: {name} is {facts.kind} and has learned positions for {exact} only; use {exact}, or leave "
            "them out with --drop_learned_positions in stages 1 and 2"
        )
    if facts.patch_size_t is None:
        return
    most = [side // facts.patch_size * SIDE_MULTIPLE for side in (facts.sample_height, facts.sample_width)]
    nearest = Bucket(bucket.frames, min(bucket.height, most[0]), min(bucket.width, most[1]))
    if bucket != nearest:
        raise ConfigError(
            f"size {bucket}: {name} is {facts.kind} and has positions for {most[0]} x {most[1]} pixels at most; "
            f"use {nearest}"
        )


def check_learned_positions(facts: Facts, name: str, *, drop_learned_positions: bool) -> None:
    """Refuse to drop a table that is not there.

    Raises:
        ConfigError: as said.
    """
    if drop_learned_positions and not facts.learned_positions:
        raise ConfigError(
            f"--drop_learned_positions: {name} is {facts.kind} and has no learned positions; leave the flag out"
        )


def check_dtype(checkpoint: Checkpoint, part: str, dtype: str, flag: str, *, allowed: bool) -> None:
    """Refuse to run in float16 what was trained in bfloat16: its values can be larger than float16 holds.

    Args:
        dtype: that the part is to run in, such as `float16`.
        flag: that asked for it, with its value, for the message.
        allowed: by `--allow_dtype`.

    Raises:
        ConfigError: as said.
    """
    if dtype == "float16" and not allowed and checkpoint.stored_dtype(part) == "bfloat16":
        raise ConfigError(
            f"{flag}: the {part} of {checkpoint.name} is stored in bfloat16, whose values float16 may not hold; leave "
            "it out, or give --allow_dtype"
        )
