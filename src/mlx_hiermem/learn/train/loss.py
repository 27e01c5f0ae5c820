"""What a step makes smaller: next-token cross-entropy, or the divergence from a teacher. In float32."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx


def next_token(logits: mx.array, targets: mx.array) -> mx.array:
    """logits [M, V], targets [M] -> -log p of each target [M]."""
    logits = logits.astype(mx.float32)
    return logsumexp(logits) - mx.take_along_axis(logits, targets[:, None], -1)[:, 0]


def divergence(logits: mx.array, teacher: mx.array) -> mx.array:
    """KL(teacher || student) [M] of logits [M, V]; the teacher gets no gradient."""
    logits, teacher = logits.astype(mx.float32), mx.stop_gradient(teacher.astype(mx.float32))
    top, shares, total = _softmax_parts(teacher)
    p = mx.stop_gradient(shares / total)
    constant = mx.stop_gradient((p * teacher).sum(-1) - (top + mx.log(total))[:, 0])
    return logsumexp(logits) - (p * logits).sum(-1) + constant


def logsumexp(logits: mx.array) -> mx.array:
    """[M, V] -> [M]. Its gradient is the softmax, whose exponentials are kept from the forward pass."""
    parts: Any = _logsumexp(logits)
    return parts[0]


@mx.custom_function
def _logsumexp(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    top, shares, total = _softmax_parts(logits)
    return (top + mx.log(total))[:, 0], shares, total


@_logsumexp.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
    _, shares, total = outputs
    return shares * (cotangents[0][:, None] / total)


def _softmax_parts(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(maximum [M, 1], exp(logits - maximum) [M, V], its sum [M, 1])."""
    top = logits.max(-1, keepdims=True)
    shares = _exp(logits - top)
    return top, shares, shares.sum(-1, keepdims=True)


def _exp(x: mx.array) -> mx.array:
    """On a CPU MLX's exp takes 21 ns a value, its power 9; a vocabulary of them is most of what a loss takes."""
    return mx.exp(x) if mx.default_device().type == mx.DeviceType.gpu else mx.power(mx.array(math.e, x.dtype), x)
