"""The actors of a run on a Ray cluster: one a GPU, or some CPUs each; lost ones are replaced, and others do their work.

The cluster may change while the run lasts. Its size is looked at again and again, and one actor more than it has room
for is asked for, which starts when a node joins (and has an autoscaler bring one). No actor is restarted by Ray, and no
call repeated: a unit whose actor is lost comes back here, as some of it may be published.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from preprocess.actor import Answer
from shared.console import warn
from shared.errors import ConfigError, UserError

# Before Ray is imported, which reads them once: it tells nobody of its use, and says nothing of actors that wait.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")

import ray
from ray import exceptions

CODE = ("preprocess", "shared")  # what the nodes get of the checkout: it is not installed anywhere
MOST_CPUS = 8  # of an actor without a GPU: for torch, and its children
IN_FLIGHT = 2  # units of an actor: one at the encoder, the next one being decoded
TRIES = 4  # actors that a unit may lose before it is blamed
LOOK_SECONDS = 5.0  # between looks at the size of the cluster
ROOM_SECONDS = 30.0  # without any actor, until that is told
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 10.0  # for actors to clean up
LOST = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,
)

T = TypeVar("T")
Split = tuple[list[T], list[T], Answer]  # what is missing of a unit; what is not; and what that was


@dataclass(eq=False)
class Unit:
    """Prompts or clips that one actor encodes.

    Attributes:
        lost: actors that were lost with it.
    """

    items: list[Any]
    lost: int = 0


@dataclass(eq=False)
class Member:
    """An actor.

    Attributes:
        node: it runs on; None: it has yet to start.
        units: that it has, by the reference of their answers.
    """

    actor: Any
    opening: Any
    node: str | None = None
    units: dict[Any, Unit] = field(default_factory=dict)


class Crew:
    """Actors of a class, as many as the cluster has room for.

    Args:
        address: `--ray_address`.
        worker: the actors' class, with `open`, which returns the node's name, `close`, and methods that take a unit's
            items and return an Answer.
        arguments: of the class.
    """

    def __init__(self, address: str | None, worker: type, *arguments: Any) -> None:
        self._address, self._worker, self._arguments = address, worker, arguments
        self._members: list[Member] = []
        self._failed_starts = 0  # in a row

    def __enter__(self) -> Crew:
        _connect(self._address)
        self._needs = _needs(ray.nodes())
        self._class = ray.remote(max_restarts=0, max_concurrency=IN_FLIGHT + 1, **self._needs)(self._worker)
        return self

    def __exit__(self, *_: object) -> None:
        try:  # those at work too, when the driver is told to stop: their children and unfinished files go
            closing = [member.actor.close.remote() for member in self._members if member.node]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        finally:
            ray.shutdown()

    def work(
        self, method: str, units: Iterable[list[T]], count: int, split: Callable[[list[T]], Split[T]]
    ) -> Iterator[tuple[list[T], Answer]]:
        """Have units done. Yields the items that are done, and what became of them; in no order.

        Args:
            method: of the actors.
            count: of units.
            split: tells what of a unit is missing in the cache, when its actor is lost.

        Raises:
            UserError: that an actor raised; or a unit has lost its actor TRIES times, or as many in a row cannot start.
        """
        todo, waiting, given, finished = iter(units), deque[Unit](), 0, 0
        idle_since = time.monotonic()
        while finished < count:
            self._hire(count - finished)
            while member := self._free_member(count - given + len(waiting)):
                if not waiting:
                    waiting.append(Unit(next(todo)))
                    given += 1
                unit = waiting.popleft()
                member.units[getattr(member.actor, method).remote(unit.items)] = unit
            pending = [call for member in self._members for call in (member.units if member.node else [member.opening])]
            done, _ = ray.wait(pending, timeout=LOOK_SECONDS)
            if any(member.node for member in self._members):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > ROOM_SECONDS:
                warn(f"the cluster has no room yet for an actor that needs {_listed(self._needs)}; see `ray status`")
                idle_since = time.monotonic()
            for call in done:
                for items, answer, lost in self._take(call, split):
                    waiting.extend(lost)
                    finished += not lost
                    yield items, answer

    def _take(self, call: Any, split: Callable[[list[T]], Split[T]]) -> Iterator[tuple[list[T], Answer, list[Unit]]]:
        """What a call that has ended brings: items that are done, their answer, and units that are to be done again."""
        member = next((one for one in self._members if call == one.opening or call in one.units), None)
        if member is None:  # its actor was lost with another call of this look
            return
        try:
            answer = _get(call)
        except LOST as error:
            self._members.remove(member)
            ray.kill(member.actor)  # it may only be out of reach
            self._tell_lost(member, error)
            for unit in member.units.values():
                yield from self._again(unit, error, split)
            return
        if member.node is None:
            member.node = answer
            self._failed_starts = 0
        else:
            yield member.units.pop(call).items, answer, []

    def _again(
        self, unit: Unit, error: Exception, split: Callable[[list[T]], Split[T]]
    ) -> Iterator[tuple[list[T], Answer, list[Unit]]]:
        missing, found, answer = split(unit.items)
        if missing:
            unit.items, unit.lost = missing, unit.lost + 1
            if unit.lost == TRIES:
                raise UserError(
                    f"a unit of {len(missing)} lost its actor {TRIES} times, at last as {_reason(error)}; see the "
                    "node's memory and Ray's logs, and run the same command again: what was published stays"
                )
        yield found, answer, [unit] if missing else []

    def _tell_lost(self, member: Member, error: Exception) -> None:
        if member.node is not None:
            warn(f"lost an actor on {member.node} with {len(member.units)} units: {_reason(error)}")
            return
        self._failed_starts += 1
        if self._failed_starts == TRIES:
            raise UserError(f"--engine ray: actors do not start: {_reason(error)}; see Ray's logs")

    def _hire(self, units: int) -> None:
        """Ask for actors: for the room that there is and one more, but for no more than there are units."""
        started = sum(member.node is not None for member in self._members)
        wanted = min(max(_room(ray.nodes(), self._needs), started) + 1, units)
        while len(self._members) < wanted:
            actor = self._class.remote(*self._arguments)
            self._members.append(Member(actor, actor.open.remote()))

    def _free_member(self, units: int) -> Member | None:
        """Who takes the next of so many units: whoever has fewest; nobody a second one that another may take first."""
        members = [member for member in self._members if member.node is not None]
        if not units or not members:
            return None
        member = min(members, key=lambda member: len(member.units))
        spare = units > sum(not one.units for one in self._members)
        return member if not member.units or (spare and len(member.units) < IN_FLIGHT) else None


def _connect(address: str | None) -> None:
    """Join a cluster, or start a Ray on this machine; its nodes get the code of this checkout.

    Raises:
        ConfigError: there is no cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    _check_address(address)
    with tempfile.TemporaryDirectory() as folder:
        code = _pack_code(Path(folder, "latentreel.zip"))
        try:
            ray.init(address, runtime_env={"working_dir": str(code)}, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError, exceptions.RayError) as error:
            if address == "local":
                raise
            raise _unreachable(address, error) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in ours.items():  # Ray's own would end the run with another status
            signal.signal(number, handler)


