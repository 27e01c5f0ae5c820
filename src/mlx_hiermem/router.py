"""Text -> path: the sentence embedding, then greedy descent of the clustering tree (arXiv:2510.02375, §2.1).

In a bank that keeps its sources the nearest passage has the last word on the leaf (`bank.passages`).

A text goes where it leads alone (`Router.route`). A turn of a conversation (`Router.turn`) is one of three things:

- It names its subject, so it leads to a path of its own. Such a turn is decided: it is much nearer to one child of
  a node than to the next. The measure is relative to the turn that chose the present path, so that one setting
  serves every tree. In a bank that keeps its sources it is near to a passage instead.
- It is a follow-up, such as "and its symbol?", and stays on the conversation's path. It is like the question that
  led there, and the two asked together are no farther from that path than the question alone.
- It has nothing to do with the conversation: another subject that the bank does not know, or thanks. It gets no
  memory. The path is kept for the turns after it.

`benchmarks/turns.py` measures how often each is told right.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.passages import Farther, as_near, by_passages, lacking
from mlx_hiermem.bank.policy import OPEN, BankPolicy
from mlx_hiermem.bank.sources import BankSources
from mlx_hiermem.config import ROOT, EmbedderIdentity, Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.tree import ClusterTree, Route

HYSTERESIS = 0.5  # how decided a turn has to be to leave, as a share of the turns that chose the path
NEAR = 0.9  # how far from the nearest passage a turn leads, as a share of the bank's reach from passages
BELONGS = 0.02  # how much a turn that does not lead has to belong to the conversation to stay on its path
PULL = 2.5  # how much a distance from the path counts in that, beside a cosine
LOOKED_BACK = 8  # turns of a conversation that is routed anew, as a server does: what came before hardly matters
REMEMBERED = 256  # texts whose embeddings are kept


class TextEmbedder(Protocol):
    """What the router needs of an embedder: n texts -> [n, dim]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Topic:
    """What a conversation is about: its path, and how decided the turns were that put it there.

    `question` is the turn that led there, `aside` the last turn where it had nothing to do with it, `turns` how
    many there were since the path was taken (0: not known).
    """

    path: Path
    decided: float
    question: str = ""
    aside: str = ""
    turns: int = 0

    def after(self, aside: str) -> Topic:
        """The same after a turn that did not lead."""
        return replace(self, aside=aside, turns=self.turns + 1 if self.turns else 0)


@dataclass(frozen=True, eq=False)
class Turn:
    """One routed turn."""

    text: str
    vector: np.ndarray  # [dim], the text's embedding
    alone: Route  # where the text goes if nothing holds it
    route: Route  # where it goes: alone, along the conversation's path, or nowhere
    decided: float  # see `decidedness`
    needed: float  # what it takes to leave the path that the conversation was on
    near: float | None  # the same where passages say it: how far from the nearest one it may be
    belongs: float | None  # of a turn that does not lead, where the bank has a reach: see `Router._belonging`
    topic: Topic  # the conversation's from here on


