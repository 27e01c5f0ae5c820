"""Where an answer comes from: the document, and the sentence that says it.

The path is the index: only the windows of the question's leaf are looked through (`bank.sources`). Windows are
ranked by their vectors, the sentences of the best by vector and by words. A sentence counts as a source if it
says what the answer says beyond the question; where none does, none is named.
benchmarks/sources.py measures how often that is right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_hiermem.bank.sources import BankSources, SourceWindow
from mlx_hiermem.config import Path
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.sentences import PLAIN_WORDS, sentences
from mlx_hiermem.tree import Route

LOOKED_INTO = 3  # windows of a leaf, whose sentences are embedded
CLAIMS = 2  # sentences of an answer that are looked for; what follows is seldom the answer
WEIGHTS = (-6.6, 7.1, 3.6)  # of 1, of how near a sentence is, and of how much of the answer it says
BOUND = 0.4  # what a source scores at least
WORD = re.compile(r"\w+")
ENDING = re.compile(r"(?<=\w{3})(?:es|s)$")


@dataclass(frozen=True)
class Source:
    """One sentence, and where it stands. `score` is 0 to 1; what is named as a source has `BOUND` at least."""

    document: str
    title: str
    place: str
    sentence: str
    score: float

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"

    @property
    def name(self) -> str:
        """`Potter's wheel (pots.pdf, page 3)`."""
        where = ", ".join(filter(None, (self.document, self.place)))
        return f"{self.title} ({where})" if self.title and where else self.title or where

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"score": round(self.score, 4)}


class SourceSearch:
    """Looks through a bank's sources, a leaf at a time."""

    def __init__(self, sources: BankSources, embedder: TextEmbedder) -> None:
        self.sources, self._embedder = sources, embedder

    def passage(self, leaf: Path, question: str) -> SourceWindow | None:
        """The window that a question wants most; None where the leaf has none, or the question has no path."""
        return self.nearest(leaf, self._embedder.embed([question])[0]) if leaf else None

    def nearest(self, leaf: Path, vector: np.ndarray) -> SourceWindow | None:
        """The same for an embedded question [dim]."""
        found = self.sources.read(leaf) if leaf else None
        return found.windows[int((found.vectors @ vector).argmax())] if found else None

    def find(self, leaf: Path, question: str, answer: str = "") -> tuple[Source, ...]:
        """The sentences of a leaf that say an answer, best first, one of a window; none of them may.

        Without an answer, the sentences that suit the question best, whatever their score.
        """
        found = self.sources.read(leaf)
        if found is None:
            return ()
        claims = [f"{question} {said}" for said in sentences(answer)[:CLAIMS]] or [question]
        vectors = self._embedder.embed(claims)  # [c, dim]
        nearest = np.argsort(-(found.vectors @ vectors.T).max(1), kind="stable")[:LOOKED_INTO]
        scored = [self._best(found.windows[int(number)], question, answer, vectors) for number in nearest]
        kept = [source for source in scored if not answer or source.score >= BOUND]
        return tuple(sorted(kept, key=lambda source: -source.score))

    def _best(self, window: SourceWindow, question: str, answer: str, claims: np.ndarray) -> Source:
        """The sentence of a window that says an answer best; claims [c, dim]: the question with what is said."""
        texts = sentences(window.text) or [window.text]
        nearness = (self._embedder.embed([f"{window.title}. {text}" for text in texts]) @ claims.T).max(1)  # [s]
        said = [_agreement(question, answer, f"{window.title} {text}") for text in texts]
        scores = [_score(float(near), part) for near, part in zip(nearness, said, strict=True)]
        best = int(np.argmax(scores))
        return Source(window.document, window.title, window.place, texts[best], scores[best])


def _score(near: float, said: float) -> float:
    """From 0 to 1; the weights are fitted to 240 questions by benchmarks/sources.py."""
    return 1 / (1 + math.exp(-(WEIGHTS[0] + WEIGHTS[1] * near + WEIGHTS[2] * said)))


def _agreement(question: str, answer: str, text: str) -> float:
    """Which share of what an answer says beyond its question a text says too; of an answer that adds nothing to
    its question, which share of it."""
    told = _words(answer)
    new = told - _words(question) or told
    said = new - PLAIN_WORDS or new
    return len(said & _words(text)) / len(said) if said else 0.0


def _words(text: str) -> set[str]:
    """The words in small letters, without the endings that number and person give them."""
    return {ENDING.sub("", word.lower()) for word in WORD.findall(text)}


# What goes into a prompt

EXCHANGE = "Tell me about {title}."  # the question whose answer the passage is

Text = str | Sequence[str]  # what is routed: a text, or a conversation's questions


def asked(text: Text, route: Route) -> str:
    """What to look for: a text, or the last of a conversation's questions. One that kept the topic may not name
    it, so the question before goes with it."""
    if isinstance(text, str):
        return text
    return " ".join(text[-2:] if route.stayed else text[-1:])


def before(passage: SourceWindow) -> str:
    """What a passage puts before a plain prompt: its text, with its title unless it names it itself."""
    named = not passage.title or passage.title.lower() in passage.text.lower()
    return f"{passage.text if named else f'{passage.title}: {passage.text}'}\n\n"


def text_with(prompt: str, passage: SourceWindow | None) -> str:
    """A plain prompt behind a passage."""
    return before(passage) + prompt if passage else prompt


def messages_with(messages: Sequence[dict[str, str]], passage: SourceWindow | None) -> list[dict[str, str]]:
    """A conversation with a passage as the exchange before its last question.

    The question itself stays as it was learnt, which blocks need; benchmarks/retrieval.py compares the wordings.
    """
    told = [dict(message) for message in messages]
    asks = [at for at, message in enumerate(told) if message["role"] == "user"]
    if passage and asks:
        question = {"role": "user", "content": EXCHANGE.format(title=passage.title or "it")}
        told[asks[-1] : asks[-1]] = [question, {"role": "assistant", "content": passage.text}]
    return told
