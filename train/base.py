"""The frozen base model of a run: which checkpoint it is, and what its dtypes are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.models import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.export import ExportConfig

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by --mixed_precision
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}


def open_base(
    config: TrainConfig | ExportConfig, made_with: Mapping[str, Any], weights: tuple[str, ...] = ("transformer",)
) -> Checkpoint:
    """The checkpoint that was asked for, else the one that a record names.

    Args:
        made_with: `name`, `revision` and `variant` of the record's; not read where another one is asked for.
        weights: as of `open_checkpoint`.

    Raises:
        ModelError: there is no such checkpoint.
    """
    asked = config.pretrained_model_name_or_path
    told = {} if asked else made_with  # a revision is one of its own checkpoint
    return open_checkpoint(
        asked or told["name"],
        revision=config.revision or told.get("revision"),
        variant=config.variant or told.get("variant"),
        cache_dir=config.cache_dir,
        weights=weights,
    )
