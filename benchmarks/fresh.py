"""A function in a process of its own: what it returns, and the most memory that the whole process took."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import json, resource, sys
from benchmarks.{module} import {function}
told = {function}(*sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps(dict(told, peak_gib=1024 * used.ru_maxrss / 2**30, cpu_s=used.ru_utime + used.ru_stime)))
"""


def in_fresh_process(module: str, function: str, *arguments: object) -> dict[str, Any]:
    """What a function of a benchmark tells, with `peak_gib`, `cpu_s` and `whole_s` of its process, imports included.

    The caller must be small itself: on Linux the peak of a process counts from its parent's at the fork.

    Args:
        arguments: given as words.
    """
    started = time.perf_counter()
    words = [sys.executable, "-c", CODE.format(module=module, function=function), *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {**json.loads(done.stdout), "whole_s": time.perf_counter() - started}
