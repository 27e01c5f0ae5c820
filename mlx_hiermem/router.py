"""Text -> path: the sentence embedding, then greedy descent of the clustering tree (arXiv:2510.02375, §2.1)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.tree import ClusterTree


class TextEmbedder(Protocol):
    """What the router needs of an embedder: n texts -> [n, dim]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Routed:
    """Where a text went, the distance to the chosen centroid at each level, and the time it took."""

    path: Path
    distances: tuple[float, ...]
    milliseconds: float


class Router:
    def __init__(self, tree: ClusterTree, embedder: TextEmbedder) -> None:
        self.tree, self.embedder = tree, embedder

    def route(self, text: str) -> Routed:
        """Routes one text."""
        return self.route_batch([text])[0]

    def route_batch(self, texts: Sequence[str]) -> list[Routed]:
        """Routes n texts, embedded together; each gets an equal share of the batch's milliseconds."""
        start = time.perf_counter()
        routes = self.tree.route(self.embedder.embed(texts))
        milliseconds = (time.perf_counter() - start) * 1e3 / max(len(routes), 1)
        return [Routed(route.path, route.distances, milliseconds) for route in routes]
