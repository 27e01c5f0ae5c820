"""What a frozen anchor computes again and again for the same text, computed once and kept on disk.

Per example: the states that enter the first memory layer, and where there is a teacher, the states that leave the
teacher's last layer where something is learnt (its logits are one product away, and 80 times larger). They are
computed in one order and in batches that depend on the examples alone: what a killed run left is continued with the
same bits. What exceeds the budget is not kept, and the whole model runs for it each time.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_hiermem.learn.train.dataset import Example, TrainingSet
from mlx_hiermem.partial import Anchor, read_once, spread

BATCH_TOKENS = 1024
BATCH_PROMPTS, ALIKE = 32, 16  # of one window; tokens by which it is told that prompts have a beginning in common
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
        order = self._order(numbers)
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

    def _order(self, numbers: np.ndarray) -> np.ndarray:
        """In which order they are computed and kept."""
        return np.lexsort((numbers, self._costs(numbers)))

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
    """What leaves the teacher's last layer, at the positions that predict what is learnt.

    The prompts about a window begin with it: they are computed together, and it is read once.
    """

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        return self.examples.learnts[numbers]

    def _costs(self, numbers: np.ndarray) -> np.ndarray:
        return self.examples.teachers[numbers]

    def _order(self, numbers: np.ndarray) -> np.ndarray:
        return np.lexsort((numbers, self.examples.windows[numbers]))

    def _batches(self) -> Iterator[tuple[int, int]]:
        windows = self.examples.windows[self.numbers]
        ends = np.append(np.flatnonzero(np.diff(windows)) + 1, len(windows)) if len(windows) else windows
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            for first in range(start, end, BATCH_PROMPTS):
                yield first, min(first + BATCH_PROMPTS, end)

    def of(self, numbers: np.ndarray, examples: Sequence[Example]) -> list[mx.array]:
        """States of some examples, computed where they are not kept; zeros where one has no teacher."""
        places = [
            None if one.teacher is None else self.find(int(n)) for n, one in zip(numbers, examples, strict=True)
        ]
        missing = [at for at, one in enumerate(examples) if one.teacher is not None and places[at] is None]
        found = dict(zip(missing, self._compute([examples[at] for at in missing]), strict=True))
        for at, place in enumerate(places):
            if place is not None:
                found[at] = self.array(self.read(place))
        nothing = [mx.zeros((int(one.learn.sum()), self.width), self.dtype) for one in examples]
        return [found.get(at, nothing[at]) for at in range(len(examples))]

    def _compute(self, examples: list[Example]) -> Iterator[mx.array]:
        alike = defaultdict[bytes, list[int]](list)
        for at, example in enumerate(examples):
            assert example.teacher is not None
            alike[example.teacher[:ALIKE].tobytes()].append(at)
        found = dict[int, mx.array]()
        for rows in alike.values():
            found |= dict(zip(rows, self._together([examples[at] for at in rows]), strict=True))
        yield from (found[at] for at in range(len(examples)))

    def _together(self, examples: list[Example]) -> list[mx.array]:
        """Of prompts that begin alike."""
        teachers = [example.teacher[:-1] for example in examples if example.teacher is not None]
        wanted = [
            np.flatnonzero(example.learn) + len(teacher) - len(example.tokens)
            for example, teacher in zip(examples, teachers, strict=True)
        ]
        shared = _shared(teachers, min(int(positions[0]) for positions in wanted)) if len(teachers) > 1 else 0
        cache = read_once(self.anchor.model, teachers[0][:shared].tolist()) if shared else None
        shared = shared if cache else 0
        tokens, _ = _in_rows([teacher[shared:] for teacher in teachers])
        states = self.anchor.states(tokens, self.layer, cache=spread(cache, len(teachers)) if cache else None)
        return [states[row, mx.array(positions - shared)] for row, positions in enumerate(wanted)]


def _shared(texts: Sequence[np.ndarray], most: int) -> int:
    """With how many tokens all of these begin, at most."""
    most = min(most, *map(len, texts))
    differs = np.any([text[:most] != texts[0][:most] for text in texts], axis=0)
    return int(differs.argmax()) if differs.any() else most


def _in_rows(texts: list[np.ndarray]) -> tuple[mx.array, list[int]]:
    lengths = [len(text) for text in texts]
    rows = np.zeros((len(texts), max(lengths)), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return mx.array(rows), lengths


def _bytes(states: mx.array) -> bytes:
    return np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states).tobytes()
