"""The manifest's table of blocks, read where it is asked: opening a bank of 70 000 blocks costs what 300 cost.

`BankManifest.write` puts the table last, one row a line, sorted by level and path. So a row is found by halving the
file, a few rows at each step, until what is left is small enough to be read. A manifest laid out otherwise is read
whole: slower, with the same result. The file stays open: one that replaces it does not change what was opened.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, BinaryIO

from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError

START, END = b',\n "blocks": [\n', b"\n ]\n}\n"  # no string in JSON has a line break
PAGE = 1024  # bytes; a few rows
REGION = 16 * PAGE  # that are read at once, where a search has come so far
REMEMBERED = 10  # steps of a search whose rows are kept, a thousand at most: every search begins with them
ROW = re.compile(rb'  \{"path": "([0-9.]+)"')


@dataclass(frozen=True)
class BlockEntry:
    """One row of the block table."""

    path: Path
    bytes: int
    sha256: str
    label: str = ""
    documents: int = 0
    tokens: int = 0
    sources: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path), "sources": list(self.sources)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> BlockEntry:
        path, sources = Path.parse(row["path"]), tuple(row.get("sources", ()))
        return cls(**{**row, "path": path, "sources": sources})


def order(path: Path) -> tuple[int, Path]:
    """What the table is sorted by: level, then path."""
    return len(path), path


class BlockTable(Mapping[Path, BlockEntry]):
    """Path -> row, from the lines of an open manifest. Errors in a row are found when it is read (BankError)."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self._end = file, start, end
        self._found: dict[Path, BlockEntry] = {}
        self._halves: dict[tuple[int, int], tuple[int, int, tuple[int, Path]]] = {}

    def __getitem__(self, path: Path) -> BlockEntry:
        if path not in self._found:
            row = self._search(path)
            # A table that is out of order hides rows from the search, but not from reading it all.
            if row is None and self._sorted:
                raise KeyError(path)
            self._found[path] = self._entry(row) if row is not None else self._all[path]
        return self._found[path]

    def __contains__(self, path: object) -> bool:
        try:
            return isinstance(path, Path) and bool(self[path])
        except KeyError:
            return False

    def __iter__(self) -> Iterator[Path]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __or__(self, other: Mapping[Path, BlockEntry]) -> dict[Path, BlockEntry]:
        return {**self, **other}

    def _search(self, path: Path) -> bytes | None:
        """The line of a path, if the table is sorted."""
        low, high, wanted, step = self._start, self._end, order(path), 0
        while high - low > REGION:
            begin, end, found = self._half(low, high, step < REMEMBERED)
            if found == wanted:
                return os.pread(self._file.fileno(), end - begin, begin)
            low, high = (end + 1, high) if found < wanted else (low, begin - 1)
            step += 1
        return self._among(path, os.pread(self._file.fileno(), max(0, high - low), low))

    def _among(self, path: Path, lines: bytes) -> bytes | None:
        """The line of a path; as `BankManifest.write` begins it, or else any line that is about it."""
        begin = lines.find(b'  {"path": "%s"' % str(path).encode())
        if begin >= 0:
            return lines[begin:].split(b"\n", 1)[0]
        return next((line for line in lines.split(b"\n") if line and self._path(line) == path), None)

    def _half(self, low: int, high: int, remember: bool) -> tuple[int, int, tuple[int, Path]]:
        """Of the line in the middle between two ends of lines: its own ends, and what it is sorted by."""
        if (low, high) in self._halves:
            return self._halves[low, high]
        begin, line = self._line((low + high) // 2, low, high)
        half = begin, begin + len(line), order(self._path(line))
        if remember:
            self._halves[low, high] = half
        return half

    def _line(self, at: int, low: int, high: int) -> tuple[int, bytes]:
        """The line that the byte `at` lies in, and where it begins; low and high are ends of lines."""
        reach = PAGE
        while True:
            first, last = max(low, at - reach), min(high, at + reach)
            text = os.pread(self._file.fileno(), last - first, first)
            begin, end = text.rfind(b"\n", 0, at - first) + 1, text.find(b"\n", at - first)
            if (begin or first == low) and (end >= 0 or last == high):
                return first + begin, text[begin : end if end >= 0 else None]
            reach *= 4

    def _path(self, line: bytes) -> Path:
        match = ROW.match(line)
        return Path.parse(match[1].decode()) if match else self._entry(line).path

    def _entry(self, line: bytes) -> BlockEntry:
        try:
            return BlockEntry.from_json(json.loads(line.removesuffix(b",")))
        except (ValueError, KeyError, TypeError, AttributeError, HierMemError) as error:
            raise incomplete(self._file.name, error) from error

    @cached_property
    def _sorted(self) -> bool:
        keys = [order(path) for path in self._all]
        return all(a < b for a, b in itertools.pairwise(keys))

    @cached_property
    def _all(self) -> dict[Path, BlockEntry]:
        text = os.pread(self._file.fileno(), self._end - self._start, self._start)
        return {entry.path: entry for entry in map(self._entry, filter(None, text.split(b"\n")))}


Blocks = BlockTable | dict[Path, BlockEntry]


def split(file: pathlib.Path) -> tuple[bytes, BlockTable] | None:
    """The manifest's JSON without its table, and the table; None where the file is laid out otherwise."""
    stream = file.open("rb", buffering=0)
    size, head, found = os.fstat(stream.fileno()).st_size, b"", -1
    if size < len(END) or os.pread(stream.fileno(), len(END), size - len(END)) != END:
        return None
    while found < 0 and (piece := stream.read(64 * PAGE)):
        head += piece
        found = head.find(START)
    start, end = found + len(START), size - len(END)
    if found < 0 or start > end:
        return None
    return head[:found] + b"}", BlockTable(stream, start, end)


def incomplete(file: object, error: Exception) -> BankError:
    """What a manifest that lacks something is refused with."""
    return BankError(f"{file} is incomplete: {error!r}", "Convert or pull the bank again.")
