"""Operations over whole axes: sums, extremes, softmax, norms, order; matrix products and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.ops.registry import axes_of, axis_of, computes, moves

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum_square": lambda x, **how: np.sum(x * x, **how),
    "reduce_l1_norm": lambda x, **how: np.sum(np.abs(x), **how),
    "reduce_l2_norm": lambda x, **how: np.sqrt(np.sum(x * x, **how)),
    "reduce_log_sum": lambda x, **how: np.log(np.sum(x, **how)),
    "reduce_log_sum_exp": lambda x, **how: np.logaddexp.reduce(x, **how),
}


def _register() -> None:
    for name, function in REDUCTIONS.items():

        def reduce(x: np.ndarray, axes: Any = None, keep_dims: bool = False, function: Any = function) -> Any:
            return function(x, axis=axes_of(axes, x.ndim), keepdims=bool(keep_dims)).astype(x.dtype)

        computes(name)(reduce)
    for name, extreme in {"reduce_argmax": np.argmax, "reduce_argmin": np.argmin}.items():

        def arg(
            x: np.ndarray,
            axis: int = -1,
            keep_dims: bool = False,
            output_dtype: str = "int32",
            function: Any = extreme,
        ) -> Any:
            return function(x, axis=axis_of(axis, x.ndim), keepdims=bool(keep_dims)).astype(output_dtype)

        moves(name)(arg)


_register()


@computes("softmax")
def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis_of(axis, x.ndim), keepdims=True))
    return exponentials / exponentials.sum(axis_of(axis, x.ndim), keepdims=True)


@computes("layer_norm")
def layer_norm(
    x: np.ndarray,
    axes: Any = None,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    epsilon: float = 1e-5,
) -> np.ndarray:
    over = axes_of(axes, x.ndim)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(over, keepdims=True) + epsilon)
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@computes("l2_norm")
def l2_norm(x: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """Over the last three axes."""
    if x.ndim < 3:
        raise ValueError(f"takes tensors of rank 3 or more, not {x.ndim}")
    return x / np.sqrt((x * x).sum((-3, -2, -1), keepdims=True) + epsilon)


@computes("cumsum")
def cumsum(x: np.ndarray, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> np.ndarray:
    ordered = np.flip(x, axis) if reverse else x
    total = np.cumsum(ordered, axis_of(axis, x.ndim), dtype=x.dtype)
    total = total - ordered if exclusive else total
    return np.flip(total, axis) if reverse else total


@moves("topk")
def topk(
    x: np.ndarray,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[np.ndarray, ...]:
    """(values, indices) of the k largest, or smallest; of equal ones the first."""
    axis = axis_of(axis, x.ndim)
    if k > x.shape[axis]:
        raise ValueError(f"k = {k} of {x.shape[axis]} values")
    order = np.argsort(x if ascending else -x, axis, kind="stable")
    indices = np.take(order, range(int(k)), axis)
    values = np.take_along_axis(x, indices, axis)
    return (values, indices.astype(output_indices_dtype)) if return_indices else (values,)


@computes("linear")
def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """[..., in] with weight [out, in] -> [..., out]."""
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} with a weight {list(weight.shape)}")
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


@computes("matmul")
def matmul(x: np.ndarray, y: np.ndarray, transpose_x: bool = False, transpose_y: bool = False) -> np.ndarray:
    """Transposing vectors does nothing, as in MIL."""
    x = x.swapaxes(-1, -2) if transpose_x and x.ndim > 1 else x
    y = y.swapaxes(-1, -2) if transpose_y and y.ndim > 1 else y
    return np.matmul(x, y)


@computes("einsum")
def einsum(values: tuple[np.ndarray, ...], equation: str) -> np.ndarray:
    """Two tensors; axes of size 1 that the other has larger are broadcast."""
    x, y = values
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    x, y = (np.broadcast_to(v, [sizes[c] for c in term]) for term, v in zip(terms, values, strict=True))
    return np.einsum(equation, x, y, optimize=True)


@computes("scaled_dot_product_attention")
def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, attn_mask: np.ndarray | None = None
) -> np.ndarray:
    """[B, *, L, E], [B, *, S, E], [B, *, S, V] -> [B, *, L, V]. The mask is added, or says which keys take part."""
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(f"batches {query.shape[:-2]}, {key.shape[:-2]} and {value.shape[:-2]} differ")
    scores = query @ key.swapaxes(-1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    return softmax(scores) @ value
