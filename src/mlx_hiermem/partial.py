"""Running only a part of an anchor: from a layer on, with the output at some positions, several texts in a row.

Training a memory in the last layers of a frozen anchor repeats nothing below them, and needs predictions only where
something is learnt. mlx-lm's models have no such entrances, and there are a hundred of them. So nothing is written
again here: for the length of one call a layer is of a subclass of its own class. The layers below pass their input
through, the first one that runs gets the given states instead, the last one puts out the chosen positions alone.
What follows it (norm, output projection, soft caps) works position by position and does not notice.

Texts that share a row do not see each other: attention takes its mask from a "KV cache" that keeps nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache

from mlx_hiermem.errors import AnchorError

Call = Callable[..., mx.array]  # a layer: states, mask, cache -> states
Replacement = Callable[..., mx.array]  # the same, after the layer's own call


class DocumentMask:
    """Stands in for a layer's KV cache: every position sees those before it that are of the same document."""

    offset = 0

    def __init__(self, documents: mx.array) -> None:
        """documents [B, T]: a number per position, equal within a document."""
        T = documents.shape[1]
        positions = mx.arange(T)
        self._distance = positions[:, None] - positions[None]  # from the key to the query
        self._same = documents[:, None, :, None] == documents[:, None, None, :]  # [B, 1, T, T]

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """bool [B, 1, T, T]: which key (last) each query sees."""
        visible = self._same & (self._distance >= 0)
        return visible & (self._distance < window_size) if window_size else visible

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values as they are: nothing is kept."""
        return keys, values


class PartialAnchor:
    """An mlx-lm model that can be entered at any layer. Memories attached to it take part."""

    def __init__(self, model: nn.Module, vocabulary: int | None = None) -> None:
        """`vocabulary`: ids that are real, where the model's own number is padded."""
        self.model, self.layers, self.vocabulary = model, list(model.layers), vocabulary

    def states(
        self,
        tokens: mx.array,
        layer: int,
        documents: mx.array | None = None,
        cache: Sequence[Any] | None = None,
    ) -> mx.array:
        """What enters a layer (or leaves the last): tokens [B, T] -> [B, T, d]. Nothing above is computed.

        `cache` are the layers' KV caches, where the tokens go on from earlier ones.
        """
        seen: list[mx.array] = []

        def note(own: Call, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            seen.append(x)
            return own(x, *args, **kwargs)

        def note_output(own: Call, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            seen.append(own(x, *args, **kwargs))
            return seen[-1]

        above = layer < len(self.layers)
        with _calling({min(layer, len(self.layers) - 1): note if above else note_output}, self.layers):
            self._run(tokens, documents, cache)
        return seen[0]

    def logits(
        self,
        tokens: mx.array,
        positions: mx.array,
        documents: mx.array | None = None,
        layer: int = 0,
        states: mx.array | None = None,
        cache: Sequence[Any] | None = None,
    ) -> mx.array:
        """Logits [M, V] at `positions` [M] of tokens [B, T], read as one row, by the layers from `layer` on.

        `states` [B, T, d] is what enters that layer; without them the whole model runs. `cache` is what `begin`
        gave for the tokens before these.
        """
        last = len(self.layers) - 1
        calls = _entering(layer, states)
        below = calls.get(last, lambda own, *a, **k: own(*a, **k))

        def choose(own: Call, *args: Any, **kwargs: Any) -> mx.array:
            x = below(own, *args, **kwargs)
            return x.reshape(1, -1, x.shape[-1])[:, positions]

        with _calling(calls | {last: choose}, self.layers):
            return self._run(tokens, documents, cache)[0]

    def begin(
        self, tokens: mx.array, rows: int, layer: int = 0, states: mx.array | None = None
    ) -> list[ConcatenateKVCache]:
        """The layers' KV caches after tokens [1, P], for so many rows that go on there; gradients pass through.

        `layer` and `states` [1, P, d] as for `logits`, which must be given the same layer.
        """
        cache = [ConcatenateKVCache() for _ in self.layers]
        with _calling(_entering(layer, states), self.layers):
            self.model(tokens, cache=cache)  # nothing asks for the logits, so they are not computed
        for one in cache:
            one.offset = tokens.shape[1]  # of the layers below too, by which masks are made
            if one.keys is not None:
                one.keys, one.values = (mx.broadcast_to(x, (rows, *x.shape[1:])) for x in one.state)
        return cache

    def head(self, states: mx.array) -> mx.array:
        """Logits [M, V] of what the last layer put out [M, d]."""
        last = len(self.layers) - 1
        calls: dict[int, Replacement] = dict.fromkeys(range(last), _pass)
        with _calling(calls | {last: lambda *_, **__: states[None]}, self.layers):
            return self._run(mx.zeros((1, len(states)), mx.int32), None)[0]

    def _run(self, tokens: mx.array, documents: mx.array | None, cache: Sequence[Any] | None = None) -> mx.array:
        if documents is not None:
            cache = [DocumentMask(documents)] * len(self.layers)
        logits = self.model(tokens, cache=cache)
        return logits[..., : self.vocabulary] if self.vocabulary else logits

    def check(self) -> None:
        """Raises AnchorError unless this architecture gives by parts, and packed, what it gives whole."""
        rng = np.random.default_rng(0)
        texts = [rng.integers(0, 64, 5), rng.integers(0, 64, 7)]
        whole = [self.model(mx.array(text[None]))[0] for text in texts]
        expected = mx.concatenate(whole)[..., : self.vocabulary]
        tokens, documents = mx.array(np.concatenate(texts)[None]), mx.array([[0] * 5 + [1] * 7])
        layer = len(self.layers) // 2
        states = self.states(tokens, layer, documents)
        found = self.logits(tokens, mx.arange(12), documents, layer, states)
        split = mx.array(texts[1][None])
        after = self.logits(split[:, 3:], mx.arange(4), cache=self.begin(split[:, :3], 1))
        found = mx.concatenate([found, after])
        expected = mx.concatenate([expected, expected[-4:]])
        scale = float(mx.abs(expected).max())
        tolerance = 1e-3 if expected.dtype == mx.float32 else 0.1
        if not float(mx.abs(found - expected).max()) <= tolerance * scale:
            raise AnchorError(
                f"{type(self.model).__module__} does not give by parts what it gives whole",
                "This architecture cannot learn memories yet; dense llama-like models can.",
            )


def _entering(layer: int, states: mx.array | None) -> dict[int, Replacement]:
    """The calls of layers where `states`, if given, enter one: those below it compute nothing."""
    if states is None:
        return {}
    return dict.fromkeys(range(layer), _pass) | {layer: lambda own, x, *a, **k: own(states, *a, **k)}


def prefill(model: nn.Module, tokens: Sequence[int]) -> list[KVCache] | None:
    """The KV caches of a text that others begin with; None for layers of other kinds, by windows or states."""
    cache = make_prompt_cache(model)
    if not all(type(layer) is KVCache for layer in cache):
        return None
    model(mx.array([tokens]), cache=cache)
    mx.eval([layer.state for layer in cache])
    return cache


def repeat_cache(cache: Sequence[KVCache], rows: int) -> list[KVCache]:
    """KV caches of one text, for so many continuations of it."""
    found = []
    for layer in cache:
        found.append(copy.copy(layer))
        found[-1].keys, found[-1].values = (mx.broadcast_to(x, (rows, *x.shape[1:])) for x in layer.state[:2])
    return found


def _pass(own: Call, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    return x


@contextlib.contextmanager
def _calling(calls: dict[int, Replacement], layers: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, a call of layer i is `calls[i](its own call, x, ...)`."""
    own = {index: type(layers[index]) for index in calls}

    def subclass(kind: type, call: Replacement) -> type:
        def replaced(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            return call(lambda *a, **k: kind.__call__(self, *a, **k), x, *args, **kwargs)

        return type(kind.__name__, (kind,), {"__call__": replaced})

    try:
        for index, call in calls.items():
            layers[index].__class__ = subclass(own[index], call)
        yield
    finally:
        for index, kind in own.items():
            layers[index].__class__ = kind
