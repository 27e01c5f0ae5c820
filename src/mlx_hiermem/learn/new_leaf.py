"""A leaf of their own for new documents, and which old texts go there from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hiermem.config import ROOT, Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.train.encoding import TOGETHER
from mlx_hiermem.learn.tree.routing import descend
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.tree import ClusterTree


@dataclass(frozen=True)
class Goes:
    """Which old texts go to a new leaf from now on, and so must be learnt there too."""

    tree: ClusterTree
    leaf: Path
    embedder: TextEmbedder
    tokenizer: Any

    def windows(self, old: TrainingSet) -> set[int]:
        """The windows of which some text goes there, by its prompt, or as a whole where all of it is learnt."""
        found = set[int]()
        for start in range(0, len(old), TOGETHER):
            examples = [old.read(number) for number in range(start, min(start + TOGETHER, len(old)))]
            firsts = [int(example.learn.argmax()) for example in examples]
            tokens = [
                e.tokens if first <= 1 else e.tokens[:first] for e, first in zip(examples, firsts, strict=True)
            ]
            texts = [self.tokenizer.decode(some.tolist(), skip_special_tokens=True) for some in tokens]
            levels, rows = descend(self.tree, self.embedder.embed(texts))
            for example, level, row in zip(examples, levels.tolist(), rows.tolist(), strict=True):
                if Path.of_row(row, level, self.tree.branching) == self.leaf:
                    found.add(example.window)
        return found


def with_new_leaf(tree: ClusterTree) -> Callable[[np.ndarray], ClusterTree]:
    """Means [n, dim] of new windows -> the tree with a leaf for them, below the node that most of them pass.

    Of the nodes with room the deepest that most pass is taken; the centroid is the middle of them all. Raises
    BankError where no node on their way has room.
    """

    def choose(means: np.ndarray) -> ClusterTree:
        levels, rows = descend(tree, means)
        passed: dict[Path, int] = {ROOT: len(means)}
        for level, row in zip(levels.tolist(), rows.tolist(), strict=True):
            for node in Path.of_row(row, level, tree.branching).prefixes():
                passed[node] = passed.get(node, 0) + 1
        roomy = [node for node in passed if len(node) < tree.depth and _room(tree, node) is not None]
        if not roomy:
            raise BankError("the bank's tree has no room for a leaf near these documents", "Leave out --new-leaf.")
        best = max(roomy, key=lambda node: (2 * passed[node] > len(means), len(node), passed[node]))
        return tree.with_node(Path((*best, _room(tree, best) or 0)), means.mean(0).astype(np.float32))

    return choose


def _room(tree: ClusterTree, node: Path) -> int | None:
    """A child's place that is free at a node."""
    present = tree.present[len(node)][node.row(tree.branching)]
    return None if present.all() else int(np.flatnonzero(~present)[0])


def added_node(tree: ClusterTree, known: ClusterTree) -> Path | None:
    """The node that one tree has and the other has not."""
    for level in range(1, tree.depth + 1):
        for node in tree.nodes(level):
            if not known.has(node):
                return node
    return None
