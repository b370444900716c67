"""`python -m shared.doctor`: whether this machine can run LatentReel, and the command that mends what is wrong.

It is for installations that are broken, so it needs the standard library alone, not even the parser of the other
commands. Each check runs in a child process: that may crash or hang, which is then told as a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from shared.codecs import check_av, check_decord
from shared.errors import ConfigError, ModelError, run_command
from shared.findings import FAULTS, Finding, import_status, reason_of
from shared.packages import ROOT, install_command, project, read_packages, release

CHILD_SECONDS = 180.0  # for a check in a child: torch may take minutes from a cold network disk
LEAST_DISK = 1 << 30  # bytes; below that nothing works
HUB_IDS = {  # by what a checkpoint's configs say: image-to-video, 1.5, RoPE
    (False, False, False): "THUDM/CogVideoX-2b",
    (False, False, True): "THUDM/CogVideoX-5b",
    (True, False, True): "THUDM/CogVideoX-5b-I2V",
    (False, True, True): "THUDM/CogVideoX1.5-5B",
    (True, True, True): "THUDM/CogVideoX1.5-5B-I2V",
}


# --- packages


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    least = project()["requires-python"].removeprefix(">=")
    version = ".".join(map(str, sys.version_info[:3]))
    if release(version) < release(least):
        mend = f"make -C {shlex.quote(str(ROOT))} clean demo PYTHON=python{least}"
        yield Finding("python", "wrong", f"{version}; must be {least} or newer", mend)
    else:
        yield Finding("python", "ok", f"{version}, {sys.executable}")


def check_packages() -> Iterator[Finding]:
    """What every stage needs, against the bounds of pyproject.toml and the tested set."""
    packages = read_packages(project()["dependencies"])
    for package in packages:
        if package.found is None:
            yield Finding(package.name, "missing", f"tested with {package.tested}", install_command([package]))
        elif package.is_too_old:
            detail = f"{package.found}; must be {package.least} or newer, tested with {package.tested}"
            yield Finding(package.name, "wrong", detail, install_command([package]))
    good = [package for package in packages if package.found and not package.is_too_old]
    others = [f"{one.name} {one.found} (tested {one.tested})" for one in good if one.is_untested]
    same = f"{len(good) - len(others)} of {len(packages)} as tested"
    if others:
        yield Finding("packages", "note", f"{same}; other releases: {', '.join(others)}")
    else:
        yield Finding("packages", "ok", same)


def check_extras() -> Iterator[Finding]:
    """What each extra lacks: nobody needs them all."""
    for extra, wanted in project()["optional-dependencies"].items():
        packages = read_packages(wanted)
        lacking = [package.name for package in packages if package.found is None]
        old = [f"{one.name} {one.found}, must be {one.least} or newer" for one in packages if one.is_too_old]
        if lacking or old:
            told = [f"lacks {', '.join(lacking)}"] * bool(lacking) + old
            how = f"{sys.executable} -m pip install -c {ROOT / 'constraints.txt'} '{ROOT}[{extra}]'"
            yield Finding(f"extra {extra}", "note", "; ".join(told), how)
        else:
            yield Finding(f"extra {extra}", "ok", f"{len(packages)} package{'s' * (len(packages) != 1)}")


# --- the machine


def check_gpu() -> Iterator[Finding]:
    """torch, the GPUs that it can use, their driver and free memory; each multiplies two matrices."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", import_status(error), reason_of(error), install_command(read_packages(["torch"])))
        return
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("gpu", "note", f"none; torch {torch.__version__} runs on the CPU, which is for trying things")
            return
        if torch.version.cuda is None and torch.version.hip is None:
            detail, mend = (
                f"torch {torch.__version__} is a CPU build",
                f"{install_command(read_packages(['torch']))} --force-reinstall",
            )
        else:
            detail, mend = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it", "nvidia-smi"
        yield Finding("gpu", "wrong", f"driver {driver} is there, but {detail}", mend)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        right = bool((ones @ ones == 64).all())
        name = f"{torch.cuda.get_device_name(index)}, {_size(free)} of {_size(total)} free"
        versions = f"driver {driver}, CUDA {torch.version.cuda}, torch {torch.__version__}"
        detail = f"{name}, {versions}" + ("" if right else "; it multiplies wrongly")
        yield Finding(f"gpu {index}", "ok" if right else "wrong", detail, None if right else "nvidia-smi -q")


