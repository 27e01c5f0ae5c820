"""The clustering tree: centroids on disk, and greedy routing down them.

One matrix of k centroids per node. Routing compares a text's embedding with the k children of the current
node and goes to the nearest, level by level: k*p comparisons instead of k^p (arXiv:2510.02375, §2.1).
Centroids stay on disk, memory-mapped: the paper's 16^4 leaves are 107 MB, of which a route touches 96 KB.
Plain numpy: the work is too small for a GPU to be worth a synchronisation.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError


@dataclass(frozen=True)
class Route:
    """Where a text went: the path, and the distance to the chosen centroid at each level."""

    path: Path
    distances: tuple[float, ...]


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

    def route(self, embeddings: np.ndarray) -> list[Route]:
        """Greedy descent to the nearest child (L2, the lowest index wins a tie).

        [n, dim] embeddings -> n routes; a single [dim] embedding counts as n = 1.
        """
        vectors = np.atleast_2d(np.asarray(embeddings, dtype=np.float32))
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise BankError(
                f"embeddings are {vectors.shape}, the tree's centroids have {self.dim} values",
                "Use the embedder that the bank's manifest names.",
            )
        return [self._descend(vector) for vector in vectors]

    def _descend(self, vector: np.ndarray) -> Route:
        node, children, distances = 0, [], []
        for centroids, present in zip(self.centroids, self.present, strict=True):
            if not present[node].any():
                break
            distance = np.linalg.norm(centroids[node] - vector, axis=1)
            child = int(np.where(present[node], distance, np.inf).argmin())
            children.append(child)
            distances.append(float(distance[child]))
            node = node * self.branching + child
        return Route(Path(children), tuple(distances))

    def distances(self, vector: np.ndarray, node: Path) -> np.ndarray:
        """[k] L2 distances from one embedding to the children of `node` (inf where there is none)."""
        row = node.row(self.branching)
        distance = np.linalg.norm(self.centroids[len(node)][row] - vector, axis=1)
        return np.where(self.present[len(node)][row], distance, np.inf)

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
        try:
            arrays = _map_safetensors(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BankError(f"cannot read the tree {file}: {error}") from error
        centroids: list[np.ndarray] = []
        present: list[np.ndarray] = []
        while f"level{len(centroids) + 1}.centroids" in arrays:
            level = len(centroids) + 1
            c = arrays[f"level{level}.centroids"]
            centroids.append(c)
            present.append(arrays.get(f"level{level}.present", np.ones(c.shape[:2], dtype=bool)))
        return cls(centroids, present)


def _map_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """name -> read-only memory-mapped array; safetensors' own reader copies whole tensors."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError("the file is truncated")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    types = {"F32": np.dtype("<f4"), "BOOL": np.dtype(bool)}
    data = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + size)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise ValueError("the file is truncated")
        arrays[name] = data[begin:end].view(types[entry["dtype"]]).reshape(entry["shape"])
    return arrays