class Router:
    """Keeps to `policy`: nodes that it blocks are never entered, and texts beyond its reach enter none."""

    def __init__(
        self,
        tree: ClusterTree,
        embedder: TextEmbedder,
        policy: BankPolicy = OPEN,
        sources: BankSources | None = None,
        pieces: Callable[[str], Set[int]] | None = None,
    ) -> None:
        """With `sources`, the nearest of their passages says which leaf a text goes to; with `pieces`, which tells
        a text's rare ones, a passage that lacks them is farther."""
        self.tree, self.embedder, self.policy, self.sources = tree, embedder, policy, sources
        self.pieces = pieces
        self._said = RememberedTexts(embedder)

    @classmethod
    def of_bank(cls, bank: MemoryBank) -> Router:
        """The bank's tree and policy, with the embedder that the tree was made with; see `load_embedder`."""
        embedder = load_embedder(bank.manifest.embedder)
        return cls(bank.tree, embedder, bank.policy, bank.sources, embedder.rare_pieces)

    def route(self, text: str, blocked: Collection[Path] = ()) -> Route:
        """Routes one text; `blocked` nodes are closed to it beside those of the policy."""
        return self.route_batch([text], blocked)[0]

    def route_batch(self, texts: Sequence[str], blocked: Collection[Path] = ()) -> list[Route]:
        """Routes n texts, embedded together; each gets an equal share of the batch's milliseconds."""
        start = time.perf_counter()
        routes = self.route_vectors(texts, self.embedder.embed(texts), blocked)
        milliseconds = (time.perf_counter() - start) * 1e3 / max(len(routes), 1)
        return [replace(route, milliseconds=milliseconds) for route in routes]

    def route_vectors(
        self, texts: Sequence[str], vectors: np.ndarray, blocked: Collection[Path] = ()
    ) -> list[Route]:
        """Routes n texts and their embeddings [n, dim]."""
        policy = self.policy.block(blocked)
        routes = policy.route(self.tree, vectors)
        if self.sources is None:
            return routes
        return [
            by_passages(self.tree, self.sources, policy, vector, route, self._farther(text))
            for text, vector, route in zip(texts, vectors, routes, strict=True)
        ]

    def _farther(self, text: str) -> Farther:
        """How much farther than its vector says a passage is from a text."""
        if self.pieces is None or self.sources is None:
            return as_near
        pieces, sources, asked = self.pieces, self.sources, self.pieces(text)

        def farther(leaf: Path, number: int) -> float:
            try:
                return lacking(asked, pieces(sources.text(leaf, number)))
            except BankError:  # a drive that is unplugged, say; the vectors are mapped and may still be there
                return 0.0

        return farther

    def turn(self, text: str, topic: Topic | None = None, blocked: Collection[Path] = ()) -> Turn:
        """Routes one turn of a conversation. A topic whose path is blocked, by the policy or here, is left at once.

        A bank whose reach has no end has memory for every text: there each turn that does not lead stays.
        Raises BankError for a blocked node that the tree does not have.
        """
        start = time.perf_counter()
        policy = self.policy.block(blocked)
        vector = self._said.embed([text])[0]
        alone = self.route_vectors([text], vector[None], blocked)[0]
        decided = decidedness(self.tree, vector, alone.path)
        if topic is None or not topic.path or policy.blocker(topic.path):
            topic = None
        route, belongs, near = alone, None, self._near(policy) if topic else None
        after = follow(topic, alone, decided, text, near)
        if after is None:
            assert topic is not None
            if policy.has_reach:
                belongs = self._belonging(text, vector, topic)
            if belongs is None or belongs > BELONGS:
                distances = self.tree.distances_on(vector, topic.path)
                stayed = topic.path != alone.path
                route = replace(alone, path=topic.path, distances=distances, stayed=stayed, far=False)
                after = topic.after(aside="")
            elif near is not None and alone.path:
                after = Topic(alone.path, decided, text, turns=1)  # another subject that passages know
            else:
                route, after = Route(avoided=alone.avoided, far=True), topic.after(aside=text)
        route = replace(route, turns=after.turns, milliseconds=(time.perf_counter() - start) * 1e3)
        needed = HYSTERESIS * topic.decided if topic else 0.0
        return Turn(text, vector, alone, route, decided, needed, near, belongs, after)

    def _near(self, policy: BankPolicy) -> float | None:
        """How far from the nearest passage a turn leads; None where that is not what says it."""
        by_passages = self.sources is not None and policy.passage_reach < math.inf
        return NEAR * policy.passage_reach if by_passages else None

    def conversation(self, texts: Sequence[str], blocked: Collection[Path] = ()) -> Turn:
        """Routes the last of a conversation's questions, oldest first; only the newest `LOOKED_BACK` count.

        What was not asked before is embedded in one batch, and the follow-ups behind their questions in another.
        """
        start, older, texts = time.perf_counter(), texts[:-LOOKED_BACK], texts[-LOOKED_BACK:]
        vectors = self._said.embed(texts)
        if self.policy.has_reach:
            self._said.embed(self._follow_ups(texts, vectors, blocked))
        topic = None
        for text in texts:
            turn = self.turn(text, topic, blocked)
            topic = turn.topic
        turns = 0 if older and turn.topic.turns == len(texts) else turn.topic.turns
        route = replace(turn.route, turns=turns, milliseconds=(time.perf_counter() - start) * 1e3)
        return replace(turn, route=route)

    def _follow_ups(self, texts: Sequence[str], vectors: np.ndarray, blocked: Collection[Path]) -> list[str]:
        """The turns that lead nowhere, each behind the question that it may belong to."""
        topic, found, near = Topic(ROOT, 0.0), list[str](), self._near(self.policy)
        routes = self.route_vectors(texts, vectors, blocked)
        for text, vector, alone in zip(texts, vectors, routes, strict=True):
            after = follow(topic, alone, decidedness(self.tree, vector, alone.path), text, near)
            if after is None:
                found.append(behind(topic.question, text))
            topic = after or topic
        return found

    def _belonging(self, text: str, vector: np.ndarray, topic: Topic) -> float:
        """How much a turn belongs to a conversation: most follow-ups are above `BELONGS`, other subjects below.

        Near to the question that chose the path, nearer than to an aside just before it; and asked behind that
        question it does not pull it away from the path.
        """
        if not topic.question:  # of a conversation that was saved before questions were
            return math.inf
        together, question, *aside = self._said.embed(
            [behind(topic.question, text), topic.question, *([topic.aside] if topic.aside else [])]
        )
        away = max(0.0, float(vector @ aside[0])) if aside else 0.0
        pulled, led = (self.tree.distances_on(one, topic.path)[-1] for one in (together, question))
        return float(vector @ question) - away - PULL * (pulled - led)


