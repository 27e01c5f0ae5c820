"""What a node is about, in few words: the terms that its windows have and other windows do not.

A term's weight in a node is how many of its windows have it, times the log of how much likelier that is than in a
window anywhere (its part of the Kullback-Leibler divergence). A document's title weighs more than other terms:
it was chosen to say what the document is about. Counting for the whole corpus is in a hashed table,
one number a bucket. The terms of nodes are counted leaf by leaf, so that those of one path are held, however many
leaves there are.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.tree.build import CorpusTree, Placed
from mlx_hiermem.learn.work import NODES, Work, write_text
from mlx_hiermem.sentences import PLAIN_WORDS

TERMS = 3  # in a label
CANDIDATES = 512  # terms a node keeps while it is counted
BUCKETS = 1 << 20
SOURCES = 100  # named in a manifest, of a node
WORD = re.compile(r"[^\W\d_]{3,}")
# Times as frequent in the node as everywhere: less says nothing about the node. Function words of English are left
# out, since a small node may have them more often by chance; other languages have only this.
TELLING = 1.5
# How much more a title weighs. Of 483 windows of articles in 64 leaves the nearest label is then that of the own
# leaf for 59% instead of 46%, and of 148 windows about the elements in 16 leaves for 44% instead of 14%
# (benchmarks/labels.py). With more, the labels of large nodes name single documents and suit the others less.
TITLE = 2.5

Again = Callable[[np.ndarray], Iterable[Window]]


def describe_nodes(
    work: Work, built: CorpusTree, tokens: Callable[[str], int], examples: TrainingSet
) -> dict[str, dict[str, Any]]:
    """Stage `labels`: every node's label, documents, windows, tokens (as `tokens` counts them), and its sources,
    which are those of the examples that it learns."""

    def make() -> None:
        corpus = built.corpus
        learnt = _learnt_in(examples, corpus.count)
        nodes = describe(corpus.windows(), corpus.read, built.placed(), learnt, tokens)
        write_text(work.path(NODES), json.dumps(nodes, ensure_ascii=False, indent=1) + "\n")

    work.stage("labels", {"title": TITLE}, [built.digest, examples.digest], make)
    return json.loads(work.path(NODES).read_text(encoding="utf-8"))


def _learnt_in(examples: TrainingSet, windows: int) -> Iterator[set[Path]]:
    """The leaves in which something of each window is learnt."""
    pairs = zip(examples.windows.tolist(), examples.leaves_of(), strict=True)  # in the order of the windows
    groups = itertools.groupby(pairs, key=lambda pair: pair[0])
    at, own = next(groups, (windows, iter(())))
    for window in range(windows):
        if window < at:
            yield set()
            continue
        yield {leaf for _, leaves in own for leaf in leaves}
        at, own = next(groups, (windows, iter(())))


def terms(window: Window) -> set[str]:
    """The words of a window, and its title as one term."""
    found = {word.lower() for word in WORD.findall(window.text)}.difference(PLAIN_WORDS)
    return found | ({window.title.lower()} if window.title else set())


def describe(
    windows: Iterable[Window],
    again: Again,
    placed: Iterable[Placed],
    learnt: Iterable[Iterable[Path]],
    tokens: Callable[[str], int],
) -> dict[str, dict[str, Any]]:
    """Node -> {"label", "documents", "windows", "tokens", "sources"}. `again` reads windows by their numbers.

    A window counts where its own leaf is, and is a source of all leaves of `learnt`, where something of it is
    learnt: who closes or removes a block has to know. `tokens` counts those of a text.
    """
    everywhere, nodes = np.zeros(BUCKETS, np.int32), defaultdict[Path, _Node](_Node)
    numbers, homes = dict[Path, int](), array("i")  # of leaves, in order of appearance; each window's
    for window, place, leaves in zip(windows, placed, learnt, strict=True):
        size, home = tokens(window.text), place.leaves[0]
        for term in terms(window):
            everywhere[_bucket(term)] += 1
        for node in home.prefixes():
            nodes[node].add(window, size)
        for node in {node for leaf in leaves for node in leaf.prefixes()}:
            if len(nodes[node].sources) < SOURCES:
                nodes[node].sources[window.source] = None
        homes.append(numbers.setdefault(home, len(numbers)))
    found = dict(_labels(again, list(numbers), np.array(homes), everywhere))
    return {str(node): nodes[node].row(found.get(node, "")) for node in sorted(nodes)}


def _labels(
    again: Again,
    leaves: Sequence[Path],
    homes: np.ndarray,
    everywhere: np.ndarray,
) -> Iterator[tuple[Path, str]]:
    """Every node with its label; `homes` [windows] says which of the leaves is a window's own."""
    by_leaf = np.argsort(homes, kind="stable")
    ends = np.cumsum(np.bincount(homes, minlength=len(leaves)))
    held: dict[Path, _Terms] = {}
    for number in sorted(range(len(leaves)), key=leaves.__getitem__):
        path = leaves[number].prefixes()
        for node in held.keys() - path:
            yield node, held.pop(node).label(everywhere, len(homes))
        for window in again(by_leaf[ends[number - 1] if number else 0 : ends[number]]):
            found, title = sorted(terms(window)), window.title.lower()
            for node in path:
                held.setdefault(node, _Terms()).add(found, title)
    for node in held:
        yield node, held[node].label(everywhere, len(homes))


def _bucket(term: str) -> int:
    return zlib.crc32(term.encode()) % BUCKETS


class _Node:
    """What a manifest says of one node."""

    def __init__(self) -> None:
        self.windows = self.documents = self.tokens = 0
        self.last = -1
        self.sources: dict[str, None] = {}

    def add(self, window: Window, tokens: int) -> None:
        self.windows += 1
        self.tokens += tokens
        # a document's windows follow each other
        self.documents += window.document != self.last
        self.last = window.document

    def row(self, label: str) -> dict[str, Any]:
        return {
            "label": label,
            "documents": self.documents,
            "windows": self.windows,
            "tokens": self.tokens,
            "sources": list(self.sources),
        }


class _Terms:
    """In how many of a node's windows each term is."""

    def __init__(self) -> None:
        self.windows = 0
        self.counts: Counter[str] = Counter()
        self.titles: set[str] = set()

    def add(self, found: list[str], title: str) -> None:
        self.windows += 1
        self.counts.update(found)
        self.titles.add(title)
        if len(self.counts) > 4 * CANDIDATES:
            self.counts = Counter(dict(self.counts.most_common(CANDIDATES)))
            self.titles &= self.counts.keys()

    def label(self, everywhere: np.ndarray, total: int) -> str:
        def weight(term: str) -> float:
            inside = self.counts[term] / self.windows
            lift = inside * total / max(everywhere[_bucket(term)], self.counts[term])
            telling = inside * math.log(lift) if lift >= TELLING else 0.0
            return telling * TITLE if term in self.titles else telling

        chosen = list[str]()
        for term in sorted(self.counts, key=lambda term: (-weight(term), term)):
            # "noble gas" says "gas" too
            if not any(term in other or other in term for other in chosen):
                chosen.append(term)
            if len(chosen) == TERMS:
                break
        return ", ".join(chosen)
