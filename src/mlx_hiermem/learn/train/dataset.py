"""What the trainer learns from: token sequences, and the leaves in which each is learnt. On disk, read one by one.

    with TrainingSetWriter(folder) as out:                  # streams; memory does not grow with the corpus
        out.add(TrainingExample(tokens, learn, window=7), leaves=[Path((0, 2)), Path((1, 0))])
    examples = TrainingSet.open(folder)
    examples.leaves                                         # the paths that have examples, in path order
    examples.ids(Path((0, 2)))                              # numbers of the examples learnt there
    examples.read(3)                                        # one TrainingExample

The same form serves for training (each example in the leaves that its window was assigned to) and for held-out
evaluation (each example in the one leaf that its prompt routes to). A set is whole or absent.

A leaf's texts are learnt in groups of about as many tokens, and a group's texts share the rows of a batch. A row
is at least as long as the longest text, and shorter ones fill it up; lengths come in few sizes, so that MLX
compiles few shapes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.files import partial_name, replace_folder

CHUNK = 1 << 20  # assignments sorted at a time
ALWAYS, FRAMED, IN_CHAT = 0, 1, 2  # forms: learnt in every epoch, or one of a question's two, which take turns
TURNS = 3  # of so many epochs a question is framed in one, and asked in chat in the others, as people ask
MULTIPLIER = 0x9E3779B97F4A7C15  # of a sum that stands for tokens
SHARED = 16  # texts begin alike that have so many tokens in common


@dataclass(frozen=True)
class TrainingExample:
    """One text as tokens, special tokens included.

    `learn[i]` says that token i is to be predicted from those before it; token 0 never is: nothing is before it.
    `teacher` is for distillation: the same text with the window in front of it (or in its prompt). From the first
    learnt token on both must be the same tokens; what the anchor predicts there with the window in its context is
    what the memory is to make it predict without.

    `form` is `FRAMED` or `IN_CHAT` for a question that is learnt in both forms: the two follow each other in a set,
    in this order, and an epoch learns one of them.
    """

    tokens: np.ndarray  # int32 [n], n >= 2
    learn: np.ndarray  # bool [n]
    window: int = -1  # number of the window that it was made from
    teacher: np.ndarray | None = None  # int32 [m]
    form: int = ALWAYS

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 or self.learn.shape != self.tokens.shape or not self.learn[1:].any():
            raise HierMemError("an example needs two tokens or more, and one of them to be learnt")
        if self.learn[0]:
            raise HierMemError("an example's first token cannot be learnt: nothing is before it")
        tail = self.tokens[int(self.learn.argmax()) :]
        if self.teacher is not None and not (
            len(self.teacher) > len(tail) and np.array_equal(self.teacher[-len(tail) :], tail)
        ):
            raise HierMemError("an example's teacher must end with the same tokens, from the first learnt one on")


class TrainingSet:
    """Examples by number, and which leaf learns which. Everything is memory-mapped."""

    def __init__(self, folder: pathlib.Path, leaves: Sequence[Path], ends: np.ndarray, digest: str) -> None:
        self.folder, self.leaves, self.digest = folder, list(leaves), digest
        self._ends = dict(zip(self.leaves, ends.tolist(), strict=True))
        self._starts = dict(zip(self.leaves, [0, *ends.tolist()][: len(ends)], strict=True))
        self._tokens, self._learn = _map(folder / "tokens", np.int32), _map(folder / "learn", np.bool_)
        self._teachers = _map(folder / "teachers", np.int32)
        self.assigned = _map(folder / "assigned", np.int64)  # leaf by leaf, the examples learnt there
        self._index = _map(folder / "index", np.int64).reshape(-1, 5)

    @classmethod
    def open(cls, folder: pathlib.Path) -> TrainingSet:
        """Raises HierMemError where the set is not whole."""
        try:
            head = json.loads((folder / "set.json").read_text(encoding="utf-8"))
            leaves = [Path.parse(text) for text in head["leaves"]]
            return cls(folder, leaves, np.array(head["ends"], dtype=np.int64), head["digest"])
        except (OSError, ValueError, KeyError) as error:
            raise HierMemError(f"there is no whole set of examples in {folder}: {error}") from error

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return np.diff(self._index[:, 0], prepend=0)

    @property
    def windows(self) -> np.ndarray:
        """[N] the window that each example was made from."""
        return self._index[:, 2]

    @cached_property
    def teachers(self) -> np.ndarray:
        """[N] tokens of each example's teacher, 0 where it has none."""
        return np.diff(self._index[:, 1], prepend=0)

    @property
    def learnts(self) -> np.ndarray:
        """[N] how many tokens of each example are learnt."""
        return self._index[:, 3]

    @cached_property
    def forms(self) -> np.ndarray:
        """[N] the form of each example."""
        return np.array(self._index[:, 4])

    @cached_property
    def often(self) -> np.ndarray:
        """[N] the part of all epochs in which each example is learnt, unless it rests."""
        return np.array([1, 1 / TURNS, 1 - 1 / TURNS])[self.forms]

    @cached_property
    def beginnings(self) -> np.ndarray:
        """uint64 [N]: equal where texts begin with the same `SHARED` tokens, none of them learnt; else 0."""
        found = np.zeros(len(self), np.uint64)
        some = np.flatnonzero(self.lengths - self.learnts > SHARED)
        powers = np.array([MULTIPLIER**n % 2**64 for n in range(SHARED)], np.uint64)
        for start in range(0, len(some), CHUNK):
            part = some[start : start + CHUNK]
            firsts = self._index[part, 0] - self.lengths[part]
            tokens = self._tokens[firsts[:, None] + np.arange(SHARED)].astype(np.uint64)  # [n, SHARED]
            found[part] = ((tokens + 1) * powers).sum(1, dtype=np.uint64)
        return found

    def turns(self, epoch: int) -> np.ndarray:
        """bool [N]: whose turn it is in an epoch."""
        framed = (np.arange(len(self)) - (self.forms == IN_CHAT) + epoch) % TURNS == 0
        return np.where(self.forms == ALWAYS, True, framed == (self.forms == FRAMED))

    def places(self, leaf: Path, numbers: np.ndarray) -> np.ndarray:
        """[n] where examples of a leaf are in `assigned`: one number for an example in a leaf."""
        return self._starts[leaf] + np.searchsorted(self.ids(leaf), numbers)

    def ids(self, leaf: Path) -> np.ndarray:
        """[n] numbers of the examples learnt in a leaf, ascending; none for a leaf without examples."""
        return self.assigned[self._starts.get(leaf, 0) : self._ends.get(leaf, 0)]

    def leaves_of(self) -> Iterator[list[Path]]:
        """The leaves of each example, by number."""
        counts = [self._ends[leaf] - self._starts[leaf] for leaf in self.leaves]
        order = np.argsort(self.assigned, kind="stable")
        owners = np.repeat(np.arange(len(self.leaves)), counts)[order]
        ends = np.searchsorted(self.assigned[order], np.arange(len(self)), side="right")
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            yield [self.leaves[owner] for owner in owners[start:end]]

    def read(self, number: int) -> TrainingExample:
        """One example, copied from disk."""
        token, teacher = self._index[number - 1, :2].tolist() if number else (0, 0)
        token_end, teacher_end, window, _, form = self._index[number].tolist()
        return TrainingExample(
            np.array(self._tokens[token:token_end]),
            np.array(self._learn[token:token_end]),
            window,
            np.array(self._teachers[teacher:teacher_end]) if teacher_end > teacher else None,
            form,
        )


