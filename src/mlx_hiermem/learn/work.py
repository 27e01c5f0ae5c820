"""The work folder: which stages are done, made of what, and lines of JSON written whole or not at all.

A stage is done when its files were renamed into place and noted in `stages.json` with a digest of what they were
made from: its settings, and through `after` the digests of the stages before. With another setting it and all that
follow are made again.
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

from mlx_hiermem.errors import CorpusError, OutputError

STAGES = "stages.json"
Row = dict[str, Any]
T = TypeVar("T")


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
        """What cannot be written raises an OutputError that says so."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            file, why = getattr(error, "filename", None) or self.folder, getattr(error, "strerror", None) or error
            if isinstance(error, shutil.Error):  # of a folder's copy: a list of (from, to, why)
                _, file, why = error.args[0][0]
            raise OutputError(
                f"cannot write {file}: {why}", "What was done is kept: free space and run the same command again."
            ) from error

    def _note(self, done: dict[str, str]) -> None:
        self._done = done
        write_text(self._notes, json.dumps(done, indent=1) + "\n")


def write_text(file: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def write_lines(file: pathlib.Path, rows: Iterable[Any]) -> int:
    """JSON values, one a line, whole or not at all; returns how many."""
    count, beside = 0, file.with_name(file.name + ".tmp")
    with beside.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    os.replace(beside, file)
    return count


def read_lines(file: pathlib.Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def with_rows(
    windows: Iterable[T], file: pathlib.Path, number: Callable[[T], int]
) -> Iterator[tuple[T, list[Row]]]:
    """Each window with its rows of a file, those whose `window` is its `number`; without a file none has rows.

    Raises CorpusError where the file does not go window by window.
    """
    groups = itertools.groupby(read_lines(file) if file.exists() else (), key=lambda row: row["window"])
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
