"""What `kills.py` runs in processes of their own: a command that is ended, a reader of what that leaves."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torture.commands import run
from torture.disk import fail

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")
LONGEST = 900.0  # seconds that a command may take here
CONTEXT = multiprocessing.get_context("fork")  # the hub's thread waits meanwhile


def child(
    work: pathlib.Path,
    words: list[str],
    log: pathlib.Path,
    dies_at: int = 0,
    trace: pathlib.Path | None = None,
    fault: tuple[str, int] | None = None,
) -> None:
    """Runs a command, and kills itself before change `dies_at`, or writes the stage of each change to `trace`."""
    _say_to(log)
    seen = list[str]()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            seen.append(_stage(work) if trace else "")
            if len(seen) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if dies_at or trace:
        sys.addaudithook(count)
    if fault:
        fail(work, *fault)
    try:
        run(work, words)
    finally:
        if trace:
            trace.write_text(json.dumps(list(seen)))


def _stage(work: pathlib.Path) -> str:
    """Where a run of learning is, by its own account."""
    for file in work.glob("*.learn/status.json"):
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(file.read_text())["stage"])
    return ""


def prepare(start: Callable[[pathlib.Path], object], work: pathlib.Path, log: pathlib.Path) -> None:
    _say_to(log)
    start(work)


def _say_to(log: pathlib.Path) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)


def look(bank: pathlib.Path, whole: bool, said: pathlib.Path) -> None:
    """Uses a bank as a reader does: routes, and reads blocks with their digests. Writes what is wrong."""
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.bank.check import check

    wrong = list[str]()
    try:
        opened = MemoryBank.open(bank)
        for route in opened.tree.route(np.random.default_rng(0).standard_normal((20, 384)), opened.policy.blocked):
            for node in opened.nodes_on(route.path):
                opened.read(node)
        wrong += list(check(opened)) if whole else []
    except BaseException as error:
        wrong.append(f"{type(error).__name__}: {error}")
    said.write_text("; ".join(wrong))


def process(target: Callable[..., None], *arguments: Any, after: float = LONGEST) -> tuple[int, float]:
    """(exit status, seconds); SIGKILL comes `after` so many."""
    begun = time.monotonic()
    one = CONTEXT.Process(target=target, args=arguments)
    one.start()
    one.join(after)
    if one.is_alive():
        one.kill()
        one.join()
    return one.exitcode or 0, time.monotonic() - begun
