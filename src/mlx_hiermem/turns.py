"""Where a turn of a conversation goes: to the path that it takes alone, or to the one the talk is on.

A follow-up such as "and its symbol?" does not say what it is about. Alone it goes anywhere, because it is nearly
as near to one child of a node as to the next; a turn that names its subject is not. So a turn leaves the current
path only if it is decided enough, compared with the turns that chose that path. The measure is relative, so that
one setting serves every tree. `benchmarks/turns.py` compares it with other rules; benchmarks/results/turns.md has the table.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.router import Routed, Router
from mlx_hiermem.tree import ClusterTree

HYSTERESIS = 0.5  # how decided a turn has to be to leave, as a share of the turns that chose the path
LOOKED_BACK = 8  # turns of a conversation that is routed anew, as a server does: what came before hardly matters


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
    alone: Routed  # where the text goes if nothing holds it
    decided: float  # see `decidedness`
    needed: float  # what it takes to leave the path that the conversation was on
    topic: Topic  # the conversation's from here on
    routed: Routed  # the topic's path, with the text's distances to it

    @property
    def stayed(self) -> bool:
        """Whether the turn was held on the path before."""
        return self.routed.stayed


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


def follow(topic: Topic | None, path: Path, decided: float, hysteresis: float = HYSTERESIS) -> Topic:
    """The rule: the topic after a turn that alone takes `path`."""
    if topic is None or not topic.path:
        return Topic(path, decided)
    if path == topic.path:
        return Topic(path, max(decided, topic.decided))
    return Topic(path, decided) if decided > hysteresis * topic.decided else topic


def route_turns(router: Router, texts: Sequence[str], blocked: Collection[Path] = ()) -> Turn:
    """Routes the last of a conversation's questions, oldest first; only the newest `LOOKED_BACK` count."""
    topic = None
    for text in texts[-LOOKED_BACK:]:
        turn = route_turn(router, text, topic, blocked)
        topic = turn.topic
    return turn


def route_turn(router: Router, text: str, topic: Topic | None = None, blocked: Collection[Path] = ()) -> Turn:
    """Routes one turn. A topic whose path is blocked, by the router's policy or by `blocked`, is left at once.

    A text beyond the bank's reach decides nothing: in a conversation that is on a path it stays there.
    Raises BankError for a blocked node that the tree does not have.
    """
    start = time.perf_counter()
    policy, tree = router.policy.block(blocked), router.tree
    vector = router.embedder.embed([text])[0]
    route = policy.route(tree, vector)[0]
    if topic is not None and policy.blocker(topic.path):
        topic = None
    decided = decidedness(tree, vector, route.path)
    after = follow(topic, route.path, decided)
    milliseconds = (time.perf_counter() - start) * 1e3
    distances = tuple(float(tree.distances(vector, Path(node[:-1]))[node[-1]]) for node in after.path.prefixes())
    return Turn(
        text=text,
        vector=vector,
        alone=Routed(route.path, route.distances, milliseconds, route.avoided, far=route.far),
        decided=decided,
        needed=HYSTERESIS * topic.decided if topic else 0.0,
        topic=after,
        routed=Routed(
            after.path,
            distances,
            milliseconds,
            route.avoided,
            stayed=after.path != route.path,
            far=route.far and not after.path,
        ),
    )
