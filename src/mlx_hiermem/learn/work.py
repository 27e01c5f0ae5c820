"""The work folder `OUT.learn`: its files, the stages that are done, its lock, and the processes that share it.

A stage is done when its files were renamed into place and noted in `stages.json` with a digest of what they were
made from: its settings, and through `after` the digests of the stages before. With another setting it and all that
follow are made again. What the files are is in the table of `mlx_hiermem.learn`.

Several processes learn together: the ranks of one command, and work in parts, a file each, that they share. Every
rank goes through the parts and makes those that are neither there nor being made by another one. A file's lock says
so. The system lets go of it when a process ends, however it ends, so nothing waits for a dead rank. What a killed
run has made stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import mlx.core as mx

from mlx_hiermem import files
from mlx_hiermem.errors import CorpusError, OutputError
from mlx_hiermem.locks import locked, try_lock

SUFFIX, SYNC = ".learn", ".sync"  # of a work folder's name
STAGES, TIMES = "stages.json", "times.json"
FILES, WINDOWS, SKIPPED = "files.jsonl", "windows.jsonl", "skipped.jsonl"
WINDOWS_DIGEST = "windows.sha256"
STUDY, PROMPTS = "study.jsonl", "prompts.jsonl"
WRITTEN, STUDIED = "written.jsonl", "studied.json"
PROBES, PROBE_VECTORS, MEANS = "probes.jsonl", "probes.npy", "means.npy"
TREE, LEAVES_FILE, AGREEMENT, NODES = "tree.safetensors", "leaves.jsonl", "agreement.json", "nodes.json"
TRAINING = "training"
GO_ON = "What was done is kept: free space and run the same command again."
Row = dict[str, Any]
FIRST_RANK = "first-rank"  # how the file's name begins by which the first rank speaks to the others
BEGUN, READY, FAILED = "begun", "ready", "failed"  # what it says
PATIENCE = 60.0  # seconds until the first rank must have begun
NAP = 0.2  # seconds between looks at the file, or at what other ranks make
T = TypeVar("T")


def work_folder(model: pathlib.Path, suffix: str = SUFFIX) -> pathlib.Path:
    """Where everything lies until the model folder is whole."""
    return model.absolute().with_name(model.name + suffix)


@contextlib.contextmanager
def locked_work(folder: pathlib.Path) -> Iterator[Work]:
    """The work folder, for one process at a time. Raises OutputError where another one has it."""
    work = Work(folder)
    with locked(folder, "at work in"):
        shutil.rmtree(_gone(folder), ignore_errors=True)
        yield work


def remove_work(folder: pathlib.Path) -> None:
    """Removes a work folder whose work is done. Of a process that is killed meanwhile nothing stays under its name,
    so that the next run does not go on from half of it; what does stay, the next run removes."""
    shutil.rmtree(_gone(folder), ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(folder, _gone(folder))
        shutil.rmtree(_gone(folder))


def _gone(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(folder.name + ".gone")


class Work:
    """One work folder, made if it is not there. Raises OutputError where it cannot be."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._done: dict[str, str] = json.loads(self._notes.read_text()) if self._notes.exists() else {}
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot use the work folder {folder}: {error}", "Remove or rename it.") from error

    @property
    def _notes(self) -> pathlib.Path:
        return self.folder / STAGES

    def path(self, name: str) -> pathlib.Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether a stage is done, with whatever settings."""
        return name in self._done

    def digest(self, name: str) -> str:
        """The digest of a stage that is done."""
        return self._done[name]

    def stage(self, name: str, settings: Any, after: Iterable[str], make: Callable[[], None]) -> str:
        """Runs `make` unless the stage is done with these settings, after these digests; returns its own digest."""
        digest = hashlib.sha256(json.dumps([name, settings, list(after)]).encode()).hexdigest()
        if self._done.get(name) != digest:
            with self.writing():
                self._note({key: value for key, value in self._done.items() if key != name})
                make()
                self._note(self._done | {name: digest})
        return digest

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises an OutputError that names the file where the block cannot write one."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            file = getattr(error, "filename", None) or self.folder
            if isinstance(error, shutil.Error):  # of a copied folder: a list of (from, to, why)
                file = error.args[0][0][1]
            raise OutputError(f"cannot write {file}: {files.reason(error)}", GO_ON) from error

    def _note(self, done: dict[str, str]) -> None:
        self._done = done
        write_text(self._notes, json.dumps(done, indent=1) + "\n")


def write_text(file: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    files.write_text(file, text, GO_ON)


def write_rows(file: pathlib.Path, rows: Iterable[Any]) -> int:
    """JSON values, one a line, whole or not at all; returns how many."""
    return files.write_json_lines(file, rows, GO_ON)


def read_rows(file: pathlib.Path) -> Iterator[Any]:
    """The JSON values of a file of lines."""
    return (value for _, value in files.read_json_lines(file, CorpusError, "Remove it: it is written again."))


def count_lines(file: pathlib.Path) -> int:
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def with_rows(
    windows: Iterable[T], file: pathlib.Path, number: Callable[[T], int]
) -> Iterator[tuple[T, list[Row]]]:
    """Each window with its rows of a file, those whose `window` is its `number`; without a file none has rows.

    Raises CorpusError where the file does not go window by window.
    """
    groups = itertools.groupby(read_rows(file) if file.exists() else (), key=lambda row: row["window"])
    following: tuple[int, list[Row]] | None = None
    for window in windows:
        if following is None:
            following = next(((at, list(rows)) for at, rows in groups), None)
        if following is not None and following[0] == number(window):
            yield window, following[1]
            following = None
        else:
            yield window, []
    if following is not None or next(groups, None) is not None:
        raise CorpusError(f"{file} does not go window by window", "Remove it: it is written again.")


# Processes that share it


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
        self._lock = self._file.with_suffix(".lock")  # held by the first rank as long as it leads

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What only the first rank does; the others go on when it is done, or stop when it failed."""
        if self.count == 1:
            yield
            return
        for old in self._file.parent.glob(f"{FIRST_RANK}-*"):
            old.unlink()
        with try_lock(self._lock):  # before the file is there: who reads that tries this lock
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
        rank failed, was killed, or has another folder.
        """
        start, left = time.monotonic(), dict(help_with)
        while (said := self._said()) not in (READY, FAILED):
            if not said and time.monotonic() - start > PATIENCE:
                raise OutputError(
                    f"the first rank has not begun in {self._file.parent}", "The ranks must share that folder."
                )
            if said and self._leader_is_dead():
                raise OutputError(
                    f"the first rank was killed at work in {self._file.parent}",
                    "What was done is kept: start all ranks again.",
                )
            if helping := left.pop(said, None):
                helping(lambda stage=said: self._said() == stage)  # type: ignore[misc]
            time.sleep(NAP)
        if said == FAILED:
            raise OutputError("the first rank stopped", "Its own line says why.")

    def _leader_is_dead(self) -> bool:
        """Whether the first rank, which has begun, ended without a last word. It may have said that just before."""
        with try_lock(self._lock) as free:
            return free and self._said() not in (READY, FAILED)

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
