"""What a node is about, in few words: the terms that its windows have and other windows do not.

A term's weight in a node is how many of its windows have it, times the log of how much likelier that is than in a
window anywhere (its share of the Kullback-Leibler divergence). Counting for the whole corpus is in a hashed table,
so that one number a bucket is held and the candidates of each node, however long the corpus is.
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
TELLING = 1.5  # times as frequent in the node as everywhere: less says nothing about the node
# Function words of English, which a small node may have more often by chance; other languages have only `TELLING`.
PLAIN = """
about above after again all also although among and another any are because been before being below between both
but can could did does down during each either few first for from had has have her him his how however into its
itself just made many may more most much must near neither never not now off often one only other others our out
over own same she should since some such than that the their them then there these they this those through too
two under until upon use used very was were what when where which while who whose why will with within without
would years yet you your
"""


def terms(window: Window) -> set[str]:
    """The words of a window, and its title as one term."""
    found = {word.lower() for word in WORD.findall(window.text)}.difference(PLAIN.split())
    return found | ({window.title.lower()} if window.title else set())


def describe(
    windows: Iterable[Window],
    placed: Iterable[Placed],
    learnt: Iterable[Iterable[Path]],
    tokens: Callable[[str], int],
) -> dict[str, dict[str, Any]]:
    """Node -> {"label", "documents", "windows", "tokens", "sources"}; the corpus is read once.

    A window counts where its own leaf is, and is a source of all leaves of `learnt`, where something of it is
    learnt: who closes or removes a block has to know. `tokens` counts those of a text.
    """
    everywhere = np.zeros(BUCKETS, np.int32)
    nodes: dict[Path, _Node] = defaultdict(_Node)
    total = 0
    for window, place, leaves in zip(windows, placed, learnt, strict=True):
        found, size = terms(window), tokens(window.text)
        total += 1
        for term in found:
            everywhere[_bucket(term)] += 1
        for node in place.leaves[0].prefixes():
            nodes[node].add(window, found, size)
        for node in {node for leaf in leaves for node in leaf.prefixes()}:
            if len(nodes[node].sources) < SOURCES:
                nodes[node].sources[window.source] = None
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
        self.terms.update(sorted(found))
        if len(self.terms) > 4 * CANDIDATES:
            self.terms = Counter(dict(self.terms.most_common(CANDIDATES)))

    def row(self, everywhere: np.ndarray, total: int) -> dict[str, Any]:
        def weight(term: str) -> float:
            inside = self.terms[term] / self.windows
            lift = inside * total / max(everywhere[_bucket(term)], self.terms[term])
            return inside * math.log(lift) if lift >= TELLING else 0.0

        chosen = list[str]()
        for term in sorted(self.terms, key=lambda term: (-weight(term), term)):
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
