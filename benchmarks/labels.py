"""Measures what the labels of a tree's nodes are worth: for how many windows is the own node's label the nearest?

    python benchmarks/labels.py MODEL      a model whose bank keeps its sources

Windows and labels are embedded by the router's embedder. Of each level it prints for how many windows the own
node's label is the nearest of all, and of those below the same parent; with a title's weight
(`learn.tree.labels.TITLE`) and without. A window that several leaves have learnt counts in the first.
"""

from __future__ import annotations

import argparse
import pathlib

import common
import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.sources import SourceWindow
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.tree import labels
from mlx_hiermem.learn.tree.build import Placed

CHARACTERS = 300  # of a window that are embedded, behind its title


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    bank = MemoryBank.open(parser.parse_args().model / "bank")
    if bank.sources is None:
        raise HierMemError("this bank keeps no sources", "Name one that `hiermem learn` has made with them.")
    homes: dict[SourceWindow, Path] = {}
    for found in bank.sources.all():
        for window in found.windows:
            homes.setdefault(window, found.leaf)
    embedder, weight = Embedder.load(), labels.TITLE
    vectors = embedder.embed([f"{one.title}. {one.text[:CHARACTERS]}" for one in homes])
    rows = []
    for title in (1.0, weight):
        labels.TITLE = title
        named = label(list(homes), list(homes.values()))
        for level in range(1, bank.config.depth + 1):
            own = [home[:level] for home in homes.values()]
            nodes = sorted(set(own))
            near = vectors @ embedder.embed([named[str(Path(node))] for node in nodes]).T  # [windows, nodes]
            rows.append([f"{title:g}", str(level), str(len(nodes)), *shares(near, own, nodes)])
    common.table(["a title's weight", "level", "nodes", "nearest of all", "nearest of its siblings"], rows)


def label(windows: list[SourceWindow], homes: list[Path]) -> dict[str, str]:
    """Labels as `hiermem learn` gives them."""
    found = [Window(n, n, one.document, one.title, one.text) for n, one in enumerate(windows)]
    placed = [Placed(number, (home,)) for number, home in enumerate(homes)]
    nodes = labels.describe(
        found, lambda numbers: [found[int(n)] for n in numbers], placed, ([home] for home in homes), len
    )
    return {name: row["label"] for name, row in nodes.items()}


def shares(near: np.ndarray, own: list[tuple[int, ...]], nodes: list[tuple[int, ...]]) -> list[str]:
    """Of windows whose own node is the nearest: of all nodes, and of those below the same parent."""
    right = np.array([nodes.index(node) for node in own])
    siblings = np.array([[node[:-1] == mine[:-1] for node in nodes] for mine in own])
    among = np.where(siblings, near, -np.inf)
    return [f"{(found.argmax(1) == right).mean():.1%}" for found in (near, among)]


if __name__ == "__main__":
    main()
