"""The windows that a bank keeps as its sources: each in the leaves that have learnt it, with its vector."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from mlx_hiermem.bank.manifest import order
from mlx_hiermem.bank.sources import BankSources, LeafSources, SourceWindow
from mlx_hiermem.config import Path
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.record import text_digest
from mlx_hiermem.learn.tree.build import CorpusTree, descend
from mlx_hiermem.learn.work import PROBE_VECTORS, PROBES, read_rows
from mlx_hiermem.tree import ClusterTree

MOST = 0.95  # of the probes are within a bank's reach; what is farther names nothing: "It was one of the last"
MEASURED = 100_000  # probes, about, that say how far that is


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
