"""Texts of one leaf -> groups of about as many tokens -> rows of a batch, several texts in one.

A row is at least as long as the group's longest text, and shorter ones fill it up; lengths come in few sizes, so
that MLX compiles few shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.learn.train.dataset import Example

JITTER = 16  # tokens by which lengths are blurred, so that each epoch has other groups
ROW = 128  # tokens that a row may have for the sake of being filled better
PREDICTED = 32  # the number of predicted positions in a batch is a multiple of this


@dataclass(frozen=True)
class Batch:
    """Rows of texts. An input position predicts the token after it; the last token of a text is no input."""

    tokens: np.ndarray  # int32 [B, T], 0 where nothing is
    documents: np.ndarray  # int32 [B, T]: the text's place in the group, -1 where nothing is
    places: list[tuple[int, int]]  # of each text: its row, and where it starts there
    positions: np.ndarray  # int32 [M]: where something is learnt, in the batch read as one row
    targets: np.ndarray  # int32 [M]
    weights: np.ndarray  # float32 [M]: 1, or 0 for what only fills up

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one text: then attention needs a mask."""
        return len(self.places) > len(self.tokens)


def group_by_length(
    numbers: np.ndarray, lengths: np.ndarray, tokens: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Splits a leaf's examples, at random, into groups of like length and at most `tokens` tokens (or one text).

    `numbers` [n] of the examples and `lengths` [n] in tokens -> the numbers of each group.
    """
    order = np.argsort(lengths + rng.integers(JITTER, size=len(lengths)) + rng.random(len(lengths)))
    groups, start, total = [], 0, 0
    for end, length in enumerate(lengths[order].tolist()):
        if total and total + length > tokens:
            groups.append(numbers[order[start:end]])
            start, total = end, 0
        total += length
    return [*groups, numbers[order[start:]]] if len(numbers) else []


def row_length(longest: int) -> int:
    """The next length that rows have: multiples of 16 to 64, then eighths of a power of two."""
    step = max(16, 1 << max(0, (longest - 1).bit_length() - 3))
    return -(-longest // step) * step


def pack(lengths: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """The row's length that leaves least empty, and (row, start) of each text.

    On the elements' short texts rows are full to 92 %, to 81 % with the shortest length that would do.
    """
    shortest = row_length(max(lengths))
    candidates = dict.fromkeys(row_length(tokens) for tokens in range(shortest, max(ROW, shortest) + 1, 16))
    packed = {row: first_fit_decreasing(lengths, row) for row in candidates}
    row = min(candidates, key=lambda row: (row * (1 + max(r for r, _ in packed[row])), row))
    return row, packed[row]


def first_fit_decreasing(lengths: Sequence[int], row: int) -> list[tuple[int, int]]:
    """(row, start) of each text: bin packing that takes the longest first, each into the first row with room."""
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r, left in enumerate(room) if left >= lengths[i]), len(room))
        if r == len(room):
            room.append(row)
        places[i] = (r, row - room[r])
        room[r] -= lengths[i]
    return places


def collate(examples: Sequence[Example]) -> Batch:
    """Packs a group's examples into one batch."""
    inputs = [len(example.tokens) - 1 for example in examples]
    T, places = pack(inputs)
    shape = (1 + max(r for r, _ in places), T)
    tokens, documents = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    positions, targets = [], []
    for i, (example, (row, start)) in enumerate(zip(examples, places, strict=True)):
        tokens[row, start : start + inputs[i]] = example.tokens[:-1]
        documents[row, start : start + inputs[i]] = i
        learnt = np.flatnonzero(example.learn)
        positions.append(row * T + start + learnt - 1)
        targets.append(example.tokens[learnt])
    learnt_count = sum(map(len, targets))
    spare = np.zeros(-learnt_count % PREDICTED, np.int32)
    return Batch(
        tokens,
        documents,
        places,
        np.concatenate([*positions, spare]).astype(np.int32),
        np.concatenate([*targets, spare]).astype(np.int32),
        np.concatenate([np.ones(learnt_count, np.float32), spare.astype(np.float32)]),
    )
