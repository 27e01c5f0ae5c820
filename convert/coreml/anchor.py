"""The anchor as a Core ML program: `decode` (one token), `prefill` (32) and, if wanted, `load_block`.

    input_ids [1, T], position [1]  ->  logits_0, logits_1, … [1, T, at most 16 384]

Keys and values, and the memory that widens the feed-forward layers (arXiv:2510.02375, §2.2), are states: the app
writes a memory once, and no decode step sends it again. The functions share every weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml import mil
from mlx_hiermem.convert.coreml.layers import Cache, Positions, attention, fill, linear, norm, take
from mlx_hiermem.convert.coreml.mil import Var, Weights, half, mb
from mlx_hiermem.convert.export.architecture import Architecture, Layer, Norm
from mlx_hiermem.convert.export.shape import CACHES, LOAD, MEMORY, Export, parts

SMALLER = 16.0  # a power of two rounds nothing; of a larger one sqrt(eps) would be subnormal in float16


def build(sizes: Architecture, export: Export, plan: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The functions, ready for `mil.save`. `plan`: formats of compressed weights by name, see `matrices`."""
    sizes, weights = with_small_stream(sizes), Weights(plan)
    functions = {
        name: mil.function(_inputs(sizes, export, tokens), _Body(sizes, export, tokens, weights))
        for name, tokens in export.functions.items()
    }
    if export.load_block:
        shape = export.memory_shape(sizes)
        new = {f"new_{name}": mil.tensor(shape) for name in MEMORY}
        functions[LOAD] = mil.function(
            new | _states(sizes, export), partial(_load, shape=export.memory_state(sizes)[1:])
        )
    return functions


def _states(sizes: Architecture, export: Export) -> dict[str, Any]:
    states = {name: mil.state(export.cache_shape(sizes)) for name in CACHES}
    if export.units and export.mode == "state":
        states |= {name: mil.state(export.memory_state(sizes)) for name in MEMORY}
    return states


def _inputs(sizes: Architecture, export: Export, tokens: int) -> dict[str, Any]:
    inputs = {"input_ids": mil.tensor((1, tokens), "int32"), "position": mil.tensor((1,), "int32")}
    if export.units and export.mode == "input":
        inputs |= {name: mil.tensor(export.memory_shape(sizes)) for name in MEMORY}
    return inputs | _states(sizes, export)


def _load(given: Mapping[str, Var], shape: tuple[int, int]) -> Sequence[Var]:
    """Writes the memory states from inputs; returns the largest value that `down` now has."""
    for name in MEMORY:
        written = mb.coreml_update_state(state=given[name], value=fill(given[f"new_{name}"], *shape))
    for name in CACHES:  # so that one state serves all functions
        mb.read_state(input=given[name])
    peak = mb.reduce_max(x=mb.abs(x=written), axes=[0, 1, 2], keep_dims=True)
    return [mb.reshape(x=peak, shape=[1], name="peak")]


def with_small_stream(sizes: Architecture) -> Architecture:
    """The same anchor with its residual stream divided by `SMALLER`, where float16 may not hold it: in Gemma 3.

    Nothing else changes: what reads the stream is a norm, and all that is added to it comes from one.
    """
    if sizes.kind != "gemma3_text":
        return sizes
    layers = tuple(
        replace(
            layer,
            before_attention=_of_small(layer.before_attention),
            after_attention=_to_small(layer.after_attention),
            before_ffn=_of_small(layer.before_ffn),
            after_ffn=_to_small(layer.after_ffn),
        )
        for layer in sizes.layers
    )
    scale = sizes.embedding_scale / SMALLER
    return replace(sizes, embedding_scale=scale, layers=layers, norm=_of_small(sizes.norm))


def _of_small(norm: Norm) -> Norm:
    return replace(norm, eps=norm.eps / SMALLER**2)


def _to_small(norm: Norm | None) -> Norm:
    assert norm is not None  # Gemma has one behind each half of a layer
    assert norm.gain is not None
    return replace(norm, gain=norm.gain / np.float32(SMALLER))


class Stream:
    """The residual stream, and what float16 rounded off when it was last added to (Kahan's summation).

    Where one channel is huge, the others' sums would lose more than all other roundings together: on SmolLM2 the
    largest error of a logit is halved.
    """

    def __init__(self, value: Var) -> None:
        self.value, self.lost = value, None

    def add(self, x: Var, name: str) -> None:
        if self.lost is not None:
            x = mb.add(x=x, y=self.lost)
        total = mb.add(x=self.value, y=x, name=name)
        self.lost = mb.sub(x=x, y=mb.sub(x=total, y=self.value), name=f"{name}_lost")
        self.value = total


