"""What a model keeps of what it has learnt: its files, by digest, and the windows that are the bank's sources.

`learning/files.jsonl` in a model has a file a line. `windows` are numbers that its examples have, in the same order
`texts` digests of the windows; `homes` says how many documents and tokens are counted in which leaf:

    {"file": "/home/me/docs/gold.txt", "name": "gold.txt", "sha256": "…", "windows": [12, 13], "texts": ["…", "…"],
     "homes": {"0.1": [1, 310]}, "why": "", "twins": []}

A file of which nothing could be learnt is there too, with the reason, so that it is not new for ever. `twins` are
the documents of which it repeats one: those texts are learnt as theirs. Data sets of the hub are not files, and are
not there.

The sources are windows: each in the leaves that have learnt it, with its vector.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mlx_hiermem.bank.commit import LEARNING
from mlx_hiermem.bank.manifest import order
from mlx_hiermem.bank.sources import BankSources, LeafSources, SourceWindow
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, CorpusError
from mlx_hiermem.files import MALFORMED, file_digest, read_json_lines
from mlx_hiermem.learn.corpus import readers
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.tree.build import CorpusTree, descend
from mlx_hiermem.learn.work import FILES, PROBE_VECTORS, PROBES, SKIPPED, Work, read_rows, write_rows
from mlx_hiermem.printable import printable
from mlx_hiermem.tree import ClusterTree

RECORD = f"{LEARNING}/{FILES}"
REPEATS = "the same as "  # how a reader says that another document has this text
MOST = 0.95  # of the probes are within a bank's reach; what is farther names nothing: "It was one of the last"
MEASURED = 100_000  # probes, about, that say how far that is


@dataclass(frozen=True)
class LearntFile:
    """One file as it was when it was learnt."""

    file: str  # its whole path
    name: str  # what it is called in the bank's sources
    sha256: str
    windows: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    homes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    why: str = ""  # nothing was learnt of it
    twins: tuple[str, ...] = ()  # sources whose text it has too

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> LearntFile:
        homes = {leaf: (int(documents), int(tokens)) for leaf, (documents, tokens) in row["homes"].items()}
        parts = {name: tuple(row[name]) for name in ("windows", "texts")}
        twins = tuple(row.get("twins", ()))
        return cls(row["file"], row["name"], row["sha256"], **parts, homes=homes, why=row["why"], twins=twins)

    def repeats(self, names: Collection[str]) -> bool:
        """Whether it has a text of a file with one of these names, or of a line of one."""
        return any(name in names for twin in self.twins for name in (twin, twin.rpartition(":")[0]))

    def and_again(self, later: LearntFile) -> LearntFile:
        """What the bank has of a file that it learnt twice."""
        homes = dict(self.homes)
        for leaf, (documents, tokens) in later.homes.items():
            before = homes.get(leaf, (0, 0))
            homes[leaf] = before[0] + documents, before[1] + tokens
        return replace(later, windows=self.windows + later.windows, texts=self.texts + later.texts, homes=homes)


def text_digest(source: str, text: str) -> str:
    """Names a window among a bank's sources."""
    said = f"{printable(source)}\0{printable(text)}"  # as it is read from a bank
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def read_record(model: pathlib.Path) -> dict[str, LearntFile]:
    """A model's files by their whole paths; none where it has no record. Raises BankError where it is damaged."""
    file = model / RECORD
    if not file.is_file():
        return {}
    hint = "Learn the documents again: without it nobody knows which text is of which file."
    try:
        rows = [LearntFile.from_json(row) for _, row in read_json_lines(file, BankError, hint)]
    except MALFORMED as error:
        raise BankError(f"{file} is damaged: {error!r}", hint) from error
    return {row.file: row for row in rows}


