"""The conversations of `hiermem chat`, so that one can be gone on with: a file each, in a folder that only their
owner can read. The newest are kept.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_hiermem.errors import FileError, HierMemError, OutputError
from mlx_hiermem.files import read_json, write_json

if TYPE_CHECKING:
    from mlx_hiermem.session import Session

MOST = 100  # conversations that are kept, of all models


@dataclass(frozen=True)
class Kept:
    """A conversation: its first question, and when it was last gone on with."""

    file: pathlib.Path
    title: str
    changed: float
    data: dict[str, Any]


class Shelf:
    """Keeps the present conversation with a model, and finds the earlier ones with it."""

    def __init__(self, model: str) -> None:
        self.model, self.folder = model, _folder()
        self._file = self._new()

    def _new(self) -> pathlib.Path:
        return self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}.json"

    def begin_anew(self) -> None:
        """What is kept next is another conversation."""
        self._file = self._new()

    def keep(self, session: Session) -> None:
        """What was said so far. A disk that takes nothing is no reason to stop talking."""
        if not session.messages:
            return
        with contextlib.suppress(OSError, OutputError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self._file, session.to_json() | {"model": self.model}, indent=1)
            for old in self._files()[MOST:]:
                old.unlink(missing_ok=True)

    def kept(self) -> list[Kept]:
        """The earlier conversations with this model, the latest first."""
        return [found for file in self._files() if file != self._file and (found := self._read(file))]

    def take_up(self, session: Session, number: int = 1) -> Kept:
        """Goes on with the conversation of this number in `kept`. Raises HierMemError where there is none."""
        kept = self.kept()
        if not 1 <= number <= len(kept):
            there = f"there are {len(kept)}" if kept else "there are none yet"
            raise HierMemError(f"no conversation {number} with {self.model} is kept; {there}", "/chats lists them.")
        found = kept[number - 1]
        session.restore(found.data)
        self._file = found.file
        return found

    def _files(self) -> list[pathlib.Path]:
        """The latest first."""
        return sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)

    def _read(self, file: pathlib.Path) -> Kept | None:
        try:
            data = read_json(file)
            if data["model"] != self.model:
                return None
            return Kept(file, str(data["messages"][0]["content"]), file.stat().st_mtime, data)
        except (FileError, OSError, KeyError, IndexError, TypeError):
            return None


def _folder() -> pathlib.Path:
    from mlx_hiermem.assets import cache_folder

    return cache_folder() / "chats"
