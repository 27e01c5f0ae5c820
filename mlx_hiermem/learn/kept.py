"""The texts that a model keeps of what it has learnt, and what becomes of them where a leaf is removed."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.errors import OutputError
from mlx_hiermem.learn.command import BANK, LEARNING
from mlx_hiermem.learn.examples import TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.making import EXAMPLES
from mlx_hiermem.tree import ClusterTree


def forget(model: pathlib.Path) -> int:
    """Drops the kept texts of leaves that were removed, unless another leaf has learnt them; returns how many."""
    kept, tree = model / LEARNING / EXAMPLES, MemoryBank.open(model / BANK).tree
    if not kept.is_dir():
        return 0
    old, fewer = TrainingSet.open(kept), kept.with_name(f"{EXAMPLES}.fewer")
    try:
        with TrainingSetWriter(fewer) as out:
            for number, leaves in still_there(old, tree):
                out.add(old.read(number), leaves)
        count = len(old) - len(TrainingSet.open(fewer))
        shutil.rmtree(kept)
        fewer.rename(kept)
    except OSError as error:
        raise OutputError(
            f"cannot write {kept}: {error.strerror or error}", "It still has texts of what was removed: delete it."
        ) from error
    return count


def still_there(old: TrainingSet, tree: ClusterTree) -> Iterator[tuple[int, list[Path]]]:
    """(example, its leaves) of those that the tree has: what was removed is not to come back."""
    for number, leaves in enumerate(old.leaves_of()):
        if present := [leaf for leaf in leaves if tree.has(leaf)]:
            yield number, present
