"""Hierarchical balanced k-means: from one vector a window to a cluster tree (arXiv:2510.02375, App. C).

Every node is split by EM over fresh samples of its windows, from the root to the leaves; a cluster that draws
more than 1.5/k of a sample shares with the smallest one. Then each window goes to the nearest centroid that has
room, all having room for an even share, and the children are split in their turn. A node with too few windows stays
a leaf, so the tree is ragged. Each node has a random generator of its own, made of the seed and the node, so the
order of work does not matter.

Once a node's windows are divided among its children, its centroids are moved until the windows' probes are nearest
to their own child (`Separation`): k-means puts them where the windows are, but nearest-centroid routing is a linear
classifier, and this one is trained to tell the subjects apart in whatever wording.
benchmarks/results/routing_agreement.md has what that is worth.

Vectors may be a memory map: only samples and chunks of it are read. Nine bytes a window are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.errors import CorpusError
from mlx_hiermem.learn.tree.probes import ProbeVectors
from mlx_hiermem.tree import ClusterTree

STEPS, SAMPLE = 20, 6400  # App. C
BALANCE = 1.5  # a cluster draws at most so many times its even share of a sample: 0.094 of it at k = 16
RESTARTS = 8  # of a node that one sample holds whole; there the start matters, and costs nothing
SMALLEST = 3  # windows in a child, on average, for a node to be split at all
LEAF = 8  # windows in a leaf that the default shape aims at
WIDEST, DEEPEST = 16, 4  # the paper's tree
CHUNK = 1 << 14  # rows compared with the centroids at a time
MOVES, PROBES_A_MOVE, RATE = 150, 8192, 0.02  # of `Separation`'s Adam
SHARPNESS = 30.0  # turns squared distances of about 0.1 into logits that differ by a few units
HOLD = 3e-2  # pulls the centroids to where k-means put them: else text of other kinds is no farther than probes

# (the node's windows, the child of each, its [k, dim] centroids, random numbers) -> better centroids
Tune = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """k children of every node, at most `depth` levels."""

    branching: int
    depth: int

    def __post_init__(self) -> None:
        if self.branching < 2 or not 1 <= self.depth <= 8:
            raise CorpusError(
                f"a tree cannot have {self.depth} levels of {self.branching} children", "Two children or more."
            )

    @classmethod
    def of(cls, windows: int) -> Shape:
        """Two levels or more, leaves of about `LEAF` windows, and the paper's 16 children at most."""
        leaves = max(windows / LEAF, 4)
        depth = min(max(math.ceil(math.log(leaves, WIDEST)), 2), DEEPEST)
        return cls(min(max(round(leaves ** (1 / depth)), 2), WIDEST), depth)


@dataclass(frozen=True, eq=False)
class Clustering:
    """The tree, and the leaf of each window: its level and its row there."""

    tree: ClusterTree
    level: np.ndarray  # [n] int8
    row: np.ndarray  # [n] int64

    def leaf(self, window: int) -> Path:
        """The leaf that a window was assigned to."""
        return Path.of_row(int(self.row[window]), int(self.level[window]), self.tree.branching)


def check_size(windows: int) -> None:
    """Raises CorpusError for fewer than two."""
    if windows < 2:
        raise CorpusError(
            f"the corpus has {windows} window{'s' * (windows != 1)} of text",
            "A tree needs two or more: give more documents.",
        )