def _driver() -> str | None:
    """The NVIDIA driver's version; None: there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "of unknown version" if Path("/dev/nvidiactl").exists() else None
    match = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text)
    return match[1] if match else "of unknown version"


def check_memory() -> Iterator[Finding]:
    """Free host memory, and free disk where models, temporary files and caches go."""
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        told = _size(int(available[1]) * 1024) if available else "not told"
    except OSError:  # not Linux
        told = "not told by this system"
    yield Finding("memory", "ok", f"{told} free, {os.cpu_count()} cores")
    hub = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = {"disk": Path.cwd(), "disk of models": Path(hub), "disk of $TMPDIR": Path(tempfile.gettempdir())}
    seen = set()
    for name, folder in places.items():
        while not folder.exists():
            folder = folder.parent
        usage, device = shutil.disk_usage(folder), folder.stat().st_dev
        if usage.free < LEAST_DISK:
            yield Finding(
                name,
                "wrong",
                f"{_size(usage.free)} free at {folder}",
                f"du -xsh {shlex.quote(str(folder))}/* | sort -h",
            )
        elif device not in seen:
            yield Finding(name, "ok", f"{_size(usage.free)} free at {folder}")
        seen.add(device)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):,.1f} GiB"


# --- a model


def check_model(name: str) -> Iterator[Finding]:
    """Whether a checkpoint is whole: every config, every weight file to its last byte, the tokenizer.

    Args:
        name: a folder, or a hub id, of which the hub's cache on this machine is looked at.
    """
    from shared.hub import is_hub_id
    from shared.models import CONFIG_FILES, WEIGHTS, Checkpoint, lacking_bytes, open_checkpoint

    folder, fetch = Path(name).expanduser(), f"--local-dir {shlex.quote(name)}"
    mend = f"hf download OWNER/NAME {fetch}"
    if not folder.is_dir() and is_hub_id(name):
        found, fetch, mend = _fetched(name), "", f"hf download {name}"
        if found is None:
            yield Finding("model", "missing", f"{name}: no such folder, and not in the hub's cache here", mend)
            return
        folder = found
    elif not folder.is_dir():
        yield Finding("model", "missing", f"{name}: no such folder", mend)
        return
    faults: list[str] = []

    def look(check: Callable[[], object]) -> None:
        try:
            check()
        except (ModelError, OSError) as error:
            faults.append(str(error))

    def weights(part: str) -> None:
        for path in checkpoint.weight_files(part):
            if lacking := lacking_bytes(path):
                faults.append(f"{path}: {'lacks' if lacking > 0 else 'has too many by'} {abs(lacking):,} bytes")

    look(lambda: open_checkpoint(str(folder), revision=None, variant=None, cache_dir=None, weights=()))
    checkpoint = Checkpoint(name, None, None, folder.absolute())  # the hub's files are links to blobs
    for part in CONFIG_FILES:
        look(lambda part=part: checkpoint.config(part))  # type: ignore[misc]
    for part in WEIGHTS:
        look(lambda part=part: weights(part))  # type: ignore[misc]
    if not any((checkpoint.folder / "tokenizer" / file).is_file() for file in ("spiece.model", "tokenizer.json")):
        faults.append(f"{checkpoint.folder / 'tokenizer'}: has neither spiece.model nor tokenizer.json")
    try:
        facts = checkpoint.facts
        hub_id = HUB_IDS.get((facts.image_to_video, facts.patch_size_t is not None, facts.rotary), "OWNER/NAME")
        kind, mend = facts.kind, f"hf download {hub_id} {fetch}" if fetch else mend
    except ModelError as error:
        kind = "no CogVideoX checkpoint"
        faults += [] if str(error) in faults else [str(error)]
    if faults:
        more = f"; and {len(faults) - 1} more" if faults[1:] else ""
        yield Finding("model", "wrong", f"{name}: {faults[0]}{more}", mend)
    else:
        yield Finding("model", "ok", f"{name}: {kind}, whole")


def _fetched(hub_id: str) -> Path | None:
    """The folder of the hub's cache that holds what was fetched of a repository, whole or not; None: nothing was."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


