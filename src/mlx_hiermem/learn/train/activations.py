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
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_hiermem.config import GENERIC_NODE
from mlx_hiermem.learn.train.batches import Batch, collate, common_tokens
from mlx_hiermem.learn.train.dataset import SHARED, TrainingExample, TrainingSet
from mlx_hiermem.learn.train.schedule import Job
from mlx_hiermem.learn.train.step import Inputs, MemoryLoss
from mlx_hiermem.partial import PartialAnchor, prefill, repeat_cache
from mlx_hiermem.progress import Progress, unheard

BATCH_TOKENS = 1024
WORTH_KEEPING = 1.5  # uses of an example's states from which on they are kept
BATCH_PROMPTS = 32  # of one window


class HiddenStates:
    """States [n, d] of a job's examples in one file, the shortest example first."""

    def __init__(
        self,
        file: pathlib.Path,
        anchor: PartialAnchor,
        examples: TrainingSet,
        numbers: np.ndarray,
        budget: int,
        layer: int,
    ) -> None:
        """`layer` is that which the states enter. Nothing is computed until `complete`."""
        self.file, self.anchor, self.examples, self.layer = file, anchor, examples, layer
        costs = self._costs(numbers)
        order = self._order(numbers)
        self.numbers, self._cost = numbers[order], costs[order]  # [n] each
        self.counts = self._counts(self.numbers)
        probe = anchor.states(mx.zeros((1, 1), mx.int32), layer)
        self.width, self.dtype = probe.shape[-1], probe.dtype
        self.ends = np.cumsum(self.counts) * self.width * self.dtype.size  # bytes
        kept = int(np.searchsorted(self.ends, budget, side="right"))
        self.numbers, self.counts, self.ends = self.numbers[:kept], self.counts[:kept], self.ends[:kept]
        self._by_number = np.argsort(self.numbers)

    def _counts(self, numbers: np.ndarray) -> np.ndarray:
        """[n] states that each example has."""
        return self.examples.lengths[numbers] - 1

    def _costs(self, numbers: np.ndarray) -> np.ndarray:
        """[n] tokens that are run for them."""
        return self._counts(numbers)

    def _order(self, numbers: np.ndarray) -> np.ndarray:
        """[n] in which order they are computed and kept."""
        return np.lexsort((numbers, self._costs(numbers)))

    def complete(self, progress: Progress = unheard) -> None:
        """Computes what is not in the file yet. `progress` counts states."""
        done = self.file.stat().st_size if self.file.is_file() else 0
        with self.file.open("ab") as out:
            for start, end in self._batches():
                first = int(self.ends[start - 1]) if start else 0
                if int(self.ends[end - 1]) <= done:
                    continue
                out.truncate(first)  # a killed run may have left a part of a batch
                for states in self._compute([self.examples.read(int(n)) for n in self.numbers[start:end]]):
                    out.write(_bytes(states))
                progress(int(self.counts[:end].sum()), int(self.counts.sum()))
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
        shape = (int(self.counts[place]), self.width)
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

    def _compute(self, examples: list[TrainingExample]) -> Iterator[mx.array]:
        """Texts of about one length, a row each; what fills a row up comes after the text and is not seen by it."""
        tokens, lengths = _in_rows([example.tokens[:-1] for example in examples])
        states = self.anchor.states(tokens, self.layer)
        for row, length in enumerate(lengths):
            yield states[row, :length]


class TeacherStates(HiddenStates):
    """What leaves the teacher's last layer, at the positions that predict what is learnt.

    The prompts about a window begin with it: they are computed together, and it is read once.
    """

    def _counts(self, numbers: np.ndarray) -> np.ndarray:
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

    def of(self, numbers: np.ndarray, examples: Sequence[TrainingExample]) -> list[mx.array]:
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

    def _compute(self, examples: list[TrainingExample]) -> Iterator[mx.array]:
        alike = defaultdict[bytes, list[int]](list)
        for at, example in enumerate(examples):
            assert example.teacher is not None
            alike[example.teacher[:SHARED].tobytes()].append(at)
        found = dict[int, mx.array]()
        for rows in alike.values():
            found |= dict(zip(rows, self._together([examples[at] for at in rows]), strict=True))
        yield from (found[at] for at in range(len(examples)))

    def _together(self, examples: list[TrainingExample]) -> list[mx.array]:
        """Of prompts that begin alike."""
        teachers = [example.teacher[:-1] for example in examples if example.teacher is not None]
        wanted = [
            np.flatnonzero(example.learn) + len(teacher) - len(example.tokens)
            for example, teacher in zip(examples, teachers, strict=True)
        ]
        shared = common_tokens(teachers, min(int(positions[0]) for positions in wanted)) if len(teachers) > 1 else 0
        cache = prefill(self.anchor.model, teachers[0][:shared].tolist()) if shared else None
        shared = shared if cache else 0
        tokens, _ = _in_rows([teacher[shared:] for teacher in teachers])
        states = self.anchor.states(tokens, self.layer, cache=repeat_cache(cache, len(teachers)) if cache else None)
        return [states[row, mx.array(positions - shared)] for row, positions in enumerate(wanted)]


