"""From windows to a tree, and to the leaves in which each window is learnt: the stages `probes` to `tree`.

A question must reach a leaf in which its answer was learnt. So a window is learnt where its probes go, and where
they nearly go (`place`): that is where questions of yet other wordings go. `agreement` measures it on questions
that shape nothing.

built = build_tree(work, corpus, embedder, TreeSettings())      # or place_in_tree, for a tree that is there
built.tree, built.agreement
for placed in built.placed(): ...
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_hiermem.config import ROOT, Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.settings import TreeSettings
from mlx_hiermem.learn.tree.kmeans import CHUNK, Separation, Shape, grow, squared
from mlx_hiermem.learn.tree.probes import EmbeddedProbes, ProbeVectors, embed_probes
from mlx_hiermem.learn.work import (
    AGREEMENT,
    LEAVES_FILE,
    MEANS,
    TREE,
    Ranks,
    Work,
    read_rows,
    write_rows,
    write_text,
)
from mlx_hiermem.progress import Progress, unheard
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.tree import ClusterTree

DOUBT = 5.0  # as kmeans.SHARPNESS, where other wordings than the probes are reckoned with: less sure by so much
ROOM = 1.05  # a bank reaches so much farther: people word things otherwise than its probes
NEARLY_ALL = 0.995  # of the probes are within a bank's reach
MEASURED = 100_000  # probes, about, that say how far that is
LEAST = 0.05  # a leaf that is less likely than this does not get it


@dataclass(frozen=True)
class Placed:
    """The leaves in which a window is learnt. The first is its own: labels and sizes count it there."""

    window: int
    leaves: tuple[Path, ...]


@dataclass(frozen=True)
class CorpusTree:
    """A corpus' tree on disk, and which window is learnt where; `digest` says what both were made of."""

    corpus: Corpus
    digest: str

    @property
    def tree(self) -> ClusterTree:
        return ClusterTree.load(self.corpus.work.path(TREE))

    @property
    def agreement(self) -> dict[str, Any]:
        """agreement.json: the tree's shape, and what was measured (None where there was no question for it)."""
        return json.loads(self.corpus.work.path(AGREEMENT).read_text(encoding="utf-8"))

    def placed(self) -> Iterator[Placed]:
        """The leaves of every window, by its number."""
        for row in read_rows(self.corpus.work.path(LEAVES_FILE)):
            yield Placed(row["window"], tuple(map(Path.parse, row["leaves"])))


def build_tree(
    work: Work,
    corpus: Corpus,
    embedder: TextEmbedder,
    settings: TreeSettings = TreeSettings(),
    progress: Progress = unheard,
    ranks: Ranks | None = None,
) -> CorpusTree:
    """Stages `probes`, `vectors` and `tree`. `progress` counts the embedded probes.

    Raises CorpusError for a corpus of one window.
    """
    embedded = embed_probes(work, corpus, embedder, progress, ranks)

    def make() -> None:
        found = EmbeddedProbes.read(work, corpus)
        means = np.load(work.path(MEANS), mmap_mode="r")
        shape, tune = _shape(settings, corpus.count), Separation(found.plain, found.turned)
        tree = grow(means, shape, settings.seed, tune, settings.balance).tree
        tree.save(work.path(TREE))
        _place(work, found, tree, settings.leaves)

    return CorpusTree(corpus, work.stage("tree", asdict(settings), [embedded], make))


def _shape(settings: TreeSettings, windows: int) -> Shape:
    """The shape that is asked for, and where none is, the one that suits so many windows."""
    chosen = Shape.of(windows)
    return Shape(settings.branching or chosen.branching, settings.depth or chosen.depth)


def place_in_tree(
    work: Work,
    corpus: Corpus,
    embedder: TextEmbedder,
    choose: Callable[[np.ndarray], ClusterTree],
    of: str,
    leaves: int = TreeSettings.leaves,
    progress: Progress = unheard,
) -> CorpusTree:
    """The same for a tree that is there: `choose` gives it for the [windows, dim] means; `of` says which it is."""
    embedded = embed_probes(work, corpus, embedder, progress)

    def make() -> None:
        found = EmbeddedProbes.read(work, corpus)
        tree = choose(np.load(work.path(MEANS)))
        tree.save(work.path(TREE))
        _place(work, found, tree, leaves)

    return CorpusTree(corpus, work.stage("tree", [of, leaves], [embedded], make))


