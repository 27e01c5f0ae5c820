"""Exported models from outside: functions, states and memory, and the matrices that may be compressed.

Core ML's exporter and Core AI's share it; it needs no library of either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_hiermem.convert.export.architecture import Architecture, Linear
from mlx_hiermem.embedder import Embedder

DECODE, PREFILL, LOAD = "decode", "prefill", "load_block"
PREFILL_TOKENS = 32  # the Neural Engine takes updates of a slice only of more than one token
LENGTHS = (16, 32, 64, 128, 256)  # tokens that a retriever takes
PART = 16_384  # the longest axis that the Neural Engine takes, reportedly
CACHES, MEMORY = ("k_cache", "v_cache"), ("gate", "up", "down")


@dataclass(frozen=True)
class Export:
    """What to build. `memory_layers` and `units` are 0 for an anchor without memory; `mode` is state or input."""

    context: int
    memory_layers: tuple[int, ...] = ()
    units: int = 0
    mode: str = "state"
    load_block: bool = False
    prefill: int = PREFILL_TOKENS

    @property
    def functions(self) -> dict[str, int]:
        """Name -> tokens a call takes."""
        return {DECODE: 1, PREFILL: self.prefill}

    @property
    def memory_inputs(self) -> tuple[str, ...]:
        return MEMORY if self.units and self.mode == "input" else ()

    def memory_shape(self, sizes: Architecture) -> tuple[int, int, int]:
        return len(self.memory_layers), self.units, sizes.hidden

    def cache_shape(self, sizes: Architecture) -> tuple[int, int, int, int]:
        return len(sizes.layers), sizes.kv_heads, self.context, sizes.head_dim


def matrices(sizes: Architecture) -> list[Linear]:
    """The weights that may be compressed: what is multiplied with.

    Rotary tables and norms are not among them, nor embeddings that no head shares, of which a call reads a row.
    """
    found = parts(sizes.head or sizes.embeddings)
    for layer in sizes.layers:
        found += [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
    return found


def parts(table: Linear) -> list[Linear]:
    """A table [V, d] in equal parts of at most 16 384 rows, the last perhaps shorter."""
    size = math.ceil(len(table.weight) / math.ceil(len(table.weight) / PART))
    return [
        Linear(
            table.path,
            table.weight[start : start + size],
            None if table.bias is None else table.bias[start : start + size],
            part=number,
            start=start,
        )
        for number, start in enumerate(range(0, len(table.weight), size))
    ]


def lengths_of(embedder: Embedder) -> tuple[int, ...]:
    """Token counts a call of the retriever may have; the longest is where the embedder truncates."""
    longest = embedder.identity.max_tokens
    return (*(length for length in LENGTHS if length < longest), longest)
