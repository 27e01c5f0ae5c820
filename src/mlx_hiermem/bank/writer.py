"""Writing a bank folder: atomic, and resumable after any interruption.

Everything is written into a sibling, `<name>.partial`, beside a journal of the blocks that are finished. The
manifest comes last, then one rename: a reader finds a whole bank or none. A process that was killed leaves
the sibling, and the next one continues there; a failure that repeating would not cure leaves nothing.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from mlx_hiermem.bank.bank import MANIFEST, TREE
from mlx_hiermem.bank.block import write_block
from mlx_hiermem.bank.manifest import BankManifest, FileEntry, SourcesEntry
from mlx_hiermem.bank.sources import LeafSources, write_sources
from mlx_hiermem.errors import BankError, OutputError
from mlx_hiermem.files import DISK_FULL, MALFORMED, file_digest, fsync, parse_json, partial_name, reason, to_disk
from mlx_hiermem.locks import locked
from mlx_hiermem.tree import ClusterTree

JOURNAL = "journal.jsonl"
PAGE = 4096  # what a file system rounds a file's size up to


class BankWriter:
    """A bank being written to `out`; use it as a context manager and end with `finish`.

    `fingerprint` says what the blocks are made from: an interrupted bank is continued only from the same.
    Raises OutputError where `out` exists, where an interrupted bank is in the way and `resume` was not asked
    for, or where another process is writing it.
    """

    def __init__(self, out: pathlib.Path, fingerprint: str, resume: bool = False) -> None:
        self.out, self.resume = out, resume
        self.partial = partial_name(out.absolute())
        self._journaled: dict[str, FileEntry] = {}
        self._mutex = threading.Lock()
        if out.exists():
            raise OutputError(f"{out} exists already", "Choose another folder, or remove it first.")
        fresh = not self.partial.exists()
        with ExitStack() as stack:
            try:
                self.partial.mkdir(exist_ok=True)
                stack.enter_context(locked(self.partial, "writing"))
                if not (fresh or resume):
                    hint = "Continue it with --resume, or remove that folder."
                    raise OutputError(f"an interrupted run left {self.partial}", hint)
                # Unbuffered: closing it must not write once more what a full disk did not take.
                self._journal = stack.enter_context((self.partial / JOURNAL).open("ab+", buffering=0))
                self._read_journal(fingerprint)
            except OSError as error:
                if fresh:
                    shutil.rmtree(self.partial, ignore_errors=True)
                raise self._failed(error) from error
            self._held = stack.pop_all()  # the lock and the journal, until __exit__

    def _read_journal(self, fingerprint: str) -> None:
        """Takes over the entries of an interrupted run, or starts a journal."""
        self._journal.seek(0)
        text = self._journal.read()
        whole = text[: text.rfind(b"\n") + 1]  # a killed process may leave half a line
        self._journal.truncate(len(whole))
        if not whole:
            self._note({"fingerprint": fingerprint})
            return
        try:
            head, *rows = map(parse_json, whole.splitlines())
            self._journaled = {row.pop("name"): FileEntry(**row) for row in rows}
        except MALFORMED as error:
            raise OutputError(f"the journal in {self.partial} is damaged", "Remove that folder.") from error
        if head != {"fingerprint": fingerprint}:
            raise OutputError(
                f"the interrupted run in {self.partial} had another source or other settings",
                "Remove that folder to start afresh.",
            )

    def _note(self, row: Mapping[str, Any]) -> None:
        """Appends one line to the journal. Surviving a kill needs no fsync, and `finished` checks the files."""
        line = memoryview((json.dumps(row) + "\n").encode())
        while line:  # a raw write may be short
            line = line[self._journal.write(line) :]

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Raises OutputError unless the disk has room for those of these files (name -> bytes) yet to come."""
        need = sum(-(-size // PAGE) * PAGE + PAGE for name, size in sizes.items() if name not in self._journaled)
        free = shutil.disk_usage(self.partial).free
        if need > free:
            raise OutputError(
                f"the bank needs {need / 1e6:,.1f} MB more, the disk of {self.out} has {free / 1e6:,.1f} MB free",
                "Free some space, or write to another disk.",
            )

    def finished(self, name: str) -> FileEntry | None:
        """The entry of a file that an interrupted run completed, its digest checked; else None."""
        entry, file = self._journaled.get(name), self.partial / name
        if entry and file.is_file() and (file.stat().st_size, file_digest(file)) == (entry.bytes, entry.sha256):
            return entry
        return None

    def write(
        self, name: str, tensors: Mapping[str, tuple[Sequence[int], Any]], dtype: str | Mapping[str, str]
    ) -> FileEntry:
        """Writes one block file (see `write_block`) and journals it. Safe to call from several threads."""
        try:
            entry = FileEntry(*write_block(self.partial / name, tensors, dtype))
            _start_writeback(self.partial / name)
            self._finished(name, entry)
        except OSError as error:
            raise self._failed(error) from error
        return entry

    def _finished(self, name: str, entry: FileEntry) -> None:
        with self._mutex:
            self._note({"name": name} | asdict(entry))
            self._journaled[name] = entry

    def copy(self, name: str, source: pathlib.Path, entry: FileEntry) -> None:
        """Copies a bank's file and journals it. Raises BankError where it is not what its manifest says."""
        target = self.partial / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            if file_digest(target) != entry.sha256:
                raise BankError(
                    f"{source} is not what its manifest says", "See `hiermem bank verify` of that bank."
                )
            self._finished(name, entry)
        except OSError as error:
            raise self._failed(error) from error

    def write_tree(self, tree: ClusterTree) -> FileEntry:
        file = self.partial / TREE
        try:
            tree.save(file)
            return FileEntry(file.stat().st_size, file_digest(file))
        except (OSError, SafetensorError) as error:
            raise self._failed(error) from error

    def write_sources(self, found: Iterable[LeafSources], tree: ClusterTree) -> SourcesEntry:
        """The windows that the leaves have learnt, in the order of level and path."""
        try:
            return write_sources(self.partial, found, tree.branching, tree.dim)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self, manifest: BankManifest) -> None:
        """Writes the manifest, brings everything safely to disk and gives the folder its name."""
        try:
            manifest.write(self.partial / MANIFEST)
            to_disk(self.partial)
            (self.partial / JOURNAL).unlink()
            os.rename(self.partial, self.out)
            fsync(self.out.parent)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OutputError:
        """The error to raise for one of the operating system."""
        stays = self.resume and self._journaled
        kept = f" What is written so far stays in {self.partial.name} for --resume." if stays else ""
        full = "Free some space." if getattr(error, "errno", None) in DISK_FULL else ""
        return OutputError(f"cannot write {self.out}: {reason(error)}", f"{full}{kept}".strip())

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what was written, unless it is complete or worth continuing: interrupted, or out of space."""
        self._journal.close()
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        continuable = interrupted or (self.resume and isinstance(error, OutputError))
        if not (continuable and self._journaled):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._held.close()


def _start_writeback(file: pathlib.Path) -> None:
    """Has Linux write a file out now, while other blocks are hashed, and `finish` wait for next to nothing.

    Giving up cached pages starts to write those that are dirty, without waiting for them.
    """
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
