"""Ranks that wait for the first one, asleep: by a file in the work folder that they share.

A collective of MLX works while it waits, and the stages before the training may take hours; and where the first
rank fails it only says that a connection was lost.
"""

from __future__ import annotations

import contextlib
import pathlib
import random
import time
from collections.abc import Iterator

import mlx.core as mx

from mlx_hiermem.errors import OutputError
from mlx_hiermem.learn.work import write_text

BEGUN, READY, FAILED = "begun", "ready", "failed"
PATIENCE = 60.0  # seconds until the first rank must have begun
NAP = 0.2


class Ranks:
    """All ranks of one command make one of these together, in the work folder `folder`."""

    def __init__(self, folder: pathlib.Path) -> None:
        group = mx.distributed.init()
        self.rank, self.count = group.rank(), group.size()
        # A number that no earlier command had, so that what it left is not taken for news.
        mine = random.randrange(1 << 20) if self.rank == 0 else 0
        run = int(mx.distributed.all_sum(mx.array(mine))) if self.count > 1 else mine
        self._file = folder / f"first-rank-{run}"

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What only the first rank does; the others go on when it is done, or stop when it failed."""
        if self.count == 1:
            yield
            return
        for old in self._file.parent.glob("first-rank-*"):
            old.unlink()
        write_text(self._file, BEGUN)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                write_text(self._file, FAILED)
            raise
        write_text(self._file, READY)

    def follow(self) -> None:
        """Waits for the first rank. Raises OutputError where it failed, or has another folder."""
        start = time.monotonic()
        while (said := self._said()) in ("", BEGUN):
            if not said and time.monotonic() - start > PATIENCE:
                raise OutputError(
                    f"the first rank has not begun in {self._file.parent}", "The ranks must share that folder."
                )
            time.sleep(NAP)
        if said == FAILED:
            raise OutputError("the first rank stopped", "Its own line says why.")

    def _said(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8")
        except OSError:
            return ""
