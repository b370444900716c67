"""What each record of the manifest becomes: frames, bucket, crop and keys; or the reason why it cannot be used."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from preprocess.config import PreprocessConfig
from preprocess.frames import Placement, choose_bucket, choose_frames, place, split_segment
from preprocess.manifest import Record
from preprocess.probe import Probe
from preprocess.sources import Source
from preprocess.video import PIXELS_VERSION
from shared.cache import embedding_key, image_key, latent_key
from shared.errors import VideoError
from shared.geometry import Bucket
from shared.models import Facts
from shared.prompts import caption_prompt
from shared.seeds import seed_for


@dataclass(frozen=True)
class Sample:
    """A clip that can be used: which frames and pixels of its source, and the keys of what they become."""

    record: Record
    prompt: str  # the effective one
    probe: Probe
    fps: float
    frame_indices: list[int]
    bucket: Bucket
    placement: Placement
    latent_key: bytes
    mirrored_key: bytes | None
    embedding_key: bytes
    image_key: bytes | None  # of the first frame, for image-to-video

    def row(self) -> dict[str, Any]:
        """The sample's row in samples.parquet, but for sample_id, tokens and the places of members."""
        box = {name: getattr(self.placement, name) for name in ("top", "left", "height", "width")}
        return {
            "caption": self.record.caption,
            "effective_prompt": self.prompt,
            "weight": self.record.weight,
            "source": self.record.source,
            "start_s": self.record.start_s,
            "end_s": self.record.end_s,
            "frame_indices": self.frame_indices,
            "source_fps": self.probe.fps,
            "fps": self.fps,
            "source_height": self.probe.height,
            "source_width": self.probe.width,
            "crop": box,
            "frames": self.bucket.frames,
            "height": self.bucket.height,
            "width": self.bucket.width,
            "bucket": str(self.bucket),
            "latent_key": self.latent_key,
            "mirrored_key": self.mirrored_key,
            "image_key": self.image_key,
            "embedding_key": self.embedding_key,
        }

    def versions(self) -> Iterator[tuple[bytes, Placement]]:
        """The keys to encode, each with its placement: the plain clip and, where asked for, its mirror image."""
        yield self.latent_key, self.placement
        if self.mirrored_key is not None:
            yield self.mirrored_key, replace(self.placement, mirrored=True)


@dataclass(frozen=True)
class Rejected:
    """A clip left out, with its reason (a key of REJECTION_REASONS)."""

    record: Record
    reason: str
    detail: str

    def row(self) -> dict[str, Any]:
        """The clip's row in rejected.parquet."""
        return {
            "source": self.record.source,
            "caption": self.record.caption,
            "reason": self.reason,
            "detail": self.detail,
        }


def refusal(samples: int, rejected: int, first: Rejected) -> str:
    """Why no data set is published."""
    which = f"{rejected} of {samples + rejected} clips were rejected" if samples else (
        f"all {rejected} clips were rejected"
    )  # fmt: skip
    return (
        f"{which}, the first {first.record.origin} {first.record.source}: {first.reason} ({first.detail}); "
        "no data set was published; mend or remove them" + (", or leave out --strict" if samples else "")
    )


def plan_record(whole: Record, source: Source, config: PreprocessConfig, facts: Facts) -> Iterator[Sample | Rejected]:
    """The clips that a record becomes, or why there is none, in the order of their times."""
    try:
        clips = _clips(whole, source.require_probe(), config, facts)
    except VideoError as error:
        yield Rejected(whole, error.reason, error.detail)
        return
    for record in clips:
        try:
            yield _plan_sample(record, source, config, facts)
        except VideoError as error:
            yield Rejected(record, error.reason, error.detail)


def _clips(record: Record, probe: Probe, config: PreprocessConfig, facts: Facts) -> list[Record]:
    """The clips that a record's video or segment is made into: records of their own, with the same caption."""
    if config.clips == "head" and config.clip_seconds is None:
        return [record]
    shapes, _ = config.shapes(facts)
    fps = config.frame_rate(facts.native_fps) or probe.fps
    if not fps:  # a single frame that does not tell how long it lasts
        return [record]
    clip_s = config.clip_seconds or max(shape.frames for shape in shapes) / fps
    times, start_s = probe.times, record.start_s or 0.0
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    end_s = min(record.end_s or float("inf"), float(times[-1] - times[0]) + interval)
    clips = split_segment(end_s - start_s, config.clips, clip_s, config.clip_stride or clip_s / 2)
    return [replace(record, start_s=round(start_s + a, 6), end_s=round(min(start_s + b, end_s), 6)) for a, b in clips]


def _plan_sample(record: Record, source: Source, config: PreprocessConfig, facts: Facts) -> Sample:
    probe = source.require_probe()
    fps = config.frame_rate(facts.native_fps)
    shapes, may_be_shorter = config.shapes(facts)

    def choose(most: int) -> list[int]:
        return choose_frames(
            probe.times,
            fps,
            skip_start=config.skip_frames_start,
            skip_end=config.skip_frames_end,
            max_frames=most,
            min_frames=config.min_num_frames,
            start_s=record.start_s,
            end_s=record.end_s,
        )

    indices = choose(max(shape.frames for shape in shapes))
    if may_be_shorter:
        (shape,) = shapes
        bucket = Bucket(len(indices), shape.height, shape.width)
    else:
        bucket = choose_bucket(shapes, probe.height, probe.width, len(indices))
        indices = choose(bucket.frames)
    rng = random.Random(seed_for(config.seed, source.digest, str(record.start_s), str(record.end_s), "crop"))
    placement = place(probe.height, probe.width, bucket.height, bucket.width, config.video_reshape_mode, rng)
    prompt = caption_prompt(record.caption, config.id_token)
    mirrored = config.random_flip > 0
    return Sample(
        record=record,
        prompt=prompt,
        probe=probe,
        fps=fps or probe.fps,
        frame_indices=indices,
        bucket=bucket,
        placement=placement,
        latent_key=latent_key(source.digest, indices, asdict(placement), PIXELS_VERSION),
        mirrored_key=latent_key(source.digest, indices, asdict(replace(placement, mirrored=True)), PIXELS_VERSION)
        if mirrored
        else None,
        embedding_key=embedding_key(prompt),
        image_key=image_key(source.digest, indices[0], asdict(placement), PIXELS_VERSION)
        if facts.image_to_video
        else None,
    )
