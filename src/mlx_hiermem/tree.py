"""The clustering tree: centroids on disk, and greedy routing down them.

One matrix of k centroids per node. Routing compares a text's embedding with the k children of the current
node and goes to the nearest, level by level: k*p comparisons instead of k^p (arXiv:2510.02375, §2.1).
Centroids stay on disk, memory-mapped: the paper's 16^4 leaves are 107 MB, of which a route touches 96 KB.
Plain numpy: the work is too small for a GPU to be worth a synchronisation.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import ROOT, Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.safetensors_file import map_tensors

ON_BLOCKED = ("sibling", "parent")


@dataclass(frozen=True)
class Route:
    """Where a text went. A path that was named instead has no distances: no text was compared with it."""

    path: Path = ROOT
    distances: tuple[float, ...] = ()  # to the chosen centroid at each level
    avoided: tuple[Path, ...] = ()  # blocked nodes that the text would have entered
    stayed: bool = False  # held on the path of its conversation, see `Router.turn`
    far: bool = False  # beyond the bank's reach: it is like nothing there, and stays at the root
    milliseconds: float = 0.0  # to embed the text and to descend
    passage: float | None = None  # to the nearest passage, where the bank is routed by them (`bank.passages`)
    turns: int = 0  # the conversation's last turns that its topic has had; 0 where that is not known


class ClusterTree:
    """Per level l: centroids [k^(l-1), k, dim] float32 and present [k^(l-1), k] bool.

    A small corpus gives a ragged tree: a child that is not present is never chosen, and a node without
    children ends the path.
    """

    def __init__(self, centroids: Sequence[np.ndarray], present: Sequence[np.ndarray]) -> None:
        if not centroids or len(centroids) != len(present):
            raise BankError("a tree needs centroids and presence for each of its levels")
        self.branching, self.dim = int(centroids[0].shape[-2]), int(centroids[0].shape[-1])
        for level, (c, p) in enumerate(zip(centroids, present, strict=True), 1):
            nodes = self.branching ** (level - 1)
            expected = (nodes, self.branching, self.dim)
            if c.shape != expected or p.shape != expected[:2]:
                raise BankError(
                    f"tree level {level}: centroids are {c.shape} and present {p.shape}, not {expected}",
                    "The tree's levels do not belong together.",
                )
        self.centroids, self.present = list(centroids), list(present)

    @property
    def depth(self) -> int:
        return len(self.centroids)

    def has(self, path: Path) -> bool:
        """Whether the path is a node of this tree, its ancestors included."""
        if not 0 < len(path) <= self.depth or any(not 0 <= c < self.branching for c in path):
            return False
        return all(
            bool(self.present[len(node) - 1][Path(node[:-1]).row(self.branching), node[-1]])
            for node in path.prefixes()
        )

    def nodes(self, level: int) -> list[Path]:
        """All present nodes of a level, in row order."""
        rows = np.flatnonzero(self.present[level - 1].reshape(-1))
        paths = (Path.of_row(int(row), level, self.branching) for row in rows)
        return [path for path in paths if self.has(path)]

    def route(
        self,
        embeddings: np.ndarray,
        blocked: Collection[Path] = (),
        on_blocked: str = "sibling",
        reach: float = np.inf,
    ) -> list[Route]:
        """Greedy descent to the nearest child (L2, the lowest index wins a tie).

        [n, dim] embeddings -> n routes; a single [dim] embedding counts as n = 1. A blocked node is never
        entered: with `sibling` the descent takes the nearest allowed child instead, with `parent` (and where
        no child is allowed) it stops above. A text farther than `reach` from the last node of its path stays
        at the root. Raises BankError for a blocked node that the tree does not have.
        """
        vectors = np.atleast_2d(np.asarray(embeddings, dtype=np.float32))
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise BankError(
                f"embeddings are {vectors.shape}, the tree's centroids have {self.dim} values",
                "Use the embedder that the bank's manifest names.",
            )
        if on_blocked not in ON_BLOCKED:
            raise BankError(f"on_blocked is '{on_blocked}'", f"Use {' or '.join(ON_BLOCKED)}.")
        self.check(blocked)
        barred = {(len(node), node.row(self.branching)) for node in blocked}
        return [self._descend(vector, barred, on_blocked, reach) for vector in vectors]

    def check(self, nodes: Iterable[Path]) -> None:
        """Raises BankError unless each is a node of this tree."""
        for node in nodes:
            if not self.has(node):
                raise BankError(f"the bank's tree has no node {node}", "`hiermem bank ls` shows the nodes.")

    def _descend(
        self, vector: np.ndarray, barred: Collection[tuple[int, int]], on_blocked: str, reach: float
    ) -> Route:
        """`barred` holds (level, row) of the blocked nodes."""
        row, children, distances, avoided = 0, list[int](), list[float](), list[Path]()
        for level, (centroids, present) in enumerate(zip(self.centroids, self.present, strict=True), 1):
            if not present[row].any():
                break
            rows = range(row * self.branching, (row + 1) * self.branching)
            distance = np.where(present[row], np.linalg.norm(centroids[row] - vector, axis=1), np.inf)
            child = int(distance.argmin())  # of a NaN, where there is one
            if not np.isfinite(distance[child]):
                raise BankError("the bank's tree has centroids that are not finite", "Pull or convert it again.")
            if (level, rows[child]) in barred:
                avoided.append(Path((*children, child)))
                allowed = present[row] & [(level, r) not in barred for r in rows]
                if on_blocked == "parent" or not allowed.any():
                    break
                child = int(np.where(allowed, distance, np.inf).argmin())
            children.append(child)
            distances.append(float(distance[child]))
            row = rows[child]
        if distances and distances[-1] > reach:
            return Route(avoided=tuple(avoided), far=True)
        return Route(Path(children), tuple(distances), tuple(avoided))

    def distances(self, vector: np.ndarray, node: Path) -> np.ndarray:
        """[k] L2 distances from one embedding to the children of `node` (inf where there is none)."""
        row = node.row(self.branching)
        distance = np.linalg.norm(self.centroids[len(node)][row] - vector, axis=1)
        return np.where(self.present[len(node)][row], distance, np.inf)

    def distances_on(self, vector: np.ndarray, path: Path) -> tuple[float, ...]:
        """From a [dim] embedding to each node of a path, level 1 first."""
        return tuple(float(self.distances(vector, Path(node[:-1]))[node[-1]]) for node in path.prefixes())

    def beam(self, vector: np.ndarray, width: int) -> list[Path]:
        """The leaves that a beam search finds for one [dim] embedding, nearest first: `width` at most.

        Of each level the `width` nearest nodes are looked into. A leaf is a node without children, at any level.
        """
        ended, going = list[tuple[float, Path]](), [(0.0, ROOT)]
        for level in range(self.depth + 1):
            found = list[tuple[float, Path]]()
            for near, node in going:
                if level == self.depth or not self.present[level][node.row(self.branching)].any():
                    ended.append((near, node))
                    continue
                distances = self.distances(vector, node).tolist()
                found += [(d, Path((*node, child))) for child, d in enumerate(distances) if d < np.inf]
            going = sorted(found)[:width]
        return [node for _, node in sorted(ended)[:width] if node]

    def without(self, nodes: Iterable[Path]) -> ClusterTree:
        """A copy that lacks these nodes and all below them. Their centroids are zero: they were made from data."""
        centroids, present = [np.array(c) for c in self.centroids], [np.array(p) for p in self.present]
        for node in nodes:
            for level in range(len(node), self.depth + 1):
                below = self.branching ** (level - len(node))
                rows = slice(node.row(self.branching) * below, (node.row(self.branching) + 1) * below)
                centroids[level - 1].reshape(-1, self.dim)[rows] = 0
                present[level - 1].reshape(-1)[rows] = False
        return ClusterTree(centroids, present)

    def check_place(self, node: Path) -> None:
        """Raises BankError unless `node` can be in this tree: within its branching and depth, below a node."""
        if not 0 < len(node) <= self.depth or any(not 0 <= child < self.branching for child in node):
            raise BankError(f"the tree ({self.depth} levels of {self.branching} children) has no place for {node}")
        if node[:-1]:
            self.check([Path(node[:-1])])

    def with_node(self, node: Path, centroid: np.ndarray) -> ClusterTree:
        """A copy in which `node` is present, with this [dim] centroid. Raises BankError where it cannot be."""
        self.check_place(node)
        vector = np.asarray(centroid)
        numbers = vector.shape == (self.dim,) and vector.dtype.kind == "f" and np.isfinite(vector).all()
        if not (numbers and vector.any()):  # to zero every text is equally near
            what = "all zero" if numbers else f"{vector.dtype} {vector.shape}"
            raise BankError(
                f"a centroid is {self.dim} finite numbers, this is {what}",
                "Embed an example text instead.",
            )
        copy = self.without([]) if self.has(node) else self.without([node])  # nothing stale below a new node
        copy.centroids[len(node) - 1].reshape(-1, self.dim)[node.row(self.branching)] = vector
        copy.present[len(node) - 1].reshape(-1)[node.row(self.branching)] = True
        return copy

    def save(self, file: pathlib.Path) -> None:
        """Writes `level{l}.centroids` and `level{l}.present` as safetensors."""
        from safetensors.numpy import save

        tensors = {}
        for level, (c, p) in enumerate(zip(self.centroids, self.present, strict=True), 1):
            tensors[f"level{level}.centroids"] = np.ascontiguousarray(c, dtype=np.float32)
            tensors[f"level{level}.present"] = np.ascontiguousarray(p, dtype=bool)
        file.write_bytes(save(tensors))  # save_file would make it readable by its owner alone

    @classmethod
    def load(cls, file: pathlib.Path) -> ClusterTree:
        """Opens a tree file; centroids stay memory-mapped."""
        arrays = map_tensors(file, ("F32", "BOOL"), BankError, "Fetch or convert the bank again.")
        centroids: list[np.ndarray] = []
        present: list[np.ndarray] = []
        while f"level{len(centroids) + 1}.centroids" in arrays:
            level = len(centroids) + 1
            c = arrays[f"level{level}.centroids"]
            centroids.append(c)
            present.append(arrays.get(f"level{level}.present", np.ones(c.shape[:2], dtype=bool)))
        return cls(centroids, present)
