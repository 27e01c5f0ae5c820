"""Text -> path: the sentence embedding, then greedy descent of the clustering tree (arXiv:2510.02375, §2.1).

A text goes where it leads alone (`Router.route`), or, as a turn of a conversation, stays where the talk is
(`Router.turn`). A follow-up such as "and its symbol?" does not say what it is about. Alone it goes anywhere,
because it is nearly as near to one child of a node as to the next; a turn that names its subject is not. So a turn
leaves the current path only if it is decided enough, compared with the turns that chose that path. The measure is
relative, so that one setting serves every tree. `benchmarks/turns.py` compares it with other rules.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.policy import OPEN, BankPolicy
from mlx_hiermem.config import EmbedderIdentity, Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.tree import ClusterTree, Route

HYSTERESIS = 0.5  # how decided a turn has to be to leave, as a share of the turns that chose the path
LOOKED_BACK = 8  # turns of a conversation that is routed anew, as a server does: what came before hardly matters


class TextEmbedder(Protocol):
    """What the router needs of an embedder: n texts -> [n, dim]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Topic:
    """The path that a conversation is on, and how decided the turns were that put it there."""

    path: Path
    decided: float


@dataclass(frozen=True, eq=False)
class Turn:
    """One routed turn."""

    text: str
    vector: np.ndarray  # [dim], the text's embedding
    alone: Route  # where the text goes if nothing holds it
    route: Route  # where it goes: alone, or along the conversation's path
    decided: float  # see `decidedness`
    needed: float  # what it takes to leave the path that the conversation was on
    topic: Topic  # the conversation's from here on


class Router:
    """Keeps to `policy`: nodes that it blocks are never entered, and texts beyond its reach enter none."""

    def __init__(self, tree: ClusterTree, embedder: TextEmbedder, policy: BankPolicy = OPEN) -> None:
        self.tree, self.embedder, self.policy = tree, embedder, policy

    @classmethod
    def of_bank(cls, bank: MemoryBank) -> Router:
        """The bank's tree and policy, with the embedder that the tree was made with; see `load_embedder`."""
        return cls(bank.tree, load_embedder(bank.manifest.embedder), bank.policy)

    def route(self, text: str, blocked: Collection[Path] = ()) -> Route:
        """Routes one text; `blocked` nodes are closed to it beside those of the policy."""
        return self.route_batch([text], blocked)[0]

    def route_batch(self, texts: Sequence[str], blocked: Collection[Path] = ()) -> list[Route]:
        """Routes n texts, embedded together; each gets an equal share of the batch's milliseconds."""
        start = time.perf_counter()
        routes = self.policy.route(self.tree, self.embedder.embed(texts), blocked)
        milliseconds = (time.perf_counter() - start) * 1e3 / max(len(routes), 1)
        return [replace(route, milliseconds=milliseconds) for route in routes]

    def turn(self, text: str, topic: Topic | None = None, blocked: Collection[Path] = ()) -> Turn:
        """Routes one turn of a conversation. A topic whose path is blocked, by the policy or here, is left at once.

        A text beyond the bank's reach decides nothing: in a conversation that is on a path it stays there.
        Raises BankError for a blocked node that the tree does not have.
        """
        start = time.perf_counter()
        policy = self.policy.block(blocked)
        vector = self.embedder.embed([text])[0]
        alone = policy.route(self.tree, vector)[0]
        if topic is not None and policy.blocker(topic.path):
            topic = None
        decided = decidedness(self.tree, vector, alone.path)
        after = follow(topic, alone.path, decided)
        alone = replace(alone, milliseconds=(time.perf_counter() - start) * 1e3)
        route = alone
        if after.path != alone.path:
            distances = distances_on(self.tree, vector, after.path)
            route = replace(alone, path=after.path, distances=distances, stayed=True, far=False)
        needed = HYSTERESIS * topic.decided if topic else 0.0
        return Turn(text, vector, alone, route, decided, needed, after)

    def conversation(self, texts: Sequence[str], blocked: Collection[Path] = ()) -> Turn:
        """Routes the last of a conversation's questions, oldest first; only the newest `LOOKED_BACK` count."""
        topic = None
        for text in texts[-LOOKED_BACK:]:
            turn = self.turn(text, topic, blocked)
            topic = turn.topic
        return turn


def decidedness(tree: ClusterTree, vector: np.ndarray, path: Path) -> float:
    """By what share a [dim] embedding is nearer to the nearest child than to the second, summed over the levels.

    A share, since distances are larger where centroids have been moved far (`learn.routing.Separation`).
    """
    total = 0.0
    for level in range(len(path)):
        distances = np.sort(tree.distances(vector, Path(path[:level])))
        if len(distances) > 1 and 0 < distances[1] < np.inf:  # an only child decides nothing
            total += float(1 - distances[0] / distances[1])
    return total


def distances_on(tree: ClusterTree, vector: np.ndarray, path: Path) -> tuple[float, ...]:
    """From a [dim] embedding to each node of a path, level 1 first."""
    return tuple(float(tree.distances(vector, Path(node[:-1]))[node[-1]]) for node in path.prefixes())


def follow(topic: Topic | None, path: Path, decided: float, hysteresis: float = HYSTERESIS) -> Topic:
    """The rule: the topic after a turn that alone takes `path`."""
    if topic is None or not topic.path:
        return Topic(path, decided)
    if path == topic.path:
        return Topic(path, max(decided, topic.decided))
    return Topic(path, decided) if decided > hysteresis * topic.decided else topic


def load_embedder(wanted: EmbedderIdentity) -> Embedder:
    """The sentence embedder (see `assets`). Raises BankError where a bank wants another one."""
    embedder = Embedder.load()
    if wanted.digest and embedder.identity.digest != wanted.digest:
        raise BankError(
            f"the bank was routed with another embedder ({wanted.name}, {wanted.digest[:12]})",
            "Only all-MiniLM-L6-v2 is supported.",
        )
    return embedder
