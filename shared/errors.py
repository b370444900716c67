"""The tree of mistakes a user can fix, and the exit status each command gives.

    UserError            printed as one line, exit status 2
    ├── ConfigError      a flag or a key of a TOML file
    ├── ManifestError    a line of a manifest: the caption, the path, the count
    ├── ModelError       a model folder that is incomplete, or not what was expected
    ├── CacheError       a cache, shard, index or data set that is missing, damaged or foreign
    │   └── NetworkError a remote one that does not answer, or refuses: nothing is known of what lies there
    ├── CheckpointError  a training checkpoint that is torn, foreign or in use
    ├── LoraError        a LoRA file that does not fit
    ├── HubError         the hub does not answer, or refuses: what was to be sent is still here
    └── VideoError       one clip that cannot be used: stage 1 records its reason and goes on

Anything else that is raised is a defect of ours and keeps its traceback (exit status 1).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from shared import console

REJECTION_REASONS = {
    "unreadable": "the file cannot be opened as a video, or its frames cannot be decoded",
    "no_video_stream": "the file holds no video stream",
    "too_short": "the clip has fewer frames than --min_num_frames, or than the bucket of its shape, at this rate",
    "low_frame_rate": "the source is slower than --fps: more than 25 % of the frames would be repeats",
    "over_reports_frames": "the file promises frames that it does not hold",
    "aspect_differs": "--video_reshape_mode none, and the aspect differs from the bucket's by more than 1 %",
    "timed_out": "decoding took longer than --decode_timeout",
    "decoder_crashed": "the decoder killed its process",
    "non_finite": "the VAE's encoding holds NaN or infinity",
}


# Libraries that PEFT and diffusers import where they are installed, used or not, and that then warn of lacking what
# another machine would have, such as compiled kernels.
NOISY = (
    "torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "diffusers.quantizers.torchao.torchao_quantizer",
)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what, the value, what it must be, what to do."""


class ConfigError(UserError):
    """A flag, or a key of a TOML file, that cannot be used."""


class ManifestError(UserError):
    """A manifest that cannot be read as one caption per video."""


class ModelError(UserError):
    """A model folder that is incomplete, or not the kind of model that was expected."""


class CacheError(UserError):
    """A cache, shard, index or data set that is missing, damaged or made for another model."""


class NetworkError(CacheError):
    """A remote cache that does not answer, or refuses: nothing is known of what lies there."""


class CheckpointError(UserError):
    """A training checkpoint that is torn, foreign or in use."""


class LoraError(UserError):
    """A LoRA file that does not fit the model, or is no LoRA."""


class HubError(UserError):
    """The hub does not answer, or refuses: what was to be sent to it is still here."""


class VideoError(UserError):
    """One clip that cannot be used.

    Args:
        reason: a key of REJECTION_REASONS.
        detail: what was found, with its values.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REJECTION_REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def run_command(main: Callable[[list[str]], int], argv: list[str] | None = None) -> None:
    """Run a command's main and leave the process with its status: a UserError is one line on stderr and status 2.

    `--debug`, or `LATENTREEL_DEBUG=1`, prints the traceback of a UserError before that line.
    """
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        debug = console.terminal().debug or os.environ.get("LATENTREEL_DEBUG") == "1"
        console.fail(" ".join(str(error).split()), traceback.format_exc() if debug else None)
        status = 2
    except KeyboardInterrupt:
        console.warn("by Ctrl-C: what is complete stays", "stopped")
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # `python -m ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if not console.terminal().log_json:
            raise
        console.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
        status = 1
    sys.exit(status)
