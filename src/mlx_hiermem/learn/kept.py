"""The texts that a model keeps of what it has learnt, and what becomes of them where a leaf is removed."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.errors import OutputError
from mlx_hiermem.learn.command import BANK, LEARNING
from mlx_hiermem.learn.train.dataset import TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.encoding import EXAMPLES
from mlx_hiermem.tree import ClusterTree


def forget(model: pathlib.Path) -> int:
    """Drops the kept texts of leaves that were removed, unless another leaf has learnt them; returns how many."""
    kept, tree = kept_texts(model), MemoryBank.open(model / BANK).tree
    if not kept.is_dir():
        return 0
    old, fewer = TrainingSet.open(kept), kept.with_name(f"{EXAMPLES}.fewer")
    try:
        with TrainingSetWriter(fewer) as out:
            for number, leaves in still_there(old, tree):
                out.add(old.read(number), leaves)
        count = len(old) - len(TrainingSet.open(fewer))
        swap(fewer, kept)
    except OSError as error:
        raise OutputError(
            f"cannot write {kept}: {error.strerror or error}", "It still has texts of what was removed: delete it."
        ) from error
    return count


def kept_texts(model: pathlib.Path) -> pathlib.Path:
    """Where they are; brings back what a `swap` that was killed has put aside."""
    kept = model / LEARNING / EXAMPLES
    if not kept.exists() and _aside(kept).is_dir():
        _aside(kept).rename(kept)
    return kept


def swap(new: pathlib.Path, kept: pathlib.Path) -> None:
    """Puts other texts in their place; killed between the renames, `kept_texts` brings the old ones back."""
    shutil.rmtree(_aside(kept), ignore_errors=True)
    kept.rename(_aside(kept))
    new.rename(kept)
    shutil.rmtree(_aside(kept))


def _aside(kept: pathlib.Path) -> pathlib.Path:
    return kept.with_name(f"{kept.name}.before")


def still_there(old: TrainingSet, tree: ClusterTree) -> Iterator[tuple[int, list[Path]]]:
    """(example, its leaves) of those that the tree has: what was removed is not to come back."""
    for number, leaves in enumerate(old.leaves_of()):
        if present := [leaf for leaf in leaves if tree.has(leaf)]:
            yield number, present
