"""Hierarchical balanced k-means: from one vector a window to a cluster tree (arXiv:2510.02375, App. C).

Every node is split by EM over fresh samples of its windows, from the root to the leaves; a cluster that draws
more than 1.5/k of a sample shares with the smallest one. Then each window goes to the nearest centroid that has
room, all having room for an even share, and the children are split in their turn. A node with too few windows stays
a leaf, so the tree is ragged. Each node has a random generator of its own, made of the seed and the node, so the
order of work does not matter.

Vectors may be a memory map: only samples and chunks of it are read. Nine bytes a window are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.errors import CorpusError
from mlx_hiermem.tree import ClusterTree

STEPS, SAMPLE = 20, 6400  # App. C
BALANCE = 1.5  # a cluster draws at most so many times its even share of a sample: 0.094 of it at k = 16
RESTARTS = 8  # of a node that one sample holds whole; there the start matters, and costs nothing
SMALLEST = 3  # windows in a child, on average, for a node to be split at all
LEAF = 8  # windows in a leaf that the default shape aims at
WIDEST, DEEPEST = 16, 4  # the paper's tree
CHUNK = 1 << 14  # rows compared with the centroids at a time

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
