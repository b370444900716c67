"""What `python -m preprocess` can be told: one field a flag."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from preprocess.data_flags import DataFlags
from shared.config import check_name
from shared.errors import ConfigError
from shared.geometry import Bucket, largest_frame_count
from shared.models import Facts
from shared.prompt_file import PromptRow
from shared.sizes import check_bucket, check_learned_positions, exact_bucket
from shared.validation import check_row, check_validation_flags, rows_of_flags, with_images

MAX_SHARD_SIZE = 100_000  # clips of a part: its index is read whole


@dataclass(frozen=True)
class PreprocessConfig(DataFlags):
    """Stage 1: videos and captions become a latent cache, made once and reused by every later run."""

    DATA: ClassVar[str] = "Data: videos and captions"
    id_token: str | None = None
    """Put before each prompt, with one space."""

    CACHE: ClassVar[str] = "Cache"
    cache: str = "cache"
    """The cache: a folder, made when it is not there."""
    dataset: str = "default"
    """Name of the data set in the cache; publishing it again makes a new version."""

    MODEL: ClassVar[str] = "Model"
    pretrained_model_name_or_path: str = ""
    """Checkpoint whose VAE and T5 encode: a folder or a hub id such as THUDM/CogVideoX-2b."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    rehash: bool = False
    """Compute the digests of weight files again instead of trusting the remembered ones."""

    SIZE: ClassVar[str] = "Size, frames and clips"
    height: int | None = None
    """Height in pixels, a multiple of 16; default: the checkpoint's own."""
    width: int | None = None
    """Width in pixels, a multiple of 16; default: the checkpoint's own."""
    drop_learned_positions: bool = False
    """5B-I2V: take other sizes and counts than its learned positions fit; stage 2 must leave them out, too."""
    max_num_frames: int | None = None
    """Most frames of a clip, of which the largest 4k + 1 is taken that it fills; default: the checkpoint's own."""
    min_num_frames: int = 9
    """Fewer frames are rejected as too_short; at least 1."""
    buckets: str | None = None
    """In place of height, width and max_num_frames: shapes such as 49x480x720,49x720x480,25x480x720."""
    video_reshape_mode: Literal["center", "random", "none"] = "center"
    """Crop after resizing: center, random (seeded), or none (resize to the target; the aspect must fit)."""
    fps: str = "auto"
    """Frames taken a second: a number, auto (the checkpoint's own rate) or source (every frame)."""
    skip_frames_start: int = 0
    """Source frames to skip at the start, at least 0."""
    skip_frames_end: int = 0
    """Source frames to skip at the end, at least 0."""
    clips: Literal["head", "uniform", "chunk", "slide"] = "head"
    """Clips of each video or segment: its head; chunks in a row; a sliding window; as many as chunks, spread evenly."""
    clip_seconds: float | None = None
    """Length of a clip in seconds, above 0; default: what the most frames last at --fps."""
    clip_stride: float | None = None
    """Seconds, above 0, from one clip's start to the next for slide; default: half a clip."""
    random_flip: float = 0.0
    """Probability, 0 to 1, of the mirrored clip at each visit in training; above 0 both are encoded."""

    IMAGES: ClassVar[str] = "Image-to-video"
    image_variants: int = 4
    """Noised encodings of each first frame, at least 1, to train on; text-to-video checkpoints take none."""

    MEMORY: ClassVar[str] = "Precision and memory"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the VAE and T5 run in; auto: as their weights are stored (float16 on a CPU: float32)."""
    allow_dtype: bool = False
    """Run a checkpoint that is stored in bfloat16 in float16, whose largest number is 65504, all the same."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """What the cache stores."""
    enable_slicing: bool = False
    """Encode a batch clip by clip in the VAE: less memory, the same numbers."""
    enable_tiling: bool = False
    """Encode in overlapping tiles: much less memory, other numbers (recorded in the cache)."""
    tile: Literal["auto", "on", "off"] | None = None
    """Tiles: on, off, or auto (none if that fits into memory, else the largest that fit); default: --enable_tiling."""
    LOOK: ClassVar[str] = "Look before a run"
    plan: bool = False
    """Only tell what a run would do: clips, buckets, what is missing, bytes, time. Nothing is written."""
    check_tiling: bool = False
    """Only compare some clips encoded in tiles and in one piece, and print what the tiles change."""
    WORK: ClassVar[str] = "Batches, processes and machines"
    vae_batch_size: int = 1
    """Clips of one shape that the VAE encodes together, at least 1."""
    text_batch_size: int = 8
    """Prompts that T5 encodes together, at least 1."""
    shard_size: int = 64
    """Clips a part of the cache holds at most, 1 to 100000."""
    retry_rejected: bool = False
    """Try again the videos that could not be read in an earlier run."""
    num_workers: int = 1
    """Processes, on whatever machines, that share this run's clips, at least 1; each is told --worker_index."""
    worker_index: int = 0
    """Which of the --num_workers this one is, at least 0 and below it."""
    engine: Literal["local", "ray"] = "local"
    """Who encodes: this process, or actors of a Ray cluster, one a GPU (extra `ray`; docs/ray.md)."""
    ray_address: str | None = None
    """The Ray cluster: HOST:PORT, ray://HOST:PORT or auto; default: RAY_ADDRESS, else a Ray of this machine alone."""
    RESULT: ClassVar[str] = "Data set"
    strict: bool = False
    """Refuse to publish a data set from which any clip was rejected."""
    seed: int = 42
    """Seed of random crops, any whole number."""

    VALIDATION: ClassVar[str] = "Validation"
    validation_prompt: str | None = None
    """Prompts to encode for validation videos."""
    validation_prompts: str | None = None
    """In place of --validation_prompt: a .txt, .csv or .jsonl file, a row a video, with size, frames, seed, image."""
    validation_prompt_separator: str = ":::"
    """What stands between validation prompts, and between validation images."""
    validation_images: str | None = None
    """Image-to-video: pictures that these videos start from, kept in the cache; one for all prompts, or one each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.dataset)
        if not self.pretrained_model_name_or_path:
            raise ConfigError("--pretrained_model_name_or_path is missing; give a folder or THUDM/CogVideoX-2b")
        for name in ("vae_batch_size", "text_batch_size", "shard_size", "min_num_frames", "image_variants"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1")
        if self.shard_size > MAX_SHARD_SIZE:
            raise ConfigError(f"--shard_size {self.shard_size}; must be at most {MAX_SHARD_SIZE}")
        if self.num_workers < 1:
            raise ConfigError(f"--num_workers {self.num_workers}; must be at least 1")
        if not 0 <= self.worker_index < self.num_workers:
            raise ConfigError(
                f"--worker_index {self.worker_index}; must be from 0 to {self.num_workers - 1}, as --num_workers is "
                f"{self.num_workers}"
            )
        if self.ray_address is not None and self.engine != "ray":
            raise ConfigError(f"--ray_address {self.ray_address}: is of --engine ray; this is {self.engine}")
        if self.engine == "ray" and self.num_workers > 1:
            raise ConfigError(
                f"--engine ray with --num_workers {self.num_workers}: one driver shares the clips among the cluster's "
                "nodes; leave out --num_workers"
            )
        if self.plan and self.check_tiling:
            raise ConfigError("--plan with --check_tiling: each is a look of its own; give one of them")
        if self.engine == "ray" and self.tile == "auto":
            raise ConfigError("--tile auto with --engine ray: the nodes' memory is not this machine's; give on or off")
        for name in ("skip_frames_start", "skip_frames_end"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)}; must not be negative")
        if self.enable_tiling and self.tile not in (None, "on"):
            raise ConfigError(f"--tile {self.tile}: says other than --enable_tiling, which means on; leave one out")
        if not 0 <= self.random_flip <= 1:
            raise ConfigError(f"--random_flip {self.random_flip}; must be a probability, 0 to 1")
        for name in ("clip_seconds", "clip_stride"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name} {value}; must be above 0 seconds")
        if self.clip_stride is not None and self.clips != "slide":
            raise ConfigError(f"--clip_stride {self.clip_stride:g}: is of --clips slide; this is {self.clips}")
        if self.buckets is not None and (self.height, self.width, self.max_num_frames) != (None, None, None):
            raise ConfigError("--buckets stands in place of --height, --width and --max_num_frames; give one or other")
        check_validation_flags(self.validation_prompt, self.validation_prompts, self.validation_prompt_separator)
        self.frame_rate(8)

    def frame_rate(self, native_fps: float) -> float | None:
        """Frames taken a second; None takes every frame of the source."""
        if self.fps == "source":
            return None
        try:
            rate = float(native_fps if self.fps == "auto" else self.fps)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < float("inf"):
            raise ConfigError(f"--fps {self.fps}; must be a number above 0, auto or source")
        return rate

    def check(self, facts: Facts) -> None:
        """Compare what was asked for with what the checkpoint can take.

        Raises:
            ConfigError: a size, or a combination, that it cannot.
        """
        name, dropped = self.pretrained_model_name_or_path, self.drop_learned_positions
        check_learned_positions(facts, name, drop_learned_positions=dropped)
        for shape in self.shapes(facts)[0]:
            check_bucket(shape, facts, name, drop_learned_positions=dropped)
        for row in self.validation_rows:
            check_row(row, self.shapes(facts)[0][0], facts, name, drop_learned_positions=dropped)
        if self.random_flip and facts.image_to_video:
            raise ConfigError(
                f"--random_flip {self.random_flip:g}: the checkpoint is {facts.kind}, and a mirrored clip would need a "
                "mirrored first frame, which a cache does not hold; leave it out"
            )

    def shapes(self, facts: Facts) -> tuple[list[Bucket], bool]:
        """The buckets to bring clips to, and whether a clip that is too short for one may take fewer frames."""
        if self.buckets is not None:
            shapes = [Bucket.parse(text) for text in self.buckets.split(",") if text.strip()]
            if not shapes:
                raise ConfigError(f"--buckets {self.buckets!r}: names none; give shapes such as 49x480x720")
            return shapes, False
        native_height, native_width = facts.native_size
        most = largest_frame_count(self.max_num_frames or facts.sample_frames)
        if most < self.min_num_frames:
            raise ConfigError(f"--max_num_frames gives {most}; must be at least --min_num_frames {self.min_num_frames}")
        may_be_shorter = exact_bucket(facts, drop_learned_positions=self.drop_learned_positions) is None
        return [Bucket(most, self.height or native_height, self.width or native_width)], may_be_shorter

    @cached_property
    def validation_rows(self) -> list[PromptRow]:
        """The validation videos that training is to make; their file is read once.

        Raises:
            ConfigError: of the file or the pictures, as `shared.validation` has it.
        """
        separator = self.validation_prompt_separator
        rows = rows_of_flags(self.validation_prompt, self.validation_prompts, separator) or []
        return with_images(rows, self.validation_images, separator)
