"""The work folder `OUT.learn`: its files, the stages that are done, and its lock.

A stage is done when its files were renamed into place and noted in `stages.json` with a digest of what they were
made from: its settings, and through `after` the digests of the stages before. With another setting it and all that
follow are made again. What the files are is in the table of `mlx_hiermem.learn`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from mlx_hiermem import files
from mlx_hiermem.errors import CorpusError, OutputError
from mlx_hiermem.locks import locked

SUFFIX, SYNC = ".learn", ".sync"  # of a work folder's name
STAGES, TIMES = "stages.json", "times.json"
FILES, WINDOWS, SKIPPED = "files.jsonl", "windows.jsonl", "skipped.jsonl"
STUDY, PROMPTS = "study.jsonl", "prompts.jsonl"
WRITTEN, STUDIED = "written.jsonl", "studied.json"
PROBES, PROBE_VECTORS, MEANS = "probes.jsonl", "probes.npy", "means.npy"
TREE, LEAVES_FILE, AGREEMENT, NODES = "tree.safetensors", "leaves.jsonl", "agreement.json", "nodes.json"
TRAINING = "training"
GO_ON = "What was done is kept: free space and run the same command again."
Row = dict[str, Any]
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
