"""GELU and attention by numpy against their definitions."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.cpu.vector import BLOCK, attention, gelu


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, BLOCK + 3)])
def test_gelu(shape: tuple[int, ...]) -> None:
    x = mx.random.normal(shape, key=mx.random.key(0)) * 3
    expected = [value * (1 + math.erf(value / 2**0.5)) / 2 for value in np.asarray(x, dtype=np.float64).reshape(-1)]
    assert gelu(x).shape == shape
    np.testing.assert_allclose(np.asarray(gelu(x)).reshape(-1), expected, atol=1.1e-6)


def test_gelu_far_out() -> None:
    x = mx.array([-1e30, -200.0, -20.0, -0.0, 0.0, 20.0, 200.0, 1e30])
    np.testing.assert_allclose(np.asarray(gelu(x)), np.maximum(np.asarray(x), 0), atol=1e-6)


def test_attention() -> None:
    lengths, shape = [5, 1, 3], (3, 2, 5, 4)
    q, k, v = (mx.random.normal(shape, key=mx.random.key(n)) * 3 for n in range(3))
    mask = (mx.arange(5) < mx.array(lengths)[:, None])[:, None, None, :]
    expected = np.asarray(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask))
    found = np.asarray(attention(0.5 * q, k, v, lengths))
    for text, n in enumerate(lengths):
        np.testing.assert_allclose(found[text, :, :n], expected[text, :, :n], atol=2e-6)
        assert not found[text, :, n:].any()
