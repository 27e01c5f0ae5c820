"""What a teacher has written about a model's documents: `learning/written.jsonl`, each row of one window.

It stays with the model. What is written about new documents joins it, and what is about forgotten ones goes.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection

from mlx_hiermem.bank.commit import LEARNING
from mlx_hiermem.learn.work import WRITTEN, Work, read_rows, write_rows

NEW_WRITTEN = f"new-{WRITTEN}"


def number_written(work: Work, first: int) -> None:
    """Counts the windows of what was written in a run as the model does: from `first`."""
    if work.path(WRITTEN).exists():
        rows = ({**row, "window": first + row["window"]} for row in read_rows(work.path(WRITTEN)))
        write_rows(work.path(NEW_WRITTEN), rows)


def join_written(model: pathlib.Path, work: Work) -> None:
    """Adds what `number_written` has noted to the model's file. Twice is as good as once."""
    if work.path(NEW_WRITTEN).exists():
        new = list(read_rows(work.path(NEW_WRITTEN)))
        drop_written(model, {row["window"] for row in new}, new)


def drop_written(model: pathlib.Path, windows: Collection[int], more: Collection[object] = ()) -> None:
    """Takes out what is about these windows, and adds `more`."""
    file = model / LEARNING / WRITTEN
    if (windows and file.exists()) or more:
        old = read_rows(file) if file.exists() else ()
        write_rows(file, [*(row for row in old if row.get("window") not in windows), *more])
