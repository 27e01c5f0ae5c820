"""How likely continuations are: many at a time, and what they share computed once.

The continuations of one example begin with the same tokens (its few-shot examples, its question), whose keys and
values are computed once and then repeated for each. Of the rest only the positions that predict a continuation's
token go through the output projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_hiermem.evaluate.examples import shared_beginning
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.partial import PartialAnchor

Pair = tuple[list[int], list[int]]  # context (a token or more), continuation
BATCH_TOKENS = 1024  # computed in one pass, padding included
HEAD_ROWS = 256  # predictions at a time: each is as wide as the vocabulary
WORTH_SHARING = 8  # tokens that must be the same in all pairs of an example, for a pass of their own


@dataclass(frozen=True)
class Score:
    """Of one continuation: its negative log likelihood in nats, and the likeliest token in the place of each."""

    nll: float
    tokens: int
    likeliest: tuple[int, ...]
    greedy: bool  # the continuation's tokens are the likeliest

    @property
    def mean(self) -> float:
        """Cross-entropy per token; no tokens count as certain."""
        return self.nll / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class _Request:
    number: int
    pairs: tuple[Pair, ...]
    shared: int  # tokens with which all pairs begin, and that are computed once

    @property
    def longest(self) -> int:
        """Tokens of the longest pair that are computed behind the shared ones; the last one is never an input."""
        return max(len(context) + len(continuation) for context, continuation in self.pairs) - self.shared - 1


class Scorer:
    """Scores with whatever memory the model has attached. `computed` counts the tokens that went through it."""

    def __init__(self, model: MemoryModel, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self.anchor = PartialAnchor(model.anchor, model.config.get("effective_vocab_size"))
        self.computed = 0

    def score(self, examples: Sequence[Sequence[Pair]]) -> Iterator[list[tuple[int, list[Score]]]]:
        """Batch by batch, (number of the example, scores of its pairs), examples of like length together."""
        requests = [_Request(number, tuple(pairs), _shared(pairs)) for number, pairs in enumerate(examples)]
        requests.sort(key=lambda request: (request.shared, request.longest, request.number))
        for batch in self._batches(requests):
            yield list(zip((request.number for request in batch), self._run(batch), strict=True))

    def _batches(self, requests: Sequence[_Request]) -> Iterator[list[_Request]]:
        """Those without shared tokens apart from the others, at most `batch_tokens` padded, or one example."""
        batch: list[_Request] = []
        for request in requests:
            grown = [*batch, request]
            rows = sum(len(one.pairs) for one in grown)
            shared, longest = max(one.shared for one in grown), max(one.longest for one in grown)
            full = rows * longest + len(grown) * shared > self.batch_tokens
            if batch and (full or (request.shared > 0) != (batch[0].shared > 0)):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _run(self, batch: Sequence[_Request]) -> list[list[Score]]:
        rows = [(request.shared, *pair) for request in batch for pair in request.pairs]
        cache = None
        if batch[0].shared:
            cache = self._prefill([request.pairs[0][0][: request.shared] for request in batch])
            owner = mx.array([number for number, request in enumerate(batch) for _ in request.pairs])
            for layer in cache:
                layer.filter(owner)
        inputs = [(context + continuation)[shared:-1] for shared, context, continuation in rows]
        states = self.anchor.states(_padded(inputs), len(self.anchor.layers), cache=cache)  # [B, T, d]
        self.computed += sum(map(len, inputs))
        width = states.shape[1]
        positions = [
            row * width + len(context) - shared - 1 + i
            for row, (shared, context, continuation) in enumerate(rows)
            for i in range(len(continuation))
        ]
        targets = [token for _, _, continuation in rows for token in continuation]
        nll, likeliest = self._predict(states.reshape(-1, states.shape[-1])[mx.array(positions)], targets)
        ends = np.cumsum([len(continuation) for _, _, continuation in rows])[:-1]
        parts = zip(np.split(nll, ends), np.split(likeliest, ends), rows, strict=True)
        scores = iter([_score(n, best, continuation) for n, best, (_, _, continuation) in parts])
        return [[next(scores) for _ in request.pairs] for request in batch]

    def _prefill(self, prefixes: Sequence[list[int]]) -> list[Any]:
        """The KV caches behind these tokens, a row each; what was padded on the right is shifted to the left."""
        single = [make_prompt_cache(self.model.anchor) for _ in prefixes]
        cache = [type(layers[0]).merge(layers) for layers in zip(*single, strict=True)]
        lengths = [len(prefix) for prefix in prefixes]
        padding = [max(lengths) - length for length in lengths]
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=padding)
        self.anchor.states(_padded(prefixes), len(self.anchor.layers), cache=cache)
        for layer in cache:
            layer.finalize()
        mx.eval([layer.state for layer in cache])
        self.computed += sum(lengths)
        return cache

    def _predict(self, states: mx.array, targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """states [M, d] -> negative log likelihood [M] of what they should predict, the likeliest [M]."""
        nll, likeliest = [], []
        for start in range(0, len(targets), HEAD_ROWS):
            wanted = mx.array(targets[start : start + HEAD_ROWS])
            logits = self.anchor.head(states[start : start + HEAD_ROWS]).astype(mx.float32)  # [m, V]
            of_wanted = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
            pair = (mx.logsumexp(logits, axis=-1) - of_wanted, logits.argmax(-1))
            mx.eval(pair)
            nll.append(np.array(pair[0]))
            likeliest.append(np.array(pair[1]))
        return np.concatenate(nll), np.concatenate(likeliest)


def _score(nll: np.ndarray, likeliest: np.ndarray, continuation: list[int]) -> Score:
    best = tuple(likeliest.tolist())
    return Score(float(nll.sum(dtype=np.float64)), len(continuation), best, best == tuple(continuation))


def _shared(pairs: Sequence[Pair]) -> int:
    """Tokens with which all contexts begin, but never a whole one: its last token predicts."""
    if len(pairs) == 1:
        return 0
    contexts = [context for context, _ in pairs]
    shared = min(shared_beginning(contexts), min(map(len, contexts)) - 1)
    return shared if shared >= WORTH_SHARING else 0


def _padded(rows: Sequence[list[int]]) -> mx.array:
    """[B, T], 0 where nothing is."""
    width = max(map(len, rows))
    return mx.array([row + [0] * (width - len(row)) for row in rows])
