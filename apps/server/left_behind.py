"""Threads that were still inside MLX when their engine was stopped, and how a process ends that has one.

Python unwinds such a thread by force when the interpreter ends, and C++ aborts over that (SIGABRT).
"""

from __future__ import annotations

import os
import sys
import threading

_threads: list[threading.Thread] = []


def leave_behind(thread: threading.Thread) -> None:
    """Notes a thread that nobody waits for any more."""
    _threads.append(thread)


def end_if_any(status: int) -> None:
    """Ends the process at once if such a thread still runs; else returns."""
    if any(thread.is_alive() for thread in _threads):
        sys.stdout.flush()
        os._exit(status)
