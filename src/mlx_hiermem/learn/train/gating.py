"""SwiGLU for training on a CPU: silu(gate) * x of a frozen feed-forward layer, with its gradient.

MLX's CPU backend takes 24 ns for a sigmoid and computes it once more on the way back. Here it is a rational
function, which takes a third of that and is kept from the forward pass: 3 to 6 % of a step (docs/decisions/).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory.ffn import activation, feed_forward, projections

# sigmoid(x) = 1/2 + x P(x²) / Q(x²), fitted for the least error on [-FAR, FAR]: 4e-7 in float32, beyond it 2e-8.
FAR = 18.0
P = (0.249999591, 8.01260185e-3, 4.4382858e-5, 4.02217187e-8)
Q = (1.0, 0.115382333, 1.45974951e-3, 3.49083924e-6, 8.24257554e-10)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)) of float32 values."""
    x = mx.clip(x, -FAR, FAR)
    square = x * x
    return 0.5 + x * _polynomial(P, square) / _polynomial(Q, square)


def _polynomial(coefficients: Sequence[float], x: mx.array) -> mx.array:
    *rest, last = coefficients
    y = mx.array(last, x.dtype)
    for c in reversed(rest):
        y = y * x + c
    return y


def gated(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x."""
    parts: Any = _gated(gate, x)
    return parts[0]


@mx.custom_function
def _gated(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    share = sigmoid(gate)
    return gate * share * x, share


@_gated.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    (gate, x), (_, share), (cotangent, _) = primals, outputs, cotangents
    silu = gate * share
    return cotangent * x * (share + silu * (1 - share)), cotangent * silu


def quicken(layers: Sequence[nn.Module]) -> None:
    """On a CPU, has feed-forward layers that are a SwiGLU in float32 compute it so; leaves all others alone."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return
    for layer in layers:
        try:
            ffn = feed_forward(layer)
            known = activation(ffn) is swiglu
        except AnchorError:
            continue
        if known and type(ffn).__call__ is not _call:
            ffn.__class__ = type(type(ffn).__name__, (type(ffn),), {"__call__": _call})


def _call(ffn: nn.Module, x: mx.array) -> mx.array:
    gate, up, down = projections(ffn)
    units = gate(x)
    return down(gated(units, up(x)) if units.dtype == mx.float32 else swiglu(units, up(x)))