class JobStates:
    """The states that are kept for one job, and what the anchor takes for a group of its texts."""

    def __init__(self, folder: pathlib.Path, examples: TrainingSet, loss: MemoryLoss, distil: bool) -> None:
        """`distil`: whether teachers' states are needed too. Nothing is computed until `prepare`."""
        self.folder, self.examples, self.loss, self.distil = folder, examples, loss, distil
        self._first: HiddenStates | None = None
        self._teachers: TeacherStates | None = None

    def prepare(self, job: Job, tokens: int, budget: int, progress: Progress) -> None:
        """Computes the states that are worth keeping.

        `tokens` are the job's over all epochs, `budget` bytes on disk. Raises OSError where the disk is full.
        """
        leaves = [self.examples.ids(leaf) for leaf in job.leaves if leaf != GENERIC_NODE]
        numbers = np.unique(np.concatenate(leaves)) if leaves else np.empty(0, np.int64)
        uses = tokens / max(1, int(self.examples.lengths[numbers].sum()))
        # The generic block meets other texts in each epoch.
        left = 0 if GENERIC_NODE in job.leaves or uses < WORTH_KEEPING else budget
        anchor, layer = self.loss.anchor, self.loss.first_layer
        if left and layer:
            self._first = HiddenStates(self.folder / "first.states", anchor, self.examples, numbers, left, layer)
            left -= self._first.nbytes
            self._first.complete(progress)
        if self.distil:
            if GENERIC_NODE in job.leaves:  # whatever it meets: to read a window for all its prompts is cheaper
                left, numbers = budget, np.unique(self.examples.assigned)
            taught = numbers[self.examples.teachers[numbers] > 0]
            file, last = self.folder / "teacher.states", len(anchor.layers)
            self._teachers = TeacherStates(file, anchor, self.examples, taught, left, last)
            self._teachers.complete(progress)

    def inputs(self, examples: Sequence[TrainingExample], numbers: np.ndarray) -> Inputs:
        """A group's batch, with the states that are kept for it; `numbers` [n] are the examples'."""
        batch = collate(examples)
        states, begun = self._states(batch, numbers) or (None, None)
        if not self.distil or all(example.teacher is None for example in examples):
            return Inputs(batch, states, begun)
        assert self._teachers
        parts = self._teachers.of(numbers, examples)
        taught = [
            np.full(len(part), example.teacher is not None) for part, example in zip(parts, examples, strict=True)
        ]
        spare = len(batch.positions) - sum(map(len, parts))
        teacher = mx.pad(mx.concatenate(parts), [(0, spare), (0, 0)])  # [M, d]
        return Inputs(batch, states, begun, teacher, mx.array(np.concatenate([*taught, np.zeros(spare, bool)])))

    def _states(self, batch: Batch, numbers: np.ndarray) -> tuple[mx.array, mx.array | None] | None:
        """What enters the first memory layer: the rows' [B, T, d], and the beginning's [1, P, d] if there is one.

        None unless those of all examples are kept.
        """
        kept = [self._first.find(int(n)) for n in numbers] if self._first else [None]
        if not self._first or None in kept:
            return None
        found = [self._first.read(place) for place in kept if place is not None]
        joined = np.zeros((*batch.tokens.shape, self._first.width), found[0].dtype)
        P = len(batch.beginning)
        for (row, start), values in zip(batch.places, found, strict=True):
            joined[row, start : start + len(values) - P] = values[P:]
        return self._first.array(joined), self._first.array(found[0][None, :P]) if P else None

    def remove(self) -> None:
        """Deletes the states from the disk: only this job needed them."""
        for file in self.folder.glob("*.states"):
            file.unlink()


def _in_rows(texts: list[np.ndarray]) -> tuple[mx.array, list[int]]:
    lengths = [len(text) for text in texts]
    rows = np.zeros((len(texts), max(lengths)), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return mx.array(rows), lengths


def _bytes(states: mx.array) -> bytes:
    return np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states).tobytes()