class TrainingSetWriter:
    """Writes a set beside `folder` and renames it there at the end; an exception leaves nothing."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.partial = folder, partial_name(folder)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        names = ("tokens", "learn", "teachers", "index", "pairs")
        self._files = {name: (self.partial / name).open("wb") for name in names}
        self._digest = hashlib.sha256()
        self._leaves: dict[Path, int] = {}  # -> its number, in order of appearance
        self._counts: list[int] = []
        self._size, self._token_end, self._teacher_end = 0, 0, 0

    def add(self, example: TrainingExample, leaves: Iterable[Path]) -> int:
        """Appends one example, to be learnt in each of these leaves; returns its number."""
        teacher = example.teacher if example.teacher is not None else np.empty(0, np.int32)
        self._token_end += len(example.tokens)
        self._teacher_end += len(teacher)
        row = (self._token_end, self._teacher_end, example.window, int(example.learn.sum()), example.form)
        self._write("tokens", np.asarray(example.tokens, np.int32))
        self._write("learn", np.asarray(example.learn, np.bool_))
        self._write("teachers", np.asarray(teacher, np.int32))
        self._write("index", np.array(row, np.int64))
        for leaf in dict.fromkeys(leaves):
            number = self._leaves.setdefault(leaf, len(self._leaves))
            if number == len(self._counts):
                self._counts.append(0)
                self._digest.update(str(leaf).encode())
            self._counts[number] += 1
            self._write("pairs", np.array((number, self._size), np.int64))
        self._size += 1
        return self._size - 1

    def _write(self, name: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._digest.update(data)
        self._files[name].write(data)

    def __enter__(self) -> TrainingSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if error is None:
            self._finish()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _finish(self) -> None:
        leaves = sorted(self._leaves)
        ends = np.cumsum([self._counts[self._leaves[leaf]] for leaf in leaves], dtype=np.int64)
        self._sort_by_leaf(leaves, ends)
        (self.partial / "pairs").unlink()
        head = {"leaves": [str(leaf) for leaf in leaves], "ends": ends.tolist(), "digest": self._digest.hexdigest()}
        (self.partial / "set.json").write_text(json.dumps(head), encoding="utf-8")
        replace_folder(self.partial, self.folder)

    def _sort_by_leaf(self, leaves: list[Path], ends: np.ndarray) -> None:
        """(leaf, example) pairs -> examples leaf by leaf: a counting sort that holds one chunk in memory."""
        pairs = _map(self.partial / "pairs", np.int64).reshape(-1, 2)
        (self.partial / "assigned").write_bytes(b"")
        if not len(pairs):
            return
        assigned = np.memmap(self.partial / "assigned", np.int64, "w+", shape=(len(pairs),))
        following = np.empty(len(leaves), np.int64)  # where each leaf's next example goes
        following[[self._leaves[leaf] for leaf in leaves]] = np.concatenate(([0], ends[:-1]))
        for start in range(0, len(pairs), CHUNK):
            numbers, examples = np.array(pairs[start : start + CHUNK]).T
            order = np.argsort(numbers, kind="stable")
            present, first, counts = np.unique(numbers[order], return_index=True, return_counts=True)
            rank = np.arange(len(order)) - np.repeat(first, counts)
            assigned[following[numbers[order]] + rank] = examples[order]
            following[present] += counts
        assigned.flush()


def _map(file: pathlib.Path, dtype: type) -> np.ndarray:
    """A read-only view of a raw file; numpy cannot map an empty one."""
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)
