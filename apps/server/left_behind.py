"""How a process ends in which an engine has run: at once, without taking the interpreter apart.

A thread may still be inside MLX then: the engine's, if it was stopped in the middle of a step, or one of MLX's own.
Python unwinds such a thread by force when the interpreter ends, and C++ aborts over that (SIGABRT; some
servers on a slow disk ended so when they were stopped).
"""

from __future__ import annotations

import logging
import os
import sys
import threading

_threads: list[threading.Thread] = []
_served = threading.Event()


def leave_behind(thread: threading.Thread) -> None:
    """Notes a thread that nobody waits for any more."""
    _threads.append(thread)


def has_served() -> None:
    """Notes that this process was a server, and has nothing left to do."""
    _served.set()


def end_if_any(status: int) -> None:
    """Ends the process at once if it was a server, or if such a thread still runs; else returns."""
    if _served.is_set() or any(thread.is_alive() for thread in _threads):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
