"""From windows to a tree, and to the leaves in which each window is learnt: the stages `probes` to `tree`.

built = build_tree(work, corpus, embedder, TreeSettings())      # or place_in_tree, for a tree that is there
built.tree, built.agreement
for placed in built.placed(): ...
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.records import Placed
from mlx_hiermem.learn.settings import TreeSettings
from mlx_hiermem.learn.study.prompts import not_there
from mlx_hiermem.learn.tree.kmeans import Shape, grow
from mlx_hiermem.learn.tree.probes import EmbeddedProbes, embed_probes
from mlx_hiermem.learn.tree.routing import Separation, agreement, place, reach_of
from mlx_hiermem.learn.work import (
    AGREEMENT,
    LEAVES_FILE,
    MEANS,
    TREE,
    Ranks,
    Work,
    read_rows,
    write_rows,
    write_text,
)
from mlx_hiermem.progress import Progress, unheard
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.tree import ClusterTree


@dataclass(frozen=True)
class CorpusTree:
    """A corpus' tree on disk, and which window is learnt where; `digest` says what both were made of."""

    corpus: Corpus
    digest: str

    @property
    def tree(self) -> ClusterTree:
        return ClusterTree.load(self.corpus.work.path(TREE))

    @property
    def agreement(self) -> dict[str, Any]:
        """agreement.json: the tree's shape, and what was measured (None where there was no question for it)."""
        return json.loads(self.corpus.work.path(AGREEMENT).read_text(encoding="utf-8"))

    def placed(self) -> Iterator[Placed]:
        """The leaves of every window, by its number."""
        for row in read_rows(self.corpus.work.path(LEAVES_FILE)):
            yield Placed(row["window"], tuple(map(Path.parse, row["leaves"])))


def build_tree(
    work: Work,
    corpus: Corpus,
    embedder: TextEmbedder,
    settings: TreeSettings = TreeSettings(),
    progress: Progress = unheard,
    ranks: Ranks | None = None,
) -> CorpusTree:
    """Stages `probes`, `vectors` and `tree`. `progress` counts the embedded probes.

    Raises CorpusError for a corpus of one window.
    """
    embedded = embed_probes(work, corpus, embedder, progress, ranks)

    def make() -> None:
        found = EmbeddedProbes.read(work, corpus)
        means = np.load(work.path(MEANS), mmap_mode="r")
        shape, tune = _shape(settings, corpus.count), Separation(found.plain, found.turned)
        tree = grow(means, shape, settings.seed, tune, settings.balance).tree
        tree.save(work.path(TREE))
        _place(work, found, tree, settings.leaves)

    return CorpusTree(corpus, work.stage("tree", asdict(settings), [embedded], make))


def _shape(settings: TreeSettings, windows: int) -> Shape:
    """The shape that is asked for, and where none is, the one that suits so many windows."""
    chosen = Shape.of(windows)
    return Shape(settings.branching or chosen.branching, settings.depth or chosen.depth)


def place_in_tree(
    work: Work,
    corpus: Corpus,
    embedder: TextEmbedder,
    choose: Callable[[np.ndarray], ClusterTree],
    of: str,
    leaves: int = TreeSettings.leaves,
    progress: Progress = unheard,
) -> CorpusTree:
    """The same for a tree that is there: `choose` gives it for the [windows, dim] means; `of` says which it is."""
    embedded = embed_probes(work, corpus, embedder, progress)

    def make() -> None:
        found = EmbeddedProbes.read(work, corpus)
        tree = choose(np.load(work.path(MEANS)))
        tree.save(work.path(TREE))
        _place(work, found, tree, leaves)

    return CorpusTree(corpus, work.stage("tree", [of, leaves], [embedded], make))


def _place(work: Work, found: EmbeddedProbes, tree: ClusterTree, most: int) -> None:
    """Writes which window is learnt where, and how many of the held-out questions reach one of theirs."""
    placed, wanted, total = dict[int, tuple[Path, ...]](), set(found.asked.tolist()), 0
    windows = len(found.plain.first) - 1

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal total
        for window, leaves in enumerate(place(tree, found.plain, most)):
            total += len(leaves)
            if window in wanted:
                placed[window] = leaves
            yield {"window": window, "leaves": [str(leaf) for leaf in leaves]}

    write_rows(work.path(LEAVES_FILE), rows())

    def agreed(of: np.ndarray) -> float | None:
        answers = [[int(window)] for window in found.asked[of]]
        return agreement(tree, placed, found.held_out[of], answers) if answers else None

    report = {
        "branching": tree.branching,
        "depth": tree.depth,
        "windows": windows,
        "leaves_a_window": total / windows,
        "questions": int((~found.backwards).sum()),
        "agreement": agreed(~found.backwards),
        "reversed_questions": int(found.backwards.sum()),
        "reversed_agreement": agreed(found.backwards),
        "reach": reach_of(tree, found.shaping),
    }
    write_text(work.path(AGREEMENT), json.dumps(report, indent=1) + "\n")


def given_agreement(built: CorpusTree, embedder: TextEmbedder, questions: Sequence[tuple[str, str]]) -> float:
    """Share of given questions that reach a leaf of the document that answers them.

    Each is (question, the document's source or title). Raises CorpusError where the corpus has no such document.
    """
    answers = defaultdict[str, list[int]](list)
    wanted, placed = {document for _, document in questions}, dict[int, tuple[Path, ...]]()
    for window, place_ in zip(built.corpus.windows(), built.placed(), strict=True):
        for name in wanted.intersection((window.source, window.title)):
            answers[name].append(window.id)
            placed[window.id] = place_.leaves
    if missing := sorted(wanted - answers.keys()):
        raise not_there(missing[0], "a question")
    vectors_ = embedder.embed([question for question, _ in questions])
    return agreement(built.tree, placed, vectors_, [answers[document] for _, document in questions])
