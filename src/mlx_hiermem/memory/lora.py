"""LoRA memories: low-rank updates of the anchor's projections, W x + b^T (a x).

Three kinds: on query and key, on value and output, on the three FFN projections. a is [R, inputs] and b is
[R, outputs], unit-major, so that blocks join along the rank; the scale alpha / r of each block is in b already
(`FetchedMemory.join`). Added beside the product rather than into W: quantised anchors keep their weights.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory import ffn
from mlx_hiermem.memory.slot import Half, Slot, carry, compute_dtype, find, linear, sizes


def attention(layer: nn.Module) -> nn.Module:
    return find(layer, ("self_attn", "attention"), "attention layer")


def projection(layer: nn.Module, name: str) -> nn.Module:
    """The linear layer that the tensor names' first part (`q`, `k`, `v`, `o`, `gate`, `up`, `down`) means."""
    if name in ("gate", "up", "down"):
        found = dict(zip(("gate", "up", "down"), ffn.projections(ffn.feed_forward(layer)), strict=True))[name]
        if isinstance(found, Half):
            raise AnchorError(f"the {name} projection is half of a fused layer", "Use memories of the kind ffn.")
        return found
    return linear(attention(layer), (f"{name}_proj",), f"{name} projection")


def attach_lora(layer: nn.Module, config: MemoryConfig) -> list[tuple[nn.Module, Slot]]:
    """Gives each projection of the kind a slot; returns [(carrier, slot)]."""
    names = dict.fromkeys(name.split(".")[0] for name in config.widths)
    return [_attach(projection(layer, name), name, config) for name in names]


def _attach(carrier: nn.Module, name: str, config: MemoryConfig) -> tuple[nn.Module, Slot]:
    expected = (config.widths[f"{name}.a"], config.widths[f"{name}.b"])
    if sizes(carrier) != expected:
        raise AnchorError(f"the anchor's {name} projection is {sizes(carrier)}, the memory's {expected}")
    slot = Slot((f"{name}.a", f"{name}.b"), compute_dtype(carrier))

    def forward(_: nn.Module, own: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        y = own(x)
        if not slot.tensors:
            return y
        return y + slot.back(1, slot.onto(0, x))  # a, b

    carry(carrier, forward)
    return carrier, slot
