"""A bank's sources: the windows that its leaves have learnt, so that an answer can show where it comes from.

    sources/windows.jsonl        a window a line, leaf after leaf
    sources/index.safetensors    the windows' vectors, and which lines are a leaf's

They are opened when a text is routed or a source is asked for, never with the bank. A leaf is found by bisection in
the mapped index; then its lines and vectors are read, and no others. So the tree is the index: one leaf is looked
through for a source, and the vectors of a few for a route (`bank.passages`), however large the bank is. A window
that two leaves have learnt is there twice, so that either can be removed alone.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import pathlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_hiermem.bank.block import write_block
from mlx_hiermem.bank.manifest import FileEntry, SourcesEntry
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import parse_json
from mlx_hiermem.printable import printable
from mlx_hiermem.safetensors_file import map_tensors

WINDOWS_FILE, INDEX_FILE = "sources/windows.jsonl", "sources/index.safetensors"
DEEPEST = 64  # levels of a tree; of more, a path is not even made
AGAIN = "Pull, convert or learn the bank again."


@dataclass(frozen=True)
class SourceWindow:
    """A stretch of a document that was learnt as a whole."""

    document: str  # the file, or the file and the line of a row
    title: str
    place: str  # where it begins: `page 3`, `line 12`; empty where that is not known
    text: str


@dataclass(frozen=True)
class LeafSources:
    """One leaf's windows, and their vectors [n, dim] of length 1."""

    leaf: Path
    windows: Sequence[SourceWindow]
    vectors: np.ndarray


class BankSources:
    """Opened for reading. Raises BankError where the two files are damaged, or do not belong together."""

    def __init__(self, root: pathlib.Path, edit: pathlib.Path | None = None) -> None:
        """`edit` is the folder of a change that stands, and may have only one of the two files in its place yet."""
        self._texts, file = standing(root, WINDOWS_FILE, edit), standing(root, INDEX_FILE, edit)
        tensors = map_tensors(file, ("F16", "I64"), BankError, AGAIN)
        try:
            self._leaves, self._first = tensors["leaves"], tensors["first"]  # [m, 2] level and row, [m + 1]
            self._starts, self._vectors = tensors["starts"], tensors["vectors"]  # [n + 1] bytes, [n, dim]
            self.branching = int(tensors["branching"][0])
            dimensions = [tensors[name].ndim for name in ("first", "starts", "vectors")]
            pairs = self._leaves.shape[1:] == (2,)
            shapes = (len(self._first) - len(self._leaves), len(self._starts) - len(self._vectors))
            # Kept open: where an edit puts other files in their place, these two still belong together.
            self._open = os.open(self._texts, os.O_RDONLY)
            weakref.finalize(self, os.close, self._open)
            size = os.fstat(self._open).st_size
        except (KeyError, IndexError, TypeError, OSError) as error:
            raise BankError(f"the sources in {root} are damaged: {error!r}", AGAIN) from error
        if not pairs or dimensions != [1, 1, 2] or shapes != (1, 1) or int(self._starts[-1]) != size:
            raise BankError(f"{self._texts} is not what {file.name} was made for", AGAIN)

    def __len__(self) -> int:
        """Windows, each counted once for each leaf that has it."""
        return len(self._vectors)

    def leaves(self) -> list[Path]:
        """The leaves that have windows, in the order of the files."""
        rows = self._leaves.tolist()
        for level, row in rows:
            if not (0 < level <= DEEPEST and 0 <= row < self.branching**level):
                raise BankError(f"the index of {self._texts} has row {row} of level {level}: no leaf", AGAIN)
        return [Path.of_row(row, level, self.branching) for level, row in rows]

    def read(self, leaf: Path) -> LeafSources | None:
        """A leaf's windows; None where it has none."""
        if (bounds := self._bounds(leaf)) is None:
            return None
        begin, end = bounds
        windows, vectors = self._lines(begin, end), np.asarray(self._vectors[begin:end], np.float32)
        if not 0 < len(windows) == len(vectors):
            raise BankError(f"{self._texts} has {len(windows)} windows of {leaf}, not {len(vectors)}", AGAIN)
        return LeafSources(leaf, windows, vectors)

    def vectors(self, leaf: Path) -> np.ndarray | None:
        """The vectors [n, dim] of a leaf's windows, without their texts; None where it has none."""
        bounds = self._bounds(leaf)
        return np.asarray(self._vectors[slice(*bounds)], np.float32) if bounds else None

    def text(self, leaf: Path, number: int) -> str:
        """One of a leaf's windows, its title before it."""
        begin, end = self._bounds(leaf) or (0, 0)
        if not 0 <= number < end - begin:
            raise BankError(f"{leaf} has no window {number}", "Its sources tell how many it has.")
        (window,) = self._lines(begin + number, begin + number + 1)
        return f"{window.title}. {window.text}"

    def all(self) -> Iterator[LeafSources]:
        """Leaf after leaf."""
        return (found for leaf in self.leaves() if (found := self.read(leaf)))

    def _bounds(self, leaf: Path) -> tuple[int, int] | None:
        """Where a leaf's windows begin and end; None where it has none."""
        wanted = (len(leaf), leaf.row(self.branching))
        at = bisect.bisect_left(self._leaves, wanted, key=lambda pair: (int(pair[0]), int(pair[1])))
        if at == len(self._leaves) or tuple(self._leaves[at].tolist()) != wanted:
            return None
        return int(self._first[at]), int(self._first[at + 1])

    def _lines(self, begin: int, end: int) -> list[SourceWindow]:
        try:
            first, last = int(self._starts[begin]), int(self._starts[end])
            if not 0 <= first <= last <= int(self._starts[-1]):
                raise ValueError(f"its lines {begin} to {end} are nowhere in it")
            lines = os.pread(self._open, last - first, first)
            if len(lines) != last - first:
                raise ValueError("it has become shorter")
            rows = map(parse_json, lines.splitlines())
            parts = ("document", "title", "place", "text")
            return [SourceWindow(*(printable(row[part]) for part in parts)) for row in rows]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise BankError(f"cannot read {self._texts}: {error!r}", AGAIN) from error


