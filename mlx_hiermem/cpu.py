"""GELU and attention by numpy, for CPUs: its exponential uses vector instructions, MLX's takes single values.

Measured on one core with AVX-512: MLX takes 39 ns for an error function and 21 for an exponential, GELU here 8.
Work is cut into blocks, and attention into texts, that stay in the core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

BLOCK = 1 << 15  # values at a time
# erfc(z) = (a1 t + … + a5 t⁵) exp(-z²), t = 1 / (1 + p z), z ≥ 0, to 1.5e-7:
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
FAR = np.float32(30)  # beyond it erfc is zero in float32, and the square may overflow
P = 0.3275911
A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def gelu(x: mx.array) -> mx.array:
    """x Φ(x) of float32 values, with the error function and not tanh's approximation of it."""
    values = np.asarray(x).reshape(-1)
    out = np.empty_like(values)
    for start in range(0, len(values), BLOCK):
        part = slice(start, start + BLOCK)
        np.subtract(np.maximum(values[part], 0), _tail(np.abs(values[part])), out=out[part])
    return mx.array(out).reshape(x.shape)


def _tail(x: np.ndarray) -> np.ndarray:
    """x erfc(x / √2) / 2 for x ≥ 0: what GELU lacks of x."""
    t = x * np.float32(P / 2**0.5)
    t += 1
    np.reciprocal(t, out=t)
    series = t * np.float32(A[-1])
    for a in A[-2::-1]:
        series += np.float32(a)
        series *= t
    np.minimum(x, FAR, out=t)
    t *= t
    t *= np.float32(-0.5)
    np.exp(t, out=t)
    series *= t
    series *= x
    series *= np.float32(0.5)
    return series


def attention(q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int]) -> mx.array:
    """softmax(q kᵀ) v of B texts [B, heads, T, width], text by text; zeros behind the length of each.

    `q` is scaled already.
    """
    queries, keys, values = np.asarray(q), np.asarray(k).swapaxes(-1, -2), np.asarray(v)
    out = np.zeros(q.shape, np.float32)
    for text, n in enumerate(lengths):
        scores = queries[text, :, :n] @ keys[text, :, :, :n]
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        sums = scores @ np.ones(n, np.float32)
        out[text, :, :n] = (scores @ values[text, :, :n]) / sums[..., None]
    return mx.array(out)
