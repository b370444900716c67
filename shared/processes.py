"""Processes that another one started: whose signals they answer, and that they end with it."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process once the thread that started it is gone. Linux only; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def ignore_stop_signals() -> None:
    """Leave Ctrl-C and SIGTERM, which reach a whole group of processes, to the parent: it says when work ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
