"""Routing agreement: a question must reach a leaf in which its answer was learnt.

Two steps see to it, for any corpus. Once a node's windows are divided among its children, its centroids are
moved until the windows' probes are nearest to their own child (`Separation`): k-means puts them where the windows
are, but nearest-centroid routing is a linear classifier, and this one is trained to tell the subjects apart in
whatever wording. Then a window is learnt where its probes go, and where they nearly go (`place`): that is where
questions of yet other wordings go. benchmarks/results/routing_agreement.md has what each is worth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.learn.settings import TreeSettings
from mlx_hiermem.learn.tree.kmeans import CHUNK, squared
from mlx_hiermem.learn.tree.probes import ProbeVectors
from mlx_hiermem.tree import ClusterTree

STEPS, BATCH, RATE = 150, 8192, 0.02  # of Adam; the batch is the probes of a step
SHARPNESS = 30.0  # turns squared distances of about 0.1 into logits that differ by a few units
DOUBT = 5.0  # the same where other wordings than the probes are reckoned with: less sure by so much
HOLD = 3e-2  # pulls the centroids to where k-means put them: else text of other kinds is no farther than probes
ROOM = 1.05  # a bank reaches so much farther: people word things otherwise than its probes
NEARLY_ALL = 0.995  # of the probes are within a bank's reach
MEASURED = 100_000  # probes, about, that say how far that is
LEAST = 0.05  # a leaf that is less likely than this does not get it


@dataclass(frozen=True, eq=False)
class Separation:
    """Moves a node's centroids until its windows' probes are nearest to their own child; a `kmeans.Tune`.

    `turned` are questions for what a window is about, given something that it says. They weigh half as much, and
    shape neither clusters nor places: by these a window would be far from its like.
    """

    probes: ProbeVectors
    turned: ProbeVectors | None = None

    def __call__(
        self, members: np.ndarray, child: np.ndarray, centroids: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """members [m] and the child of each [m], centroids [k, dim] -> better centroids [k, dim]."""
        start, moving = centroids.astype(np.float32), centroids.astype(np.float32)  # [k, dim]
        mean, spread = np.zeros_like(moving), np.zeros_like(moving)  # Adam's moments
        parts = [_Part(self.probes, members, 1.0)]
        if self.turned and (turned := _Part(self.turned, members, 1 / 3)).any:
            parts = [_Part(self.probes, members, 2 / 3), turned]
        for step in range(1, STEPS + 1):
            gradient = 2 * HOLD * (moving - start)
            for points, owner, weight in (part.draw(rng) for part in parts):
                gradient += self._gradient(moving, points, child[owner], weight)
            mean = 0.9 * mean + 0.1 * gradient
            spread = 0.999 * spread + 0.001 * gradient**2
            rate = RATE * (1 - (step - 1) / STEPS)  # at a constant one some nodes end in the middle of a leap
            moving -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(spread / (1 - 0.999**step)) + 1e-8)
        return moving

    @staticmethod
    def _gradient(centroids: np.ndarray, points: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The gradient [k, dim] of the weighted cross-entropy of softmax(-SHARPNESS * squared distance).

        points [b, dim], their right child `label` [b], weight [b].
        """
        logits = -SHARPNESS * squared(points, centroids)  # [b, k]
        logits -= logits.max(1, keepdims=True)
        wrong = np.exp(logits)  # the softmax, less 1 at the labels
        wrong /= wrong.sum(1, keepdims=True)
        wrong[np.arange(len(label)), label] -= 1
        wrong *= weight[:, None]
        return -2 * SHARPNESS * (centroids * wrong.sum(0)[:, None] - wrong.T @ points)


class _Part:
    """Probes of some windows, for the steps of `Separation`.

    Each window weighs the same, one in all `members` times `weight`; one without probes weighs nothing.
    """

    def __init__(self, probes: ProbeVectors, members: np.ndarray, weight: float) -> None:
        self._probes, self._members, self._weight = probes, members, weight
        self._counts = probes.first[members + 1] - probes.first[members]  # [m]
        self._having = np.flatnonzero(self._counts)  # places among the members
        self.any = len(self._having) > 0
        self._fixed = self._all() if self._counts.sum() <= BATCH else None

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(points [b, dim], whose they are among the members [b], weights [b]): every probe.

        Where these are many, the same in expectation: windows drawn evenly, of each one probe.
        """
        if self._fixed:
            return self._fixed
        owner = self._having[rng.integers(len(self._having), size=BATCH)]
        chosen = self._probes.first[self._members[owner]]
        chosen = chosen + (rng.random(BATCH) * self._counts[owner]).astype(np.int64)
        order = np.argsort(chosen)  # a memory map is read forwards
        weight = self._weight * len(self._having) / len(self._members) / BATCH
        return np.asarray(self._probes.vectors[chosen[order]]), owner[order], np.full(BATCH, weight, np.float32)

    def _all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen, owner = self._probes.of_windows(self._members)
        weight = self._weight / (self._counts[owner] * len(self._members))
        return np.asarray(self._probes.vectors[chosen]), owner, weight.astype(np.float32)


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
