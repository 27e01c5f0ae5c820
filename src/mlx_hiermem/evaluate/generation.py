"""Greedy replies to many prompts, several in each decode step, each until it is decided whether it is right.

Most are decided without a decode step: where prompt and right answer are computed in one pass, the likeliest tokens
are the reply as far as it agrees with the answer, and one token further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlx_hiermem.batch import MemoryBatch
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.selection import Selection

SEQUENCES = 64  # in a decode step: one takes hardly longer than for a few
REFILL = 0.5  # of them are left when others join: prompts that are computed together cost less


@dataclass(frozen=True)
class Asked:
    """A prompt under a memory. `done` says of what was said so far that nothing more is needed."""

    tokens: list[int]
    chosen: Selection
    max_tokens: int
    done: Callable[[str], bool]
    said: tuple[int, ...] = ()  # of the reply, what is known already


def drafted(draft: Sequence[int], likeliest: Sequence[int]) -> list[int]:
    """A greedy reply's first tokens, given the likeliest token in the place of each of the draft and behind it."""
    agreed = next((i for i, (a, b) in enumerate(zip(draft, likeliest, strict=False)) if a != b), len(draft))
    return list(likeliest[: agreed + 1])


def replies(
    model: MemoryModel, asked: Sequence[Asked], decode: Callable[[list[int]], str], sequences: int = SEQUENCES
) -> Iterator[tuple[int, str]]:
    """(number, reply), in the order in which they end. Prompts are asked in the order given."""
    batch = MemoryBatch(model, sequences, prefix_cache_bytes=0)
    waiting = iter(enumerate(asked))
    numbers: dict[int, int] = {}  # of the sequences in flight
    said: dict[int, list[int]] = {}
    try:
        while True:
            refill = len(batch) <= REFILL * sequences
            while refill and batch.room and (following := next(waiting, None)) is not None:
                number, one = following
                left = Sampling(max_tokens=one.max_tokens - len(one.said))
                uid, _ = batch.add([*one.tokens, *one.said], one.chosen, left)
                numbers[uid], said[uid] = number, list(one.said)
            if not numbers:
                return
            for token in batch.step():
                if token.finish_reason != "stop":
                    said[token.uid].append(token.token)
                text = decode(said[token.uid])
                if token.finish_reason or asked[numbers[token.uid]].done(text):
                    batch.remove(token.uid)
                    del said[token.uid]
                    yield numbers.pop(token.uid), text
    finally:
        batch.close()
        if model.attachment:
            model.attachment.clear()