def write_record(file: pathlib.Path, rows: Iterable[LearntFile]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(file, map(asdict, rows))


def without(record: Mapping[str, LearntFile], gone: Collection[LearntFile]) -> dict[str, LearntFile]:
    """A record without files that go, and without repetitions that are no longer there.

    A file of another folder that repeats one that goes gets no digest: to its folder's next sync it has changed.
    """
    paths, going = {file.file for file in gone}, {file.name for file in gone}
    left = {  # a name that is no Unicode is not known exactly
        file: row
        for file, row in record.items()
        if file not in paths and (row.windows or pathlib.Path(file).exists() or "\ufffd" in file)
    }
    going -= {row.name for row in left.values() if row.windows}
    return {file: replace(row, sha256="") if row.repeats(going) else row for file, row in left.items()}


def files_read(work: Work) -> dict[str, LearntFile]:
    """What a run has read, as far as the stage `corpus` knows it: by whole paths, with reasons for what was not."""
    if not work.path(FILES).exists():
        return {}
    why, twins = dict[str, str](), defaultdict[str, list[str]](list)
    for row in read_rows(work.path(SKIPPED)):
        why.setdefault(row["what"], row["why"])
        if REPEATS in row["why"]:
            for name in (row["what"], row["what"].rpartition(":")[0]):  # a file, or a line of one
                twins[name].append(row["why"].rpartition(REPEATS)[2])
    rows = (LearntFile(**row) for row in read_rows(work.path(FILES)))
    return {
        row.file: replace(row, why=why.get(row.name, ""), twins=tuple(dict.fromkeys(twins[row.name])))
        for row in rows
    }


def files_learnt(built: CorpusTree, tokens: Callable[[str], int], first: int = 0) -> Iterator[LearntFile]:
    """The files that a run has read, and what is learnt of them. Windows are counted from `first`."""
    found = {file: _Parts(row) for file, row in files_read(built.corpus.work).items()}
    for window, placed in zip(built.corpus.windows(), built.placed(), strict=True):
        if window.file in found:
            found[window.file].add(window, str(placed.leaves[0]), tokens(window.text), first)
    return (parts.row() for parts in found.values())


class _Parts:
    """What is gathered of one file."""

    def __init__(self, read: LearntFile) -> None:
        self.read, self.windows, self.texts = read, list[int](), list[str]()
        self.documents, self.tokens = defaultdict[str, set[int]](set), Counter[str]()  # by leaf

    def add(self, window: Window, leaf: str, tokens: int, first: int) -> None:
        self.windows.append(first + window.id)
        self.texts.append(text_digest(window.source, window.text))
        self.documents[leaf].add(window.document)
        self.tokens[leaf] += tokens

    def row(self) -> LearntFile:
        homes = {leaf: (len(self.documents[leaf]), tokens) for leaf, tokens in self.tokens.items()}
        why = "" if self.windows else self.read.why
        return replace(self.read, windows=tuple(self.windows), texts=tuple(self.texts), homes=homes, why=why)


# What has changed since


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
        """Whole path -> digest; empty for a file that is there and cannot be read.

        Raises CorpusError where a folder cannot be read: its files would seem to be gone.
        """
        found = {}
        for path, why in readers.files_in(pathlib.Path(folder)):
            if why == readers.UNREADABLE:
                raise CorpusError(f"{path} is {why}", "Make it readable, or move it out of the folder.")
            if why:
                continue
            file = readers.clean(str(path))
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                    continue
                stamp = status.st_size, status.st_mtime_ns
                if self._known.get(file, (None, ""))[0] != stamp:
                    self._known[file] = stamp, file_digest(path)
                found[file] = self._known[file][1]
            except FileNotFoundError:  # it went while we looked
                continue
            except OSError:
                found[file] = ""
        return found


def compared(root: str, learnt: Mapping[str, LearntFile], now: Mapping[str, str]) -> Changes:
    """A folder's files `now`, whole path -> digest, beside those `learnt`."""
    deleted = {file: row.sha256 for file, row in learnt.items() if file not in now and row.windows}
    changed = {file: now[file] for file, row in learnt.items() if now.get(file) and now[file] != row.sha256}
    new = {file: digest for file, digest in now.items() if digest and file not in learnt}
    # One that repeats a text of another file is to be learnt now that the other is gone, and all of it.
    going = {learnt[file].name for file in (*deleted, *changed)}
    for file, row in learnt.items():
        if now.get(file) and file not in changed and row.repeats(going):
            (changed if row.windows else new)[file] = now[file]
    same = sum(bool(row.windows) and file not in changed for file, row in learnt.items() if file in now)
    return Changes(root, new, changed, deleted, same)


# The windows that a bank keeps as its sources


class WindowVectors:
    """The vectors of a corpus' windows, as the bank's sources will have them: by these it is routed."""

    def __init__(self, built: CorpusTree) -> None:
        self.members, self._first = _members(built), _first_probes(built)
        self._probes = np.load(built.corpus.work.path(PROBE_VECTORS), mmap_mode="r")  # [p, dim]

    def vectors(self, leaf: Path) -> np.ndarray | None:
        """[n, dim] of a leaf's windows in order; None where it has none."""
        members = self.members.get(leaf)
        return np.asarray(self._probes[self._first[members]]) if members else None


def learnt_sources(built: CorpusTree) -> Iterator[LeafSources]:
    """Leaf after leaf, in the order that `write_sources` wants."""
    found = WindowVectors(built)
    for leaf in sorted(found.members, key=order):
        vectors = found.vectors(leaf)
        assert vectors is not None
        yield LeafSources(leaf, [_kept(window) for window in built.corpus.read(found.members[leaf])], vectors)


def more_sources(
    old: BankSources, built: CorpusTree | None, new_leaf: Path | None = None, gone: Collection[str] = ()
) -> Iterator[LeafSources]:
    """A bank's sources without those that are `gone` (by `text_digest`), and those of documents that are added.

    A new leaf has the old windows that now go there.
    """
    added = {one.leaf: one for one in learnt_sources(built)} if built else {}
    if built and new_leaf and (moved := _moved(old, built.tree, new_leaf)):
        added[new_leaf] = _together(moved, added.get(new_leaf))
    for leaf in sorted({*old.leaves(), *added}, key=order):
        if (found := old.read(leaf)) and (left := _without(found, gone)).windows:
            yield _together(left, added.get(leaf))
        elif leaf in added:
            yield added[leaf]


def passage_reach(built: CorpusTree) -> float:
    """How far from its passage a question may be: most of a window's probes are that near to the window.

    The others are sentences and questions that name nothing. A bank that took them in would take in all the world.
    """
    first, work = _first_probes(built), built.corpus.work
    probes = np.load(work.path(PROBE_VECTORS), mmap_mode="r")  # [p, dim]
    windows = [-1 if "held_out" in row else row["window"] for row in read_rows(work.path(PROBES))]
    step = max(1, len(windows) // MEASURED)
    some = np.array([at for at in range(0, len(windows), step) if windows[at] >= 0])
    own = first[np.array(windows)[some]]  # [n]: the probe that is the whole window
    distances = np.linalg.norm(probes[some] - probes[own], axis=1)
    return math.ceil(1e4 * float(np.quantile(distances, MOST))) / 1e4


def _without(found: LeafSources, gone: Collection[str]) -> LeafSources:
    left = [number for number, one in enumerate(found.windows) if text_digest(one.document, one.text) not in gone]
    return LeafSources(found.leaf, [found.windows[number] for number in left], found.vectors[left])


def _kept(window: Window) -> SourceWindow:
    return SourceWindow(window.source, window.title, window.place, window.text)


def _members(built: CorpusTree) -> Mapping[Path, list[int]]:
    """Leaf -> the numbers of its windows, in order."""
    found: dict[Path, list[int]] = {}
    for placed in built.placed():
        for leaf in placed.leaves:
            found.setdefault(leaf, []).append(placed.window)
    return found


def _first_probes(built: CorpusTree) -> np.ndarray:
    """Each window's first probe [windows]: the window as a whole, so that it need not be embedded again."""
    first: list[int] = []
    for number, row in enumerate(read_rows(built.corpus.work.path(PROBES))):
        if len(first) == built.corpus.count:
            break
        if row["window"] == len(first):
            first.append(number)
    return np.array(first, np.int64)


def _moved(old: BankSources, tree: ClusterTree, leaf: Path) -> LeafSources | None:
    """The old windows that the tree with its new leaf takes there."""
    windows, vectors = dict[SourceWindow, None](), list[np.ndarray]()
    for one in old.all():
        levels, rows = descend(tree, one.vectors)
        for window, vector, level, row in zip(
            one.windows, one.vectors, levels.tolist(), rows.tolist(), strict=True
        ):
            if window not in windows and Path.of_row(row, level, tree.branching) == leaf:
                windows[window] = None
                vectors.append(vector)
    return LeafSources(leaf, list(windows), np.stack(vectors)) if windows else None


def _together(first: LeafSources, second: LeafSources | None) -> LeafSources:
    """The windows of both. One that both have is there once: an interrupted command adds its documents again."""
    if second is None:
        return first
    known = set(first.windows)
    new = [number for number, window in enumerate(second.windows) if window not in known]
    windows: Sequence[SourceWindow] = [*first.windows, *(second.windows[number] for number in new)]
    return LeafSources(first.leaf, windows, np.concatenate([first.vectors, second.vectors[new]]))
