"""Greedy replies to many prompts, several in each decode step, each until it is decided whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlx_hiermem.batch import MemoryBatch, Sampling
from mlx_hiermem.model import Choice, MemoryModel

SEQUENCES = 16  # in a decode step


@dataclass(frozen=True)
class Asked:
    """A prompt under a memory. `done` says of what was said so far that nothing more is needed."""

    tokens: list[int]
    choice: Choice
    max_tokens: int
    done: Callable[[str], bool]


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
            while batch.room and (following := next(waiting, None)) is not None:
                number, one = following
                uid, _ = batch.add(one.tokens, one.choice, Sampling(max_tokens=one.max_tokens))
                numbers[uid], said[uid] = number, []
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
