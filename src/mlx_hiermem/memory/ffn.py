"""FFN memory: the anchor's gated feed-forward layer gets R more inner units.

    y = W3 (act(W1 x) * (W2 x))  +  down^T (act(gate x) * (up x))          gate, up, down: [R, d]

A gated FFN sums over its inner units, so a second small FFN on the same input equals a wider one, and
concatenated blocks equal a sum of small FFNs (arXiv:2510.02375, §2.2). Kept beside the anchor's weights rather
than concatenated into them: swapping a memory then copies nothing of the anchor, and quantised anchors stay so.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory.slot import Half, Slot, carry, compute_dtype, find, linear, sizes

Gated = Callable[[mx.array, mx.array], mx.array]
ACTIVATIONS: tuple[Gated, ...] = (
    swiglu,
    lambda gate, x: nn.gelu_approx(gate) * x,
    lambda gate, x: nn.gelu(gate) * x,
)


def feed_forward(layer: nn.Module) -> nn.Module:
    return find(layer, ("mlp", "feed_forward"), "feed-forward layer")


def projections(ffn: nn.Module) -> tuple[nn.Module | Half, nn.Module | Half, nn.Module]:
    """(gate, up, down) linear layers; gate and up may be halves of a fused one."""
    if isinstance(fused := ffn.get("gate_up_proj"), nn.Linear | nn.QuantizedLinear):
        return Half(fused, False), Half(fused, True), linear(ffn, ("down_proj",), "down projection")
    return (
        linear(ffn, ("gate_proj", "w1"), "gate projection"),
        linear(ffn, ("up_proj", "w3"), "up projection"),
        linear(ffn, ("down_proj", "w2"), "down projection"),
    )


def activation(ffn: nn.Module) -> Gated:
    """Finds the FFN's activation by asking it: the one whose formula gives what the module gives.

    This also proves that the module is a gated FFN at all, whatever its architecture is called.
    """
    gate, up, down = projections(ffn)
    x = mx.random.normal((4, sizes(gate)[0]), key=mx.random.key(0)).astype(compute_dtype(gate))
    expected = ffn(x)
    scale = float(mx.abs(expected).max())
    tolerance = 2e-2 if expected.dtype != mx.float32 else 1e-4  # gelu and its tanh form differ by about 1e-3
    errors = [float(mx.abs(down(act(gate(x), up(x))) - expected).max()) for act in ACTIVATIONS]
    best = min(range(len(errors)), key=errors.__getitem__)
    if not errors[best] <= tolerance * scale:
        raise AnchorError(
            f"{type(ffn).__module__}.{type(ffn).__name__} is not a gated FFN with SiLU or GELU",
            "Memories widen gated FFNs; this architecture needs code of its own.",
        )
    return ACTIVATIONS[best]


def attach_ffn(layer: nn.Module, config: MemoryConfig, gated: Gated) -> list[tuple[nn.Module, Slot]]:
    """Gives one layer's FFN a slot; returns [(carrier, slot)]."""
    ffn = feed_forward(layer)
    gate, _, _ = projections(ffn)
    if sizes(gate)[0] != config.hidden:
        raise AnchorError(f"the anchor's FFN takes {sizes(gate)[0]} values, the memory {config.hidden}")
    slot = Slot(tuple(config.widths), compute_dtype(gate))

    def forward(_: nn.Module, own: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        y = own(x)
        if not slot.tensors:
            return y
        return y + slot.back(2, gated(slot.onto(0, x), slot.onto(1, x)))  # gate, up, down

    carry(ffn, forward)
    return [(ffn, slot)]
