"""What a frozen anchor computes again and again for the same text, computed once and kept on disk.

Per example: the states that enter the first memory layer, and where there is a teacher, the states that leave the
teacher's last layer where something is learnt (its logits are one product away, and 80 times larger). They are
computed in one order and in batches that depend on the examples alone: what a killed run left is continued with the
same bits. What exceeds the budget is not kept, and the whole model runs for it each time.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from mlx_hiermem.learn.examples import Example, TrainingSet
from mlx_hiermem.learn.forward import Anchor

BATCH_TOKENS = 1024
Tick = Callable[[int, int], None]  # tokens done, tokens in all


class States:
    """States [n, d] of a job's examples in one file, the shortest example first."""

    def __init__(
        self,
        file: pathlib.Path,
        anchor: Anchor,
        examples: TrainingSet,
        numbers: np.ndarray,
        budget: int,
        layer: int,
    ) -> None:
        """`layer` is that which the states enter. Nothing is computed until `complete`."""
        self.file, self.anchor, self.examples, self.layer = file, anchor, examples, layer
        costs = self._costs(numbers)
        order = np.lexsort((numbers, costs))
        self.numbers, self._cost = numbers[order], costs[order]
        self.rows = self._rows(self.numbers)
        probe = anchor.states(mx.zeros((1, 1), mx.int32), layer)
        self.width, self.dtype = probe.shape[-1], probe.dtype
        self.ends = np.cumsum(self.rows) * self.width * self.dtype.size  # bytes
        kept = int(np.searchsorted(self.ends, budget, side="right"))
        self.numbers, self.rows, self.ends = self.numbers[:kept], self.rows[:kept], self.ends[:kept]
        self._by_number = np.argsort(self.numbers)

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        """States that each example has."""
        return self.examples.lengths[numbers] - 1

    def _costs(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens that are run for them."""
        return self._rows(numbers)

    def complete(self, tick: Tick | None = None) -> None:
        """Computes what is not in the file yet."""
        done = self.file.stat().st_size if self.file.is_file() else 0
        with self.file.open("ab") as out:
            for start, end in self._batches():
                first = int(self.ends[start - 1]) if start else 0
                if int(self.ends[end - 1]) <= done:
                    continue
                out.truncate(first)  # a killed run may have left a part of a batch
                for states in self._compute([self.examples.read(int(n)) for n in self.numbers[start:end]]):
                    out.write(_bytes(states))
                if tick:
                    tick(int(self.rows[:end].sum()), int(self.rows.sum()))
            out.flush()
            os.fsync(out.fileno())

    @property
    def nbytes(self) -> int:
        """What the whole file takes."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def find(self, number: int) -> int | None:
        """Where an example is in the file; None where its states are not kept."""
        at = int(np.searchsorted(self.numbers, number, sorter=self._by_number))
        if at == len(self.numbers) or self.numbers[self._by_number[at]] != number:
            return None
        return int(self._by_number[at])

    def read(self, place: int) -> np.ndarray:
        """[n, d] of the example at a place; bfloat16 as its 16 bits."""
        raw = np.uint16 if self.dtype == mx.bfloat16 else np.dtype(str(self.dtype).removeprefix("mlx.core."))
        start = int(self.ends[place - 1]) if place else 0
        shape = (int(self.rows[place]), self.width)
        return np.fromfile(self.file, raw, shape[0] * shape[1], offset=start).reshape(shape)

    def array(self, values: np.ndarray) -> mx.array:
        """What `read` gave, as MLX has it."""
        found = mx.array(values)
        return found.view(mx.bfloat16) if self.dtype == mx.bfloat16 else found

    def _batches(self) -> Iterator[tuple[int, int]]:
        start = 0
        while start < len(self.numbers):
            costs = self._cost[start : min(start + BATCH_TOKENS, len(self.numbers))]
            fits = int(np.searchsorted(costs * np.arange(1, len(costs) + 1), BATCH_TOKENS, side="right"))
            yield start, start + max(1, fits)
            start += max(1, fits)

    def _compute(self, examples: list[Example]) -> Iterator[mx.array]:
        """Texts of about one length, a row each; what fills a row up comes after the text and is not seen by it."""
        tokens, lengths = _in_rows([example.tokens[:-1] for example in examples])
        states = self.anchor.states(tokens, self.layer)
        for row, length in enumerate(lengths):
            yield states[row, :length]


class TeacherStates(States):
    """What leaves the teacher's last layer, at the positions that predict what is learnt."""

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        return self.examples.learnts[numbers]

    def _costs(self, numbers: np.ndarray) -> np.ndarray:
        return self.examples.teachers[numbers]

    def _compute(self, examples: list[Example]) -> Iterator[mx.array]:
        teachers = [example.teacher for example in examples if example.teacher is not None]
        tokens, _ = _in_rows([teacher[:-1] for teacher in teachers])
        states = self.anchor.states(tokens, self.layer)
        for row, (example, teacher) in enumerate(zip(examples, teachers, strict=True)):
            shift = len(teacher) - len(example.tokens) - 1
            yield states[row, mx.array(np.flatnonzero(example.learn) + shift)]

    def of(self, number: int, example: Example) -> mx.array:
        """An example's states, computed where they are not kept; zeros where it has no teacher."""
        if example.teacher is None:
            return mx.zeros((int(example.learn.sum()), self.width), self.dtype)
        place = self.find(number)
        return next(self._compute([example])) if place is None else self.array(self.read(place))


def _in_rows(texts: list[np.ndarray]) -> tuple[mx.array, list[int]]:
    lengths = [len(text) for text in texts]
    rows = np.zeros((len(texts), max(lengths)), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return mx.array(rows), lengths


def _bytes(states: mx.array) -> bytes:
    return np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states).tobytes()
