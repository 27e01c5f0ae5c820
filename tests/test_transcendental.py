"""GELU and softmax by numpy against their definitions."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.transcendental import BLOCK, gelu, softmax


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, BLOCK + 3)])
def test_gelu(shape: tuple[int, ...]) -> None:
    x = mx.random.normal(shape, key=mx.random.key(0)) * 3
    expected = [value * (1 + math.erf(value / 2**0.5)) / 2 for value in np.asarray(x, dtype=np.float64).reshape(-1)]
    assert gelu(x).shape == shape
    np.testing.assert_allclose(np.asarray(gelu(x)).reshape(-1), expected, atol=5e-7)


def test_gelu_far_out() -> None:
    x = mx.array([-1e30, -200.0, -20.0, -0.0, 0.0, 20.0, 200.0, 1e30])
    np.testing.assert_allclose(np.asarray(gelu(x)), np.maximum(np.asarray(x), 0), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (300, 257), (2, BLOCK + 1)])
def test_softmax(shape: tuple[int, ...]) -> None:
    x = mx.random.normal(shape, key=mx.random.key(1)) * 10
    values = np.asarray(x, dtype=np.float64)
    expected = np.exp(values - values.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(softmax(x)), expected, atol=1e-6)


def test_softmax_of_what_is_masked() -> None:
    x = mx.array([[0.0, -mx.inf, 1000.0], [-1000.0, -mx.inf, -mx.inf]])
    np.testing.assert_array_equal(np.asarray(softmax(x)), [[0, 0, 1], [1, 0, 0]])
