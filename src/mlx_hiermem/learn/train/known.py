"""What a subtree knows of its texts already, so that an epoch goes through those that it does not.

A text whose loss was low when it was last learnt rests for an epoch; if it is known then too, for two, and so on:
spaced repetition, as with flash cards. The last epoch goes through everything once more. What was seen is a file of
rows that only grows; its size goes into a commit, and what a killed run wrote after it is cut off.
"""

from __future__ import annotations

import pathlib

import numpy as np

from mlx_hiermem.learn.train.dataset import TrainingSet

KNOWN = 0.1  # nats a token: a text of less is known; greedy decoding then says it as it was learnt
ROW = np.dtype([("epoch", "<i4"), ("place", "<i8"), ("loss", "<f4"), ("said", "?")])


class Known:
    """The texts of a job. A text is told by its place in `TrainingSet.assigned`: it may be learnt in two leaves."""

    def __init__(self, file: pathlib.Path, size: int, examples: TrainingSet) -> None:
        """Goes on with the first `size` bytes of the file."""
        self.file, self.size, self.examples = file, size, examples
        with file.open("ab") as out:
            out.truncate(size)
        self._new: list[np.ndarray] = []

    def add(self, epoch: int, places: np.ndarray, losses: np.ndarray, said: np.ndarray) -> None:
        """Texts at `places` [n] were learnt, at these losses a token [n]; `said` [n]: every token was likeliest."""
        rows = np.empty(len(places), ROW)
        rows["epoch"], rows["place"], rows["loss"], rows["said"] = epoch, places, losses, said
        self._new.append(rows)

    def flush(self) -> None:
        """Writes what was added; `size` is then the file's."""
        data = b"".join(rows.tobytes() for rows in self._new)
        with self.file.open("ab") as out:
            out.write(data)
        self.size += len(data)
        self._new.clear()

    def due(self, epoch: int) -> np.ndarray:
        """bool [assigned]: which texts an epoch goes through, by what was seen in those before it."""
        streak = np.zeros(len(self.examples.assigned), np.int64)  # how often in a row a text was known
        following = np.zeros_like(streak)  # the epoch in which it is due again
        for before, rows in self._epochs(epoch):
            known = rows["loss"] <= KNOWN
            streak[rows["place"]] = np.where(known, streak[rows["place"]] + 1, 0)
            following[rows["place"]] = before + 1 + streak[rows["place"]]
        return following <= epoch

    def shares(self) -> tuple[float, float]:
        """(texts that are known, texts of which every token was likeliest), as parts of all that were learnt."""
        last = dict[int, tuple[bool, bool]]()
        for _, rows in self._epochs(1 << 30):
            last |= {int(r["place"]): (bool(r["loss"] <= KNOWN), bool(r["said"])) for r in rows}
        known, said = np.array(list(last.values()) or [(False, False)]).mean(0)
        return float(known), float(said)

    def _epochs(self, end: int) -> list[tuple[int, np.ndarray]]:
        """The rows of each epoch before `end`, in order."""
        self.flush()
        rows = np.fromfile(self.file, ROW)
        return [(int(e), rows[rows["epoch"] == e]) for e in np.unique(rows["epoch"]) if e < end]
