"""Text -> path: the sentence embedding, then greedy descent of the clustering tree (arXiv:2510.02375, §2.1)."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.policy import OPEN, BankPolicy
from mlx_hiermem.config import EmbedderIdentity, Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.tree import ClusterTree


class TextEmbedder(Protocol):
    """What the router needs of an embedder: n texts -> [n, dim]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Routed:
    """Where a text went, the distance to the chosen centroid at each level, and the time it took.

    `avoided` are the blocked nodes that it would have entered; `stayed` says that a conversation held it on its
    path (see `turns`), and `far` that it is beyond the bank's reach and has the empty path.
    """

    path: Path
    distances: tuple[float, ...]
    milliseconds: float
    avoided: tuple[Path, ...] = ()
    stayed: bool = False
    far: bool = False


class Router:
    """Keeps to `policy`: nodes that it blocks are never entered, and texts beyond its reach enter none."""

    def __init__(self, tree: ClusterTree, embedder: TextEmbedder, policy: BankPolicy = OPEN) -> None:
        self.tree, self.embedder, self.policy = tree, embedder, policy

    @classmethod
    def of_bank(cls, bank: MemoryBank) -> Router:
        """The bank's tree and policy, with the embedder that the tree was made with; see `load_embedder`."""
        return cls(bank.tree, load_embedder(bank.manifest.embedder), bank.policy)

    def route(self, text: str, blocked: Collection[Path] = ()) -> Routed:
        """Routes one text; `blocked` nodes are closed to it beside those of the policy."""
        return self.route_batch([text], blocked)[0]

    def route_batch(self, texts: Sequence[str], blocked: Collection[Path] = ()) -> list[Routed]:
        """Routes n texts, embedded together; each gets an equal share of the batch's milliseconds."""
        start = time.perf_counter()
        routes = self.policy.route(self.tree, self.embedder.embed(texts), blocked)
        milliseconds = (time.perf_counter() - start) * 1e3 / max(len(routes), 1)
        return [Routed(route.path, route.distances, milliseconds, route.avoided, far=route.far) for route in routes]


def load_embedder(wanted: EmbedderIdentity) -> Embedder:
    """The sentence embedder (see `assets`). Raises BankError where a bank wants another one."""
    embedder = Embedder.load()
    if wanted.digest and embedder.identity.digest != wanted.digest:
        raise BankError(
            f"the bank was routed with another embedder ({wanted.name}, {wanted.digest[:12]})",
            "Only all-MiniLM-L6-v2 is supported.",
        )
    return embedder