def standing(root: pathlib.Path, name: str, edit: pathlib.Path | None) -> pathlib.Path:
    """A file of the sources: the one in the edit's folder where that is still there."""
    return edit / name if edit and (edit / name).is_file() else root / name


def write_sources(root: pathlib.Path, found: Iterable[LeafSources], branching: int, dim: int) -> SourcesEntry:
    """Writes both files below a bank's folder; leaves must come in the order of level and path.

    Texts go straight to the disk; what is held is a vector and an offset for each window.
    """
    texts, digest = root / WINDOWS_FILE, hashlib.sha256()
    texts.parent.mkdir(parents=True, exist_ok=True)
    leaves, first, starts, documents = list[tuple[int, int]](), [0], [0], set[str]()
    vectors = [np.zeros((0, dim), np.float16)]
    with texts.open("wb") as stream:
        for one in found:
            for window in one.windows:
                line = json.dumps({"leaf": str(one.leaf)} | asdict(window), ensure_ascii=False).encode() + b"\n"
                stream.write(line)
                digest.update(line)
                starts.append(starts[-1] + len(line))
                documents.add(window.document)
            leaves.append((len(one.leaf), one.leaf.row(branching)))
            first.append(len(starts) - 1)
            vectors.append(one.vectors.astype(np.float16))
    if leaves != sorted(set(leaves)):
        raise ValueError("leaves are out of order")
    arrays: dict[str, Any] = {
        "branching": np.array([branching], np.int64),
        "leaves": np.array(leaves, np.int64).reshape(-1, 2),
        "first": np.array(first, np.int64),
        "starts": np.array(starts, np.int64),
        "vectors": np.concatenate(vectors),
    }
    # A buffer without a byte is not cast by `write_block`.
    tensors = {name: (array.shape, array.view(np.uint8) if array.size else b"") for name, array in arrays.items()}
    index = write_block(root / INDEX_FILE, tensors, {name: str(array.dtype) for name, array in arrays.items()})
    entry = FileEntry(starts[-1], digest.hexdigest())
    return SourcesEntry(len(starts) - 1, len(documents), entry, FileEntry(*index))
