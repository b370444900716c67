"""An actor of `--engine ray`: what encodes on one GPU, or on some CPUs, of one of the cluster's nodes.

It has what a run of its own has: an encoder (T5 or the VAE, never both), decoding children, a writer's folder, and
stores, which it checks to be the driver's. It publishes each unit before it answers. What goes to and fro is plain:
texts and jobs to it, counts and reasons back; frames and what becomes of them leave its node for the cache alone.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from preprocess.clips import DecodeAhead
from preprocess.config import PreprocessConfig
from preprocess.data_flags import decoders_for
from preprocess.decode import DecodePool
from preprocess.prepare import open_model, open_stores
from preprocess.publish import Stores
from preprocess.spool import Job
from preprocess.units import Failure, Made, Units
from shared.cache import Cache
from shared.errors import ModelError


@dataclass(frozen=True)
class Answer:
    """What became of a unit.

    Attributes:
        failures: latent key, reason and detail of each clip that could not be read or encoded.
    """

    made: Made
    failures: list[tuple[bytes, str, str]] = field(default_factory=list)


class Encoder:
    """Encodes units and publishes them.

    Calls may overlap: while one unit is at the encoder the clips of the next are decoded, and `close` may come at any
    time.

    Args:
        config: of the run, its paths absolute.
        facts: of the driver's stores, by kind.
        alone: prompts that are encoded by themselves.
    """

    def __init__(
        self, config: PreprocessConfig, facts: dict[str, dict[str, Any] | None], alone: frozenset[str]
    ) -> None:
        self._config, self._facts, self._alone_prompts = config, facts, alone
        self._alone = threading.Lock()  # held by the unit that is at the encoder

    def open(self) -> str:
        """Open the checkpoint, the stores and a writer's folder. Returns the node's name.

        Raises:
            UserError: this node does not have what the driver has.
        """
        node = socket.gethostname()
        decoders = self._config.dataloader_num_workers or decoders_for(_cpus())
        config = replace(self._config, dataloader_num_workers=decoders)
        checkpoint, cache = open_model(config), Cache(config.cache)
        with ExitStack() as held:
            writer = held.enter_context(cache.writer())
            stores = open_stores(cache, checkpoint, config)
            _check_stores(node, stores, self._facts)
            self._pool = held.enter_context(DecodePool(config.decoders, config.decode_timeout))
            self._units = Units(stores, checkpoint, config, writer, self._alone_prompts)
            self._held = held.pop_all()
        return node

    def encode_prompts(self, prompts: list[tuple[bytes, str]]) -> Answer:
        """Encode prompts, each with its key."""

        def encode() -> list[Failure]:
            self._units.encode_prompts(prompts, len(prompts))
            return []

        return self._unit(encode)

    def encode_clips(self, jobs: list[Job]) -> Answer:
        """Encode clips."""
        with DecodeAhead(iter(jobs), self._pool) as ahead:  # decoded while the unit before is at the encoder
            return self._unit(lambda: list(self._units.encode_clips(ahead, len(jobs))))

    def close(self) -> None:
        """Kill the children, give up what is not published, and remove the writer's folder."""
        self._pool.close()
        with self._alone:
            self._held.close()

    def _unit(self, encode: Callable[[], list[Failure]]) -> Answer:
        with self._alone:
            self._units.made = Made()
            failures = encode()
            told = [(job.sample.latent_key, error.reason, error.detail) for job, error in failures]
            return Answer(self._units.made, told)


def _check_stores(node: str, stores: Stores, facts: dict[str, dict[str, Any] | None]) -> None:
    """Refuse to encode under other fingerprints than the driver's.

    Raises:
        ModelError: what differs: another checkpoint under the same name, or a dtype that was chosen for another device.
    """
    for kind, wanted in facts.items():
        store = getattr(stores, kind)
        here = store.facts if store else {}
        different = sorted(name for name in {*here, *(wanted or {})} if here.get(name) != (wanted or {}).get(name))
        if "dtype" in different:
            raise ModelError(
                f"{node}: --dtype auto means {here.get('dtype')} for the {kind} on this node and "
                f"{(wanted or {}).get('dtype')} where the driver runs; give --dtype float32, bfloat16 or float16"
            )
        if different:
            raise ModelError(
                f"{node}: the {kind} of its checkpoint differ from the driver's in {', '.join(different)}; "
                "--pretrained_model_name_or_path must name the same files on each node"
            )


def _cpus() -> int:
    """The CPUs that Ray gave this actor; beside a GPU, which is asked for alone, its share of the node's."""
    import ray

    context = ray.get_runtime_context()
    assigned = context.get_assigned_resources()
    if assigned.get("CPU"):
        return int(assigned["CPU"])
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return int(node["Resources"].get("CPU", 1) // max(node["Resources"].get("GPU", 1), 1))