def _place(work: Work, found: EmbeddedProbes, tree: ClusterTree, most: int) -> None:
    """Writes which window is learnt where, and how many of the held-out questions reach one of theirs."""
    placed, wanted, total = dict[int, tuple[Path, ...]](), set(found.asked.tolist()), 0
    windows = len(found.plain.first) - 1

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal total
        for window, leaves in enumerate(place(tree, found.plain, most)):
            total += len(leaves)
            if window in wanted:
                placed[window] = leaves
            yield {"window": window, "leaves": [str(leaf) for leaf in leaves]}

    write_rows(work.path(LEAVES_FILE), rows())

    def agreed(of: np.ndarray) -> float | None:
        answers = [[int(window)] for window in found.asked[of]]
        return agreement(tree, placed, found.held_out[of], answers) if answers else None

    report = {
        "branching": tree.branching,
        "depth": tree.depth,
        "windows": windows,
        "leaves_a_window": total / windows,
        "questions": int((~found.backwards).sum()),
        "agreement": agreed(~found.backwards),
        "reversed_questions": int(found.backwards.sum()),
        "reversed_agreement": agreed(found.backwards),
        "reach": reach_of(tree, found.shaping),
    }
    write_text(work.path(AGREEMENT), json.dumps(report, indent=1) + "\n")


def given_agreement(built: CorpusTree, embedder: TextEmbedder, questions: Sequence[tuple[str, str]]) -> float:
    """Share of given questions that reach a leaf of the document that answers them.

    Each is (question, the document's source or title); the corpus has all of these (`check_asked`).
    """
    answers = defaultdict[str, list[int]](list)
    wanted, placed = {document for _, document in questions}, dict[int, tuple[Path, ...]]()
    for window, place_ in zip(built.corpus.windows(), built.placed(), strict=True):
        for name in wanted.intersection((window.source, window.title)):
            answers[name].append(window.id)
            placed[window.id] = place_.leaves
    vectors_ = embedder.embed([question for question, _ in questions])
    return agreement(built.tree, placed, vectors_, [answers[document] for _, document in questions])


# Where vectors go


