"""Locks: one process at a time changes a folder or a file, and the next one is told who that is.

The lock is the system's, which lets go of it when a process ends, however it ends. Who has it stands in the cache
folder, in a note that counts only while the lock is held: what is locked gets no files that are not its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import sys
import time
from collections.abc import Iterator

from mlx_hiermem.assets import cache_folder
from mlx_hiermem.errors import FileError, OutputError
from mlx_hiermem.files import read_json, write_json, writing
from mlx_hiermem.printable import printable

LONGEST = 80  # characters of a command that are shown


@contextlib.contextmanager
def locked(place: pathlib.Path, doing: str) -> Iterator[None]:
    """Holds a folder or a file for this process. Raises OutputError where another one holds it: who, and what it is
    `doing`."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        if not _taken(descriptor) or not _is_still(descriptor, place):
            who = _read_note(descriptor)
            raise OutputError(f"another process is {doing} {place}{who}", "Wait for it to end.")
        note = _note(descriptor)
        with contextlib.suppress(OSError, OutputError):  # that nobody can be told is no reason to stop
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"pid": os.getpid(), "command": _command(), "since": time.time()})
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                note.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def try_lock(file: pathlib.Path) -> Iterator[bool]:
    """Tells whether this process has a file's lock now, and lets go of it in the end. The file is made."""
    with writing(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _taken(descriptor)
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(descriptor: int, place: pathlib.Path) -> bool:
    """Whether what was opened has still its name: whoever had the lock before may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(place))
    except FileNotFoundError:
        return False


def _note(descriptor: int) -> pathlib.Path:
    status = os.fstat(descriptor)
    return cache_folder() / "locks" / f"{status.st_dev:x}-{status.st_ino:x}.json"


def _command() -> str:
    words = [pathlib.Path(sys.argv[0]).name if sys.argv[0] else "python", *sys.argv[1:]]
    text = " ".join(words)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _read_note(descriptor: int) -> str:
    """`: hiermem bank add my-model docs (process 1234, since 16:20)`; empty where nothing is known."""
    try:
        found = read_json(_note(descriptor))
        since = time.strftime("%H:%M", time.localtime(found["since"]))
        return f": {printable(found['command'])} (process {int(found['pid'])}, since {since})"
    except (FileError, OSError, ValueError, KeyError, TypeError, OverflowError):
        return ""
