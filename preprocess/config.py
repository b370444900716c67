"""What `python -m preprocess` can be told: one field a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.config import check_name
from shared.errors import ConfigError
from shared.geometry import Bucket, largest_frame_count
from shared.models import Facts

MAX_SHARD_SIZE = 100_000  # clips of a part: its index is read whole


@dataclass(frozen=True)
class PreprocessConfig:
    """Stage 1: videos and captions become a latent cache, made once and reused by every later run."""

    cache: str = "cache"
    """The cache: a folder, made when it is not there."""
    dataset: str = "default"
    """Name of the data set in the cache; publishing it again makes a new version."""

    pretrained_model_name_or_path: str = ""
    """Checkpoint whose VAE and T5 encode: a folder or a hub id such as THUDM/CogVideoX-2b."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""
    rehash: bool = False
    """Compute the digests of weight files again instead of trusting the remembered ones."""

    instance_data_root: str | None = None
    """Folder that the manifest's paths are relative to."""
    dataset_name: str | None = None
    """Manifest: a .csv, .tsv, .json, .jsonl or .parquet file, a folder, or a hub data set."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set."""
    caption_column: str = "caption"
    """Column of the captions; without --dataset_name a text file, a caption a line."""
    video_column: str = "video"
    """Column of the videos; without --dataset_name a text file, a path a line."""
    follow_links: bool = False
    """Take videos that are symbolic links out of the data root."""
    id_token: str | None = None
    """Put before each prompt, with one space."""

    height: int | None = None
    """Height in pixels, a multiple of 16; default: the checkpoint's own."""
    width: int | None = None
    """Width in pixels, a multiple of 16; default: the checkpoint's own."""
    max_num_frames: int | None = None
    """Most frames of a clip; default: the checkpoint's own. The largest 4k + 1 that a clip fills is taken."""
    min_num_frames: int = 9
    """Fewer frames are rejected as too_short."""
    buckets: str | None = None
    """In place of height, width and max_num_frames: shapes such as 49x480x720,49x720x480,25x480x720."""
    video_reshape_mode: Literal["center", "random", "none"] = "center"
    """Crop after resizing: center, random (seeded), or none (resize to the target; the aspect must fit)."""
    fps: str = "auto"
    """Frames taken a second: a number, auto (the checkpoint's own rate) or source (every frame)."""
    skip_frames_start: int = 0
    """Source frames to skip at the start."""
    skip_frames_end: int = 0
    """Source frames to skip at the end."""
    clips: Literal["head", "uniform", "chunk", "slide"] = "head"
    """Clips of each video or segment: its head; chunks in a row; a sliding window; as many as chunks, spread evenly."""
    clip_seconds: float | None = None
    """Length of a clip in seconds; default: what the most frames last at --fps."""
    clip_stride: float | None = None
    """Seconds from one clip's start to the next for slide; default: half a clip."""
    random_flip: float = 0.0
    """Probability of the mirrored clip at each visit in training; above 0 both are encoded."""

    image_variants: int = 4
    """Noised encodings of each first frame, for training to pick from; text-to-video checkpoints take none."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the VAE and T5 run in; auto: as their weights are stored (float16 on a CPU: float32)."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """What the cache stores."""
    enable_slicing: bool = False
    """Encode a batch clip by clip in the VAE: less memory, the same numbers."""
    enable_tiling: bool = False
    """Encode in overlapping tiles: much less memory, other numbers (recorded in the cache)."""
    tile: Literal["auto", "on", "off"] | None = None
    """Tiles: on, off, or auto (none if that fits into memory, else the largest that fit); default: --enable_tiling."""
    check_tiling: bool = False
    """Only compare some clips encoded in tiles and in one piece, and print what the tiles change."""
    vae_batch_size: int = 1
    """Clips of one shape that the VAE encodes together."""
    text_batch_size: int = 8
    """Prompts that T5 encodes together."""
    shard_size: int = 64
    """Clips a part of the cache holds at most."""
    dataloader_num_workers: int = 0
    """Decoding processes; 0: as many as the cores allow, at most 8."""
    decode_timeout: float = 120.0
    """Seconds that reading one clip may take before its decoder is killed and the clip rejected."""
    retry_rejected: bool = False
    """Try again the videos that could not be read in an earlier run."""
    strict: bool = False
    """Refuse to publish a data set from which any clip was rejected."""
    seed: int = 42
    """Seed of random crops."""

    validation_prompt: str | None = None
    """Prompts to encode for validation videos."""
    validation_prompt_separator: str = ":::"
    """What stands between validation prompts."""

    def __post_init__(self) -> None:
        check_name(self.dataset)
        if not self.pretrained_model_name_or_path:
            raise ConfigError("--pretrained_model_name_or_path is missing; give a folder or THUDM/CogVideoX-2b")
        for name in ("vae_batch_size", "text_batch_size", "shard_size", "min_num_frames", "image_variants"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1")
        if self.shard_size > MAX_SHARD_SIZE:
            raise ConfigError(f"--shard_size {self.shard_size}; must be at most {MAX_SHARD_SIZE}")
        for name in ("skip_frames_start", "skip_frames_end", "dataloader_num_workers"):
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
        if not self.decode_timeout > 0:
            raise ConfigError(f"--decode_timeout {self.decode_timeout}; must be above 0 seconds")
        if self.buckets is not None and (self.height, self.width, self.max_num_frames) != (None, None, None):
            raise ConfigError("--buckets stands in place of --height, --width and --max_num_frames; give one or other")
        if not self.validation_prompt_separator:
            raise ConfigError("--validation_prompt_separator is empty; give what stands between prompts, such as :::")
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
        self.shapes(facts)
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
        return [Bucket(most, self.height or native_height, self.width or native_width)], True

    def validation_prompts(self) -> list[str]:
        """The validation prompts, without empty ones."""
        texts = (self.validation_prompt or "").split(self.validation_prompt_separator)
        return [text.strip() for text in texts if text.strip()]
