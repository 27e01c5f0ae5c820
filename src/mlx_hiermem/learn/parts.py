"""Long work in parts, a file each: what a killed run has made stays, and ranks share what is left.

Every rank goes through the parts and makes those that are neither there nor being made by another one. A file's
lock says so. The system lets go of it when a process ends, however it ends, so nothing waits for a dead rank.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from mlx_hiermem.files import try_lock

NAP = 0.2  # seconds between looks at what other ranks make
T = TypeVar("T")


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
