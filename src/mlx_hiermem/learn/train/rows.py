"""Texts of a leaf joined to rows of one length, which attention sees whole.

So the paper trains memories for post-hoc anchors (arXiv:2510.02375, App. A.2). The rows are a set of examples of
their own, made once: everything else stays as it is.
"""

from __future__ import annotations

import pathlib
import time

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.dataset import Example, TrainingSet, TrainingSetWriter

WAIT = 600  # seconds that a rank waits for rank 0 to write the rows


def in_rows(examples: TrainingSet, work: pathlib.Path, settings: TrainingSettings, rank: int) -> TrainingSet:
    """The set `work`/rows, made from `examples` by rank 0 where it is not there yet."""
    folder = work / "rows"
    if settings.objective == "distillation":
        raise HierMemError("distillation needs attention inside a document", "Use attention `document`.")
    if not (folder / "set.json").is_file():
        if rank == 0:
            _write(examples, folder, settings)
        for _ in range(WAIT):
            if (folder / "set.json").is_file():
                break
            time.sleep(1)
    return TrainingSet.open(folder)


def _write(examples: TrainingSet, folder: pathlib.Path, settings: TrainingSettings) -> None:
    with TrainingSetWriter(folder) as out:
        for leaf in examples.leaves:
            rng = np.random.default_rng((settings.seed, *leaf))
            tokens, learn = np.empty(0, np.int32), np.empty(0, np.bool_)
            for number in rng.permutation(examples.ids(leaf)):
                example = examples.read(int(number))
                tokens = np.concatenate([tokens, example.tokens])
                learn = np.concatenate([learn, example.learn])
                while len(tokens) >= settings.row_tokens:
                    row, tokens = np.split(tokens, [settings.row_tokens])
                    flags, learn = np.split(learn, [settings.row_tokens])
                    _add(out, row, flags, leaf)
            _add(out, tokens, learn, leaf)


def _add(out: TrainingSetWriter, tokens: np.ndarray, learn: np.ndarray, leaf: Path) -> None:
    flags = learn.copy()
    flags[:1] = False  # nothing is before it
    if flags.any():
        out.add(Example(tokens, flags), [leaf])
