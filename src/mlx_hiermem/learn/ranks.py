"""Several processes learn together: the ranks of one command, and work in parts, a file each, that they share.

Every rank goes through the parts and makes those that are neither there nor being made by another one. A file's
lock says so. The system lets go of it when a process ends, however it ends, so nothing waits for a dead rank. What
a killed run has made stays.
"""

from __future__ import annotations

import contextlib
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import mlx.core as mx

from mlx_hiermem.errors import OutputError
from mlx_hiermem.learn.work import write_text
from mlx_hiermem.locks import try_lock

FIRST_RANK = "first-rank"  # how the file's name begins by which the first rank speaks to the others
BEGUN, READY, FAILED = "begun", "ready", "failed"  # what it says
PATIENCE = 60.0  # seconds until the first rank must have begun
NAP = 0.2  # seconds between looks at the file, or at what other ranks make
T = TypeVar("T")


class Ranks:
    """The ranks of one command. The first works alone until the training, unless it asks the others to help.

    The others wait, asleep, for a file in the work folder, which they share: a collective of MLX keeps a core busy
    while it waits, the stages before the training may take hours, and where the first rank fails a collective only
    says that a connection was lost. All ranks make one of these together.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        group = mx.distributed.init()
        self.rank, self.count = group.rank(), group.size()
        # A number that no earlier command had, so that what it left is not taken for news.
        mine = random.randrange(1 << 20) if self.rank == 0 else 0
        run = int(mx.distributed.all_sum(mx.array(mine))) if self.count > 1 else mine
        self._file = folder / f"{FIRST_RANK}-{run}"

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What only the first rank does; the others go on when it is done, or stop when it failed."""
        if self.count == 1:
            yield
            return
        for old in self._file.parent.glob(f"{FIRST_RANK}-*"):
            old.unlink()
        write_text(self._file, BEGUN)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, OutputError):
                write_text(self._file, FAILED)
            raise
        write_text(self._file, READY)

    @contextlib.contextmanager
    def sharing(self, stage: str) -> Iterator[None]:
        """Within `leading`: what the others help with meanwhile. All must be done when the block ends."""
        if self.count > 1:
            write_text(self._file, stage)
        yield
        if self.count > 1:
            write_text(self._file, BEGUN)

    def follow(self, help_with: Mapping[str, Callable[[Callable[[], bool]], None]]) -> None:
        """Waits for the first rank, and helps with the stages that it shares, each once; `help_with` says how.

        A helper is given a function that says whether its help is still wanted. Raises OutputError where the first
        rank failed, or has another folder.
        """
        start, left = time.monotonic(), dict(help_with)
        while (said := self._said()) not in (READY, FAILED):
            if not said and time.monotonic() - start > PATIENCE:
                raise OutputError(
                    f"the first rank has not begun in {self._file.parent}", "The ranks must share that folder."
                )
            if helping := left.pop(said, None):
                helping(lambda stage=said: self._said() == stage)  # type: ignore[misc]
            time.sleep(NAP)
        if said == FAILED:
            raise OutputError("the first rank stopped", "Its own line says why.")

    def _said(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8")
        except OSError:
            return ""


# Work in parts


def make_parts(
    name: Callable[[int], pathlib.Path],
    parts: Callable[[], Iterable[T]],
    make: Callable[[T, pathlib.Path], None],
    there: Callable[[T], None] = lambda part: None,
) -> list[pathlib.Path]:
    """Makes the files of all parts, or waits for those that others make; returns them in order.

    `parts` gives all parts from the first, whenever it is called; `name` says the file of a part by its number, and
    `make` writes it. `there` is told of each part once, in any order, when its file is there.
    """
    told = set[int]()
    while True:
        files, left, made = list[pathlib.Path](), 0, False
        for number, part in enumerate(parts()):
            files.append(file := name(number))
            made |= not file.exists() and _made(file, part, make, lambda: True)
            if not file.exists():
                left += 1
            elif number not in told:
                told.add(number)
                there(part)
        if not left:
            return files
        if not made:
            time.sleep(NAP)


def help_make_parts(
    name: Callable[[int], pathlib.Path],
    parts: Callable[[], Iterable[T]],
    make: Callable[[T, pathlib.Path], None],
    wanted: Callable[[], bool],
) -> None:
    """Goes through the parts once, for a rank that another one waits for; `wanted` says whether it still does."""
    for number, part in enumerate(parts()):
        if not name(number).exists() and wanted():
            _made(name(number), part, make, wanted)


def _made(file: pathlib.Path, part: T, make: Callable[[T, pathlib.Path], None], wanted: Callable[[], bool]) -> bool:
    """Makes a part's file, unless somebody does so already; returns whether it was made here.

    `wanted` is asked after the look for the file: the first rank takes the files away once they are used.
    """
    with try_lock(file.with_name(f"{file.name}.lock")) as free:
        if not free or file.exists() or not wanted():
            return False
        make(part, file)
        return True