# --- the command

CHECKS: dict[str, Callable[..., Iterator[Finding]]] = {
    "python": check_python, "packages": check_packages, "memory": check_memory, "gpu": check_gpu, "av": check_av,
    "decord": check_decord, "model": check_model, "extras": check_extras,
}  # fmt: skip
PACKAGES = {"gpu": "torch", "av": "av", "decord": "decord2"}  # that a check is about


def findings(model: str | None) -> Iterator[Finding]:
    """What all checks find, one after the other, each in a process of its own, which may crash or hang."""
    for name in CHECKS:
        if name != "model" or model is not None:
            yield from _in_child(name, model)


def _in_child(name: str, model: str | None) -> list[Finding]:
    mend = f"make -C {shlex.quote(str(ROOT))} clean demo"
    if name in PACKAGES:
        mend = install_command(read_packages([PACKAGES[name]])) + " --force-reinstall"
    words = [sys.executable, "-m", "shared.doctor", "--only", name] + (["--model", model] if model else [])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # from whatever folder
    try:
        done = subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [Finding(name, "wrong", f"does not answer in {CHILD_SECONDS:g} s", mend)]
    if done.returncode != 0:
        said = re.findall(r"^[\w.]+: .*$", done.stderr, re.MULTILINE) or ["it said nothing"]
        return [Finding(name, "wrong", f"its process ended with status {done.returncode}: {said[-1]:.100}", mend)]
    return [Finding(**finding) for finding in json.loads(done.stdout.splitlines()[-1])]


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as all commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: list[str]) -> int:
    """Look at everything, tell it on one screen, and how to mend it."""
    parser = _Parser(
        prog="python -m shared.doctor",
        description="Tell whether this machine can run LatentReel, and the command that mends what is wrong. "
        "Exit status: 0 nothing is missing or wrong, 2 something is.",
    )
    parser.add_argument(
        "--model",
        metavar="CHECKPOINT",
        help="also tell whether this folder, or what was fetched of this hub id, is whole",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: findings, and whether all is well")
    parser.add_argument("--only", choices=CHECKS, help=argparse.SUPPRESS)  # the life of a child process
    options = parser.parse_args(argv)
    if options.only:
        arguments = [options.model] if options.only == "model" else []
        print("\n" + json.dumps([asdict(finding) for finding in CHECKS[options.only](*arguments)]))
        return 0
    found = []
    for finding in findings(options.model):
        found.append(finding)
        if not options.json:
            print(f"{finding.status:<8} {finding.name:<16} {finding.detail}", flush=True)
    faults = [finding for finding in found if finding.status in FAULTS]
    if options.json:
        print(json.dumps({"ok": not faults, "findings": [asdict(finding) for finding in found]}, indent=2))
        return 2 if faults else 0
    if any(finding.status == "note" and finding.name.startswith("extra ") for finding in found):
        print(f"\nextras are for those who use them: {sys.executable} -m pip install -c constraints.txt '.[NAME]'")
    if faults:
        print("\nto mend it:")
        for command in dict.fromkeys(finding.mend for finding in faults if finding.mend):
            print(f"    {command}")
    return 2 if faults else 0


if __name__ == "__main__":
    run_command(main)