def grow(
    vectors: np.ndarray,
    shape: Shape,
    seed: int = 0,
    tune: Tune | None = None,
    balance: float = 1.0,
) -> Clustering:
    """[n, dim] unit vectors -> the tree. `tune` may move a node's centroids once its windows are assigned.

    Raises CorpusError for fewer than two windows.
    """
    n, k = len(vectors), shape.branching
    check_size(n)
    level, row = np.zeros(n, np.int8), np.zeros(n, np.int64)
    centroids, present = [], []
    for depth in range(shape.depth):
        centroids.append(np.zeros((k**depth, k, vectors.shape[1]), np.float32))
        present.append(np.zeros((k**depth, k), bool))
        for node, members in _groups(level, row, depth):
            children = min(k, len(members) // SMALLEST)
            if children < 2:
                if depth:
                    continue
                children = 1  # a bank has at least one block
            rng = np.random.default_rng([seed, depth, node])
            found = kmeans(vectors, members, children, rng)
            child = assign(vectors, members, found, math.ceil(balance * len(members) / children))
            if tune and children > 1:
                found = tune(members, child, found, rng)
            centroids[depth][node, :children] = found
            present[depth][node, :children] = np.bincount(child, minlength=children) > 0
            level[members], row[members] = depth + 1, node * k + child
        if not present[depth].any():
            centroids.pop(), present.pop()
            break
    return Clustering(ClusterTree(centroids, present), level, row)


def _groups(level: np.ndarray, row: np.ndarray, depth: int) -> list[tuple[int, np.ndarray]]:
    """(row, its windows) of every node at a level, in row order."""
    inside = np.flatnonzero(level == depth)
    inside = inside[np.argsort(row[inside], kind="stable")]
    nodes, starts = np.unique(row[inside], return_index=True)
    return list(zip(map(int, nodes), np.split(inside, starts[1:]), strict=True))


def kmeans(
    vectors: np.ndarray,
    rows: np.ndarray,
    k: int,
    rng: np.random.Generator,
    steps: int = STEPS,
    sample: int = SAMPLE,
) -> np.ndarray:
    """[k, dim] centroids of the vectors at `rows`: k-means++, then EM over a fresh sample each step (App. C)."""
    if len(rows) > sample:
        return _em(lambda: vectors[np.sort(rng.choice(rows, sample, replace=False, shuffle=False))], k, rng, steps)
    points = np.asarray(vectors[rows])
    runs = [_em(lambda: points, k, rng, steps) for _ in range(RESTARTS if k > 1 else 1)]
    return min(runs, key=lambda centroids: float(squared(points, centroids).min(1).sum()))


def _em(draw: Callable[[], np.ndarray], k: int, rng: np.random.Generator, steps: int) -> np.ndarray:
    centroids = plus_plus(draw(), k, rng)  # [k, dim]
    for _ in range(steps):
        points = draw()  # [sample, dim]
        child = squared(points, centroids).argmin(1)  # [sample]
        rebalance(child, k, rng)
        member = np.eye(k, dtype=np.float32)[child]  # [sample, k]; a product is faster than np.add.at
        count = member.sum(0)[:, None]
        centroids = np.where(count > 0, member.T @ points / np.maximum(count, 1), centroids)
    return centroids


def plus_plus(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """[k, dim]: points, each drawn in proportion to its squared distance from those before (Arthur, 2007)."""
    chosen = [int(rng.integers(len(points)))]
    nearest = squared(points, points[chosen])[:, 0].astype(np.float64)
    for _ in range(k - 1):
        total = nearest.sum()
        draw = int(rng.choice(len(points), p=nearest / total) if total > 0 else rng.integers(len(points)))
        chosen.append(draw)
        nearest = np.minimum(nearest, squared(points, points[[draw]])[:, 0])
    return np.array(points[chosen], np.float32)


def rebalance(child: np.ndarray, k: int, rng: np.random.Generator) -> None:
    """The balance rule (App. C), in place on child [n]: a large cluster is split at random with the smallest."""
    for _ in range(k):
        count = np.bincount(child, minlength=k)
        largest, smallest = int(count.argmax()), int(count.argmin())
        if count[largest] <= BALANCE * len(child) / k or count[largest] - count[smallest] < 2:
            return
        shuffled = rng.permutation(np.flatnonzero((child == largest) | (child == smallest)))
        child[shuffled[: len(shuffled) // 2]] = largest
        child[shuffled[len(shuffled) // 2 :]] = smallest


def assign(vectors: np.ndarray, rows: np.ndarray, centroids: np.ndarray, most: int) -> np.ndarray:
    """[n]: for each row the nearest centroid that has room, of `most` each; the others go elsewhere."""
    child = np.full(len(rows), -1, np.int64)
    room = np.full(len(centroids), most)
    while len(waiting := np.flatnonzero(child < 0)):
        nearest, gain = _nearest(vectors, rows[waiting], centroids, room > 0)  # [waiting] each
        for j in np.flatnonzero(room > 0):
            mine = np.flatnonzero(nearest == j)
            mine = mine[np.argsort(-gain[mine], kind="stable")][: room[j]]
            child[waiting[mine]] = j
            room[j] -= len(mine)
    return child


def _nearest(
    vectors: np.ndarray, rows: np.ndarray, centroids: np.ndarray, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each row [n] the nearest allowed centroid, and how much farther the next one is."""
    nearest, gain = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        distance = np.where(allowed, squared(vectors[rows[part]], centroids), np.inf)  # [chunk, k]
        nearest[part] = distance.argmin(1)
        if allowed.sum() > 1:
            two = np.partition(distance, 1, axis=1)
            gain[part] = two[:, 1] - two[:, 0]
        else:
            gain[part] = 0
    return nearest, gain


def squared(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """[n, dim], [k, dim] -> [n, k] squared distances, never below 0."""
    products = points @ centroids.T
    lengths = np.einsum("nd,nd->n", points, points)[:, None] + np.einsum("kd,kd->k", centroids, centroids)
    return np.maximum(lengths - 2 * products, 0)


# Centroids that tell subjects apart


@dataclass(frozen=True, eq=False)
class Separation:
    """Moves a node's centroids until its windows' probes are nearest to their own child; a `Tune`.

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
        for step in range(1, MOVES + 1):
            gradient = 2 * HOLD * (moving - start)
            for points, owner, weight in (part.draw(rng) for part in parts):
                gradient += self._gradient(moving, points, child[owner], weight)
            mean = 0.9 * mean + 0.1 * gradient
            spread = 0.999 * spread + 0.001 * gradient**2
            rate = RATE * (1 - (step - 1) / MOVES)  # at a constant one some nodes end in the middle of a leap
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
        self._fixed = self._all() if self._counts.sum() <= PROBES_A_MOVE else None

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(points [b, dim], whose they are among the members [b], weights [b]): every probe.

        Where these are many, the same in expectation: windows drawn evenly, of each one probe.
        """
        if self._fixed:
            return self._fixed
        owner = self._having[rng.integers(len(self._having), size=PROBES_A_MOVE)]
        chosen = self._probes.first[self._members[owner]]
        chosen = chosen + (rng.random(PROBES_A_MOVE) * self._counts[owner]).astype(np.int64)
        order = np.argsort(chosen)  # a memory map is read forwards
        weight = self._weight * len(self._having) / len(self._members) / PROBES_A_MOVE
        return (
            np.asarray(self._probes.vectors[chosen[order]]),
            owner[order],
            np.full(PROBES_A_MOVE, weight, np.float32),
        )

    def _all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen, owner = self._probes.of_windows(self._members)
        weight = self._weight / (self._counts[owner] * len(self._members))
        return np.asarray(self._probes.vectors[chosen]), owner, weight.astype(np.float32)
