"""What has changed in a folder since a bank has learnt it: new, changed and deleted files, by digest."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_hiermem.errors import BankError, CorpusError
from mlx_hiermem.files import file_digest
from mlx_hiermem.learn.add import check_model
from mlx_hiermem.learn.corpus import readers
from mlx_hiermem.learn.record import RECORD, LearntFile, read_record

REPEATS = "the same as "  # how a reader says that another document has this text


@dataclass(frozen=True)
class Changes:
    """Files of a folder that are not as the bank has learnt them: whole path -> digest; of deleted ones the old."""

    folder: str
    new: Mapping[str, str]
    changed: Mapping[str, str]
    deleted: Mapping[str, str]
    same: int

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.deleted)

    @property
    def all_gone(self) -> bool:
        """Whether no file is left of those that were learnt."""
        return bool(self.deleted) and not (self.same or self.changed)

    def names(self, files: Iterable[str]) -> list[str]:
        """Files as the folder has them."""
        return sorted(pathlib.Path(file).relative_to(self.folder).as_posix() for file in files)


class Scan:
    """The digests of a folder's files. A file of the same size and time as before is not read again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int], str]] = {}

    def digests(self, folder: str) -> dict[str, str]:
        """Whole path -> digest; empty for a file that is there and cannot be read."""
        found = {}
        for path, _ in readers.files_of([folder]):
            file = readers.clean(str(path))
            try:
                status = path.stat()
                stamp = status.st_size, status.st_mtime_ns
                if self._known.get(file, (None, ""))[0] != stamp:
                    self._known[file] = stamp, file_digest(path)
                found[file] = self._known[file][1]
            except FileNotFoundError:  # it went while we looked
                continue
            except OSError:
                found[file] = ""
        return found


def look(model: pathlib.Path, folder: pathlib.Path, scan: Scan | None = None) -> Changes:
    """What has changed in a folder since the bank has learnt it.

    Raises BankError where the bank does not know what it has learnt of which file, or has learnt nothing there;
    CorpusError where the folder is not there.
    """
    check_model(model)
    root, record = os.path.abspath(folder), read_record(model)
    if not record:
        raise BankError(
            f"{model} has no {RECORD}, which says what it has learnt of which file",
            "It was pulled from the hub, or an earlier version learnt it. Learn the folder again.",
        )
    learnt = {file: row for file, row in record.items() if pathlib.Path(root) in pathlib.Path(file).parents}
    if not learnt:
        others = sorted({os.path.dirname(file) for file in record})
        raise BankError(
            f"{model} has learnt nothing in {root}, but in {', '.join(others[:3])}" + ", …" * (len(others) > 3),
            "New documents are learnt by `hiermem bank add`.",
        )
    if not os.path.isdir(root):
        raise CorpusError(f"there is no folder {root}", "Nothing was changed.")
    return compared(root, learnt, (scan or Scan()).digests(root))


def compared(root: str, learnt: Mapping[str, LearntFile], now: Mapping[str, str]) -> Changes:
    """A folder's files `now`, whole path -> digest, beside those `learnt`."""
    deleted = {file: row.sha256 for file, row in learnt.items() if file not in now and row.windows}
    changed = {file: now[file] for file, row in learnt.items() if now.get(file) and now[file] != row.sha256}
    new = {file: digest for file, digest in now.items() if digest and file not in learnt}
    # One whose text another file had is to be learnt now that the other is gone.
    going = {learnt[file].name for file in (*deleted, *changed)}
    for file, row in learnt.items():
        twin = row.why.rpartition(REPEATS)[2] if REPEATS in row.why else ""
        if file in now and file not in changed and {twin, twin.rpartition(":")[0]} & going:
            new[file] = now[file]
    same = sum(bool(row.windows) and file not in changed for file, row in learnt.items() if file in now)
    return Changes(root, new, changed, deleted, same)
