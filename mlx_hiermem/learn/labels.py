"""What a node is about, in few words: the terms that its windows have and other windows do not.

A term's weight in a node is how much likelier a window there has it than a window anywhere, times how many there do
(the pointwise share of the Kullback-Leibler divergence). Counting is by document frequency over a hashed table for
the whole corpus, so it holds one number a bucket and the candidates of the nodes, however long the corpus is.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.learn import Placed, Window

TERMS = 3  # in a label
CANDIDATES = 512  # terms a node keeps while it is counted
BUCKETS = 1 << 20
SOURCES = 100  # named in a manifest, of a node
WORD = re.compile(r"[^\W\d_]{3,}")


def terms(window: Window) -> set[str]:
    """The words of a window, and its title as one term."""
    found = {word.lower() for word in WORD.findall(window.text)}
    return found | ({window.title.lower()} if window.title else set())


def describe(
    windows: Callable[[], Iterable[Window]], placed: Callable[[], Iterable[Placed]], tokens: Callable[[str], int]
) -> dict[str, dict[str, Any]]:
    """Node -> {"label", "documents", "windows", "tokens", "sources"}; a window counts where its own leaf is.

    `windows` and `placed` begin anew at each call: the corpus is read once. `tokens` counts those of a text.
    """
    everywhere = np.zeros(BUCKETS, np.int32)
    nodes: dict[Path, _Node] = defaultdict(_Node)
    total = 0
    for window, place in zip(windows(), placed(), strict=True):
        found, size = terms(window), tokens(window.text)
        total += 1
        for term in found:
            everywhere[_bucket(term)] += 1
        for node in place.leaves[0].prefixes():
            nodes[node].add(window, found, size)
    return {str(node): nodes[node].row(everywhere, total) for node in sorted(nodes)}


def _bucket(term: str) -> int:
    return zlib.crc32(term.encode()) % BUCKETS


class _Node:
    """What is counted of one node."""

    def __init__(self) -> None:
        self.windows = self.documents = self.tokens = 0
        self.last = -1
        self.terms: Counter[str] = Counter()
        self.sources: dict[str, None] = {}

    def add(self, window: Window, found: set[str], tokens: int) -> None:
        self.windows += 1
        self.tokens += tokens
        # a document's windows follow each other
        self.documents += window.document != self.last
        self.last = window.document
        if len(self.sources) < SOURCES:
            self.sources[window.source] = None
        self.terms.update(sorted(found))
        if len(self.terms) > 4 * CANDIDATES:
            self.terms = Counter(dict(self.terms.most_common(CANDIDATES)))

    def row(self, everywhere: np.ndarray, total: int) -> dict[str, Any]:
        def weight(term: str) -> float:
            inside = self.terms[term] / self.windows
            return inside * math.log(inside * total / max(everywhere[_bucket(term)], self.terms[term]))

        best = sorted(self.terms, key=lambda term: (-weight(term), term))
        chosen = list[str]()
        for term in best:
            # "noble gas" says "gas" too
            if not any(term in other or other in term for other in chosen):
                chosen.append(term)
            if len(chosen) == TERMS:
                break
        return {
            "label": ", ".join(chosen),
            "documents": self.documents,
            "windows": self.windows,
            "tokens": self.tokens,
            "sources": list(self.sources),
        }
