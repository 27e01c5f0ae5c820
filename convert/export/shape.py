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
STEP = 32  # states with axes that are no multiple of it are reported to fail on devices (coremltools #2631)
PART = 16_384  # the longest axis that the Neural Engine takes, reportedly
CACHES, MEMORY = ("k_cache", "v_cache"), ("gate", "up", "down")


@dataclass(frozen=True)
class Export:
    """What to build. `memory_layers` and `units` are 0 for an anchor without memory; `mode` is state or input.

    `step`: the last two axes of a state are filled up to a multiple of it.
    """

    context: int
    memory_layers: tuple[int, ...] = ()
    units: int = 0
    mode: str = "state"
    load_block: bool = False
    prefill: int = PREFILL_TOKENS
    step: int = 1

    @property
    def functions(self) -> dict[str, int]:
        """Name -> tokens a call takes."""
        return {DECODE: 1, PREFILL: self.prefill}

    @property
    def memory_inputs(self) -> tuple[str, ...]:
        return MEMORY if self.units and self.mode == "input" else ()

    @property
    def room(self) -> int:
        """Tokens that a cache has room for."""
        return filled(self.context, self.step)

    def memory_shape(self, sizes: Architecture) -> tuple[int, int, int]:
        """As an app gives it."""
        return len(self.memory_layers), self.units, sizes.hidden

    def memory_state(self, sizes: Architecture) -> tuple[int, int, int]:
        return len(self.memory_layers), filled(self.units, self.step), filled(sizes.hidden, self.step)

    def cache_shape(self, sizes: Architecture) -> tuple[int, int, int, int]:
        return len(sizes.layers), sizes.kv_heads, self.room, filled(sizes.head_dim, self.step)


def filled(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return math.ceil(size / step) * step


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
