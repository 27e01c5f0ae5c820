"""Matrix products, on which nearly all the time is spent, and attention."""

from __future__ import annotations

import math

import numpy as np

from mlx_hiermem.convert.coreml.ops.reductions import softmax
from mlx_hiermem.convert.coreml.ops.registry import computes


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
