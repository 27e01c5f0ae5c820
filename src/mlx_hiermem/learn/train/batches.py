"""Which texts are learnt together, and how they lie in rows.

A group's texts share one memory. They are of like length, several to a row. Where they begin alike, as all chats do
with the anchor's chat template, the beginning is read once, and what follows it has a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_hiermem.learn.train.dataset import SHARED, TrainingExample

JITTER = 16  # tokens by which lengths are blurred, so that each epoch has other groups
ROW = 128  # tokens that a row may have for the sake of being filled better
STEP = 8  # the length of rows after a beginning is a multiple of this
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
    beginning: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # [P]: before every row, not in it

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one text: then attention needs a mask."""
        return len(self.places) > len(self.tokens)


def group_by_length(
    numbers: np.ndarray,
    lengths: np.ndarray,
    tokens: int,
    rng: np.random.Generator,
    beginnings: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Splits a leaf's examples, at random, into groups of like length and at most `tokens` tokens (or one text).

    `numbers` [n] of the examples and `lengths` [n] in tokens -> the numbers of each group. With their `beginnings`
    [n], those of which there is a group's worth are grouped among themselves.
    """
    groups = []
    for some in _alike(lengths, tokens, beginnings):
        own = lengths[some]
        order = some[np.argsort(own + rng.integers(JITTER, size=len(own)) + rng.random(len(own)))]
        start = total = 0
        for end, length in enumerate(lengths[order].tolist()):
            if total and total + length > tokens:
                groups.append(numbers[order[start:end]])
                start, total = end, 0
            total += length
        groups.append(numbers[order[start:]])
    return groups


def _alike(lengths: np.ndarray, tokens: int, beginnings: np.ndarray | None) -> Iterator[np.ndarray]:
    """The places [m] of examples that begin alike, if they have `tokens` tokens, and of all others."""
    left = np.ones(len(lengths), bool)
    if beginnings is not None:
        values, which = np.unique(beginnings, return_inverse=True)
        enough = (np.bincount(which, lengths) >= tokens) & (values != 0)
        for value in np.flatnonzero(enough):
            yield np.flatnonzero(which == value)
        left = ~enough[which]
    if left.any():
        yield np.flatnonzero(left)


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


def collate(examples: Sequence[TrainingExample], share: bool = True) -> Batch:
    """Packs a group's examples into one batch; with `share` a beginning that all have is taken out."""
    inputs = [len(example.tokens) - 1 for example in examples]
    P, (T, places) = shared_beginning(examples) if share else 0, pack(inputs)
    if P:
        longest = -(-(max(inputs) - P) // STEP) * STEP
        if P + len(inputs) * longest < T * (1 + max(r for r, _ in places)):
            inputs, T, places = [n - P for n in inputs], longest, [(r, 0) for r in range(len(inputs))]
        else:
            P = 0
    shape = (1 + max(r for r, _ in places), T)
    tokens, documents = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    positions, targets = [], []
    for i, (example, (row, start)) in enumerate(zip(examples, places, strict=True)):
        tokens[row, start : start + inputs[i]] = example.tokens[P:-1]
        documents[row, start : start + inputs[i]] = i
        learnt = np.flatnonzero(example.learn)
        positions.append(row * T + start + learnt - 1 - P)
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
        examples[0].tokens[:P],
    )


def shared_beginning(examples: Sequence[TrainingExample]) -> int:
    """With how many tokens all of several examples begin, before what is learnt; 0 if they are few."""
    if len(examples) < 2:
        return 0
    most = min(int(example.learn.argmax()) - 1 for example in examples)  # a row has what predicts the first one
    shared = common_tokens([example.tokens for example in examples], most)
    return shared if shared >= SHARED else 0


def common_tokens(texts: Sequence[np.ndarray], most: int) -> int:
    """With how many tokens all of these texts [n] begin, at most `most`."""
    most = min(most, *map(len, texts))
    differs = np.any([text[:most] != texts[0][:most] for text in texts], axis=0)
    return int(differs.argmax()) if differs.any() else most