def _check_address(address: str) -> None:
    """Refuse a host and port where nobody listens; Ray would try for minutes.

    Raises:
        ConfigError: so it is.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--ray_address {address}: no cluster can be reached there ({_reason(error)}); start one with "
        "`ray start --head`, see docs/ray.md"
    )


def _pack_code(path: Path) -> Path:
    """Write the modules that actors import to a zip file: 140 KB, and a new one only where the code is."""
    root = Path(__file__).resolve().parents[1]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for module in sorted(module for name in CODE for module in (root / name).glob("*.py")):
            entry = zipfile.ZipInfo(str(module.relative_to(root)))  # without its time: Ray names the file by its bytes
            entry.external_attr = 0o644 << 16
            file.writestr(entry, module.read_bytes(), zipfile.ZIP_DEFLATED)
    return path


def _needs(nodes: list[dict[str, Any]]) -> dict[str, float]:
    """What an actor asks for: a GPU where the cluster has any, else MOST_CPUS, or all of the largest node's."""
    living = [node["Resources"] for node in nodes if node["Alive"]]
    if any(resources.get("GPU", 0) >= 1 for resources in living):
        return {"num_gpus": 1, "num_cpus": 0}
    return {"num_cpus": min(max((int(resources.get("CPU", 0)) for resources in living), default=1) or 1, MOST_CPUS)}


def _room(nodes: list[dict[str, Any]], needs: dict[str, float]) -> int:
    """How many actors the living nodes can hold, if nothing else runs there."""
    name, each = ("GPU", needs["num_gpus"]) if "num_gpus" in needs else ("CPU", needs["num_cpus"])
    return sum(int(node["Resources"].get(name, 0) // each) for node in nodes if node["Alive"])


def _get(call: Any) -> Any:
    """The result of a call that has ended; mistakes of the user are raised as themselves."""
    try:
        return ray.get(call)
    except exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError | OSError):  # a full disk is told in one line too
            raise cause from error
        raise
    except exceptions.RuntimeEnvSetupError as error:
        raise UserError(f"--engine ray: a node cannot be given the code: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error says, in one line; without the ids that Ray tells on lines of their own."""
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return " ".join(" ".join(lines).split())[:500]


def _listed(needs: dict[str, float]) -> str:
    return " and ".join(f"{value:g} {name.removeprefix('num_').upper()}" for name, value in needs.items() if value)