class RememberedTexts:
    """Embeds only what it did not embed a short while ago: a conversation is routed again with each turn."""

    def __init__(self, embedder: TextEmbedder, most: int = REMEMBERED) -> None:
        self._embedder, self._most = embedder, most
        self._known: dict[str, np.ndarray] = {}  # oldest first
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        with self._lock:
            known = {text: self._known[text] for text in texts if text in self._known}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known |= dict(zip(new, self._embedder.embed(new), strict=True))
        with self._lock:
            for text, vector in known.items():
                self._known.pop(text, None)
                self._known[text] = vector
            for text in list(self._known)[: -self._most]:
                del self._known[text]
        return np.array([known[text] for text in texts])


def behind(question: str, text: str) -> str:
    """A follow-up and what it follows, as one text."""
    return f"{question} {text}"


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


def follow(
    topic: Topic | None, alone: Route, decided: float, question: str, near: float | None = None
) -> Topic | None:
    """The topic after a turn that goes so alone; None where the turn does not lead anywhere.

    It leads where it is decided enough, or, with `near`, where it is no farther than that from a passage.
    """
    path = alone.path
    if topic is None or not topic.path:
        return Topic(path, decided, question, turns=1)
    leads = decided > HYSTERESIS * topic.decided
    if near is not None and alone.passage is not None:
        leads = alone.passage <= near
    if not path or not leads:
        return None
    if path != topic.path:
        return Topic(path, decided, question, turns=1)
    return Topic(path, max(decided, topic.decided), question, turns=topic.after("").turns)


def load_embedder(wanted: EmbedderIdentity) -> Embedder:
    """The sentence embedder (see `assets`). Raises BankError where a bank wants another one."""
    embedder = Embedder.load()
    if wanted.digest and embedder.identity.digest != wanted.digest:
        raise BankError(
            f"the bank was routed with another embedder ({wanted.name}, {wanted.digest[:12]})",
            "Only all-MiniLM-L6-v2 is supported.",
        )
    return embedder
