"""Several processes that train together: their launcher, and waiting for the one that writes files.

Collectives have a time-out (--nccl_timeout), and what the main process does alone may take longer: a slow disk, a
tracker behind a slow network, videos. So the other ranks wait for it outside of any collective, on the process group's
store, as long as it takes. A main process that dies is the launcher's to notice: it ends the other ranks.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import CheckpointError, ConfigError
from shared.processes import die_with_parent

if TYPE_CHECKING:
    from accelerate import Accelerator

POLL_S = 0.05
DONE, FAILED = b"done", b"failed"


def launcher() -> str | None:
    """What started this process: torchrun (also by way of `accelerate launch`), accelerate (one process), or None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or not parent.exists():
        return None
    words = parent.read_bytes().split(b"\0")
    return "accelerate" if {b"launch", b"accelerate.commands.launch"} & set(words) else None


def die_with_launcher() -> None:
    """Do not outlive a launcher that was killed: an orphan would hold the device and the output folder.

    torchrun waits for its processes to save; accelerate, with one process, is gone at the first Ctrl-C. A run that a
    shell started goes on when the shell is closed.
    """
    started_by = launcher()
    if started_by:
        die_with_parent(signal.SIGKILL if started_by == "torchrun" else signal.SIGTERM)


def check_strategy() -> None:
    """Refuse what accelerate can be configured to do and this trainer cannot: see docs/many_gpus.md.

    Raises:
        ConfigError: FSDP or DeepSpeed.
    """
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"accelerate's distributed_type {name}; must be MULTI_GPU (DDP): take configs/accelerate/ddp.yaml"
            )


def check_processes(accelerator: Accelerator) -> None:
    """Refuse processes that do not know of each other: each would train by itself, into the same folder.

    Raises:
        ConfigError: the launcher started more processes than accelerate sees.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started and accelerate sees {accelerator.num_processes}: it finds no GPU; to "
            "train on the CPU set ACCELERATE_USE_CPU=true"
        )


@contextmanager
def main_at_work(accelerator: Accelerator, what: str) -> Iterator[None]:
    """All ranks enter; the main one does something alone, and the others leave when it has left.

    Args:
        what: unique in a run.

    Raises:
        SystemExit: on the other ranks, when the main one has failed: it is the one that says why.
    """
    store = _store()
    if store is None:
        yield
        return
    if accelerator.is_main_process:
        try:
            yield
        except BaseException:
            store.set(f"latentreel/{what}", FAILED)
            raise
        store.set(f"latentreel/{what}", DONE)
        return
    yield
    if _wait_for(store, what) == FAILED:
        raise SystemExit(2)


def check_same_start(
    accelerator: Accelerator, output_dir: os.PathLike[str], step: int, position: dict[str, Any]
) -> None:
    """Refuse ranks that go on from another step than the main one, or from other facts: nothing would tell later.

    Args:
        position: what a checkpoint would have to agree on; of the base model only its path may differ.

    Raises:
        CheckpointError: they see another folder of that name; names both steps.
        ConfigError: names what differs first.
    """
    store = _store()
    if store is None:
        return
    if accelerator.is_main_process:
        store.set("latentreel/start", json.dumps({"step": step, "position": position}))
        return
    told = json.loads(_wait_for(store, "start"))
    main_step = told["step"]
    if step != main_step:
        raise CheckpointError(
            f"--output_dir {output_dir}: process {accelerator.process_index} goes on from step {step}, the main one "
            f"from step {main_step}; give a folder that all machines of the run share"
        )
    for name, value in json.loads(json.dumps(position)).items():
        theirs = told["position"].get(name)
        if value != theirs and name != "base_model":
            raise ConfigError(
                f"{name}: is {value!r} on process {accelerator.process_index} and {theirs!r} on the main one; give all "
                "processes of the run the same flags and the same version of the data set"
            )


def _store() -> Any | None:
    """The process group's key-value store, which the launcher or the main process serves; None without a group."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.distributed_c10d._get_default_store()


def _wait_for(store: Any, what: str) -> bytes:
    """What the main process set, once it has: asked for again and again, as the store's own wait has a time-out."""
    while not store.check([f"latentreel/{what}"]):
        time.sleep(POLL_S)
    return bytes(store.get(f"latentreel/{what}"))