def descend(tree: ClusterTree, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of many vectors [n, dim] goes, as `ClusterTree.route` has it: (levels [n], rows at them [n])."""
    level, row = np.zeros(len(vectors), np.int64), np.zeros(len(vectors), np.int64)
    for start in range(0, len(vectors), CHUNK):
        part = slice(start, start + CHUNK)
        level[part], row[part] = _descend(tree, np.asarray(vectors[part]))
    return level, row


def _descend(tree: ClusterTree, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, dim] -> (levels [n], rows [n])."""
    level, row = np.zeros(len(points), np.int64), np.zeros(len(points), np.int64)
    for depth, (centroids, present) in enumerate(zip(tree.centroids, tree.present, strict=True)):
        going = np.flatnonzero((level == depth) & present[row].any(1))  # points at nodes that have children
        order = going[np.argsort(row[going], kind="stable")]
        nodes, starts = np.unique(row[order], return_index=True)
        for node, inside in zip(nodes, np.split(order, starts[1:]), strict=True):
            distance = np.where(present[node], squared(points[inside], centroids[node]), np.inf)  # [m, k]
            row[inside] = node * tree.branching + distance.argmin(1)
            level[inside] = depth + 1
    return level, row


def reach_of(tree: ClusterTree, vectors: np.ndarray) -> float:
    """How far a bank reaches: all but one in 200 of these [n, dim] probes are within it, with `ROOM`."""
    some = np.asarray(vectors[:: max(1, len(vectors) // MEASURED)])
    levels, rows = descend(tree, some)
    ends = np.stack(  # [n, dim]: the centroid that each arrives at
        [tree.centroids[level - 1].reshape(-1, tree.dim)[row] for level, row in zip(levels, rows, strict=True)]
    )
    return math.ceil(1e4 * ROOM * np.quantile(np.linalg.norm(some - ends, axis=1), NEARLY_ALL)) / 1e4


def place(tree: ClusterTree, probes: ProbeVectors, most: int = TreeSettings.leaves) -> Iterator[tuple[Path, ...]]:
    """The leaves of each window, in order, `most` at most: those that its probes are likeliest to reach.

    How likely is taken from the distances, as in `Separation`, level by level. Of the branches of a node only the
    likeliest two are looked into, so a probe considers 2^depth leaves. The first leaf is the window's own.
    """
    for start in range(0, len(probes.first) - 1, 256):
        bounds = probes.first[start : start + 257]
        levels, rows, likely = _likely(tree, np.asarray(probes.vectors[bounds[0] : bounds[-1]]))
        for begin, end in zip(bounds[:-1] - bounds[0], bounds[1:] - bounds[0], strict=True):
            expected: Counter[tuple[int, int]] = Counter()  # (level, row) of a leaf -> how many probes reach it
            own = (part[begin:end].ravel().tolist() for part in (levels, rows, likely))
            for level, row, probability in zip(*own, strict=True):
                expected[level, row] += probability
            ranked = sorted(expected, key=lambda leaf: (-expected[leaf], leaf))
            kept = [leaf for leaf in ranked[:most] if expected[leaf] >= LEAST * (end - begin)] or ranked[:1]
            yield tuple(Path.of_row(row, level, tree.branching) for level, row in kept)


def _likely(tree: ClusterTree, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points [n, dim] -> (levels, rows, probabilities), each [n, b]: leaves that each may reach, and how likely.

    b is 2^depth: every branch is split in two at each level. What only fills up has probability 0.
    """
    n, k = len(points), tree.branching
    level, row = np.zeros((n, 1), np.int64), np.zeros((n, 1), np.int64)
    probability = np.ones((n, 1))
    for depth, (centroids, present) in enumerate(zip(tree.centroids, tree.present, strict=True)):
        going = (level == depth) & present[row].any(2)  # bool [n, b]: branches that have children
        before, arriving = row, probability
        # Every branch becomes two; of one that has ended, or has an only child, the second is a filler.
        level, row = np.repeat(level, 2, axis=1), np.repeat(row, 2, axis=1)  # [n, 2b]
        probability = np.repeat(probability, 2, axis=1)
        probability[:, 1::2] = 0
        for node in np.unique(before[going]):
            point, branch = np.nonzero(going & (before == node))  # [m] each
            likely = np.where(present[node], -DOUBT * squared(points[point], centroids[node]), -np.inf)  # [m, k]
            likely = np.exp(likely - likely.max(1, keepdims=True))
            likely /= likely.sum(1, keepdims=True)
            best = np.argsort(-likely, axis=1, kind="stable")[:, :2]  # [m, 2]: the likeliest two children
            for second in range(2):
                at = point, 2 * branch + second
                level[at], row[at] = depth + 1, node * k + best[:, second]
                probability[at] = arriving[point, branch] * likely[np.arange(len(point)), best[:, second]]
    return level, row, probability


def agreement(
    tree: ClusterTree,
    placed: Sequence[Sequence[Path]] | Mapping[int, Sequence[Path]],
    vectors: np.ndarray,
    windows: Sequence[Sequence[int]],
) -> float:
    """Share of questions that reach a leaf of a window with their answer.

    [n, dim] embeddings of the questions, and the windows that answer each.
    """
    levels, rows = descend(tree, vectors)
    reached = (Path.of_row(int(row), int(level), tree.branching) for level, row in zip(levels, rows, strict=True))
    hits = [any(leaf in placed[window] for window in own) for leaf, own in zip(reached, windows, strict=True)]
    return sum(hits) / len(hits) if hits else 0.0


# A leaf of its own, for documents that are added


def with_new_leaf(tree: ClusterTree) -> Callable[[np.ndarray], ClusterTree]:
    """Means [n, dim] of new windows -> the tree with a leaf for them, below the node that most of them pass.

    Of the nodes with room the deepest that most pass is taken; the centroid is the middle of them all. Raises
    BankError where no node on their way has room.
    """

    def choose(means: np.ndarray) -> ClusterTree:
        levels, rows = descend(tree, means)
        passed: dict[Path, int] = {ROOT: len(means)}
        for level, row in zip(levels.tolist(), rows.tolist(), strict=True):
            for node in Path.of_row(row, level, tree.branching).prefixes():
                passed[node] = passed.get(node, 0) + 1
        roomy = [node for node in passed if len(node) < tree.depth and _room(tree, node) is not None]
        if not roomy:
            raise BankError("the bank's tree has no room for a leaf near these documents", "Leave out --new-leaf.")
        best = max(roomy, key=lambda node: (2 * passed[node] > len(means), len(node), passed[node]))
        return tree.with_node(Path((*best, _room(tree, best) or 0)), means.mean(0).astype(np.float32))

    return choose


def _room(tree: ClusterTree, node: Path) -> int | None:
    """A child's place that is free at a node."""
    present = tree.present[len(node)][node.row(tree.branching)]
    return None if present.all() else int(np.flatnonzero(~present)[0])


def added_node(tree: ClusterTree, known: ClusterTree) -> Path | None:
    """The node that one tree has and the other has not."""
    for level in range(1, tree.depth + 1):
        for node in tree.nodes(level):
            if not known.has(node):
                return node
    return None