@dataclass
class _Body:
    """One function's operations, for a call of `tokens`."""

    sizes: Architecture
    export: Export
    tokens: int
    weights: Weights

    def __call__(self, given: Mapping[str, Var]) -> Sequence[Var]:
        sizes = self.sizes
        self.weights.begin()
        at = Positions(self.tokens, self.export.room, given["position"], self.weights)
        memory, caches = self._memory(given), [Cache(given[name]) for name in CACHES]
        x = Stream(self._embed(given["input_ids"]))
        for index, layer in enumerate(sizes.layers):
            name = f"layers_{index}"
            y = norm(x.value, layer.before_attention, self.weights, f"{name}_before_attention")
            y = attention(y, index, layer, sizes, at, caches, self.weights)
            if layer.after_attention:
                y = norm(y, layer.after_attention, self.weights, f"{name}_after_attention")
            x.add(y, f"{name}_attended")
            y = norm(x.value, layer.before_ffn, self.weights, f"{name}_before_ffn")
            y = self._feed_forward(y, index, layer, memory)
            if layer.after_ffn:
                y = norm(y, layer.after_ffn, self.weights, f"{name}_after_ffn")
            x.add(y, name)
        y = norm(x.value, sizes.norm, self.weights, "norm")
        heads = enumerate(parts(sizes.head or sizes.embeddings))
        return [linear(y, head, self.weights, f"logits_{number}") for number, head in heads]

    def _embed(self, ids: Var) -> Var:
        """[1, T] -> [1, T, d]. Each part gives its rows or zeros, so that the head's parts serve here too."""
        sizes, found = self.sizes, None
        tables = parts(sizes.embeddings)
        for table in tables:
            last = len(table.weight) - 1
            row = mb.sub(x=ids, y=np.int32(table.start))
            inside = mb.maximum(x=mb.minimum(x=row, y=np.int32(last)), y=np.int32(0))
            weight = (
                self.weights.constant(table.name, table.weight)
                if sizes.head
                else self.weights.matrix(table.name, table.weight)
            )
            rows = mb.gather(x=weight, indices=inside, axis=0, name=f"{table.name}_rows")
            if len(tables) > 1:
                here = mb.equal(x=mb.add(x=inside, y=np.int32(table.start)), y=ids)
                here = mb.expand_dims(x=mb.cast(x=here, dtype="fp16"), axes=[-1])
                rows = mb.mul(x=rows, y=here)
            found = rows if found is None else mb.add(x=found, y=rows)
        if sizes.embedding_scale != 1.0:
            found = mb.mul(x=found, y=half(sizes.embedding_scale), name="embedded_scaled")
        if sizes.embedding_norm:
            found = norm(found, sizes.embedding_norm, self.weights, "embedding_norm")
        return found

    def _memory(self, given: Mapping[str, Var]) -> dict[str, Var]:
        if not self.export.units:
            return {}
        if self.export.mode == "input":
            return {name: given[name] for name in MEMORY}
        return {name: mb.read_state(input=given[name], name=f"memory_{name}") for name in MEMORY}

    def _feed_forward(self, x: Var, index: int, layer: Layer, memory: dict[str, Var]) -> Var:
        gate, up = linear(x, layer.gate, self.weights), linear(x, layer.up, self.weights)
        y = linear(self._gated(gate, up, f"layers_{index}_ffn"), layer.down, self.weights)
        if not memory or index not in self.export.memory_layers:
            return y
        row, name = self.export.memory_layers.index(index), f"layers_{index}_memory"
        gate, up, down = (take(memory[part], row, f"{name}_{part}", self.sizes.hidden) for part in MEMORY)
        inner = self._gated(mb.matmul(x=x, y=gate, transpose_y=True), mb.matmul(x=x, y=up, transpose_y=True), name)
        return mb.add(x=y, y=mb.matmul(x=inner, y=down), name=f"{name}_added")

    def _gated(self, gate: Var, up: Var, name: str) -> Var:
        if self.sizes.activation == "silu":
            active = mb.silu(x=gate)
        else:
            mode = "TANH_APPROXIMATION" if self.sizes.activation == "gelu_tanh" else "EXACT"
            active = mb.gelu(x=gate, mode=mode)
        return mb.mul(x=active, y=up, name=f"{name}_gated")
