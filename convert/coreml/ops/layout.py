"""Operations that change a tensor's shape or make one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.ops.registry import axes_of, axis_of, moves

FLOAT_ZERO, ZERO, ONE = np.float32(0), np.int32(0), np.int32(1)


@moves("reshape")
def reshape(x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """-1 takes what is left, 0 the size of the same axis of x (where the ranks are equal)."""
    wanted = [int(size) for size in shape]
    if 0 in wanted:
        if len(wanted) != x.ndim:
            raise ValueError(f"a 0 in the shape {wanted} for a tensor of rank {x.ndim}")
        wanted = [size or own for size, own in zip(wanted, x.shape, strict=True)]
    return x.reshape(wanted)


@moves("transpose")
def transpose(x: np.ndarray, perm: np.ndarray) -> np.ndarray:
    return x.transpose(axes_of(perm, x.ndim))


@moves("expand_dims")
def expand_dims(x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """The axes are those of the result."""
    return np.expand_dims(x, axes_of(axes, x.ndim + len(axes)))


@moves("squeeze")
def squeeze(x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(x, None if axes is None else axes_of(axes, x.ndim))


@moves("concat")
def concat(values: tuple[np.ndarray, ...], axis: int, interleave: bool = False) -> np.ndarray:
    """One after the other, or with `interleave` the first row of each, then the second of each, and so on."""
    axis = axis_of(axis, values[0].ndim) if values[0].ndim else 0
    if values[0].ndim == 0:
        return np.stack(values)
    if not interleave:
        return np.concatenate(values, axis)
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return np.stack(values, axis + 1).reshape(shape)


@moves("stack")
def stack(values: tuple[np.ndarray, ...], axis: int) -> np.ndarray:
    return np.stack(values, axis_of(axis, values[0].ndim + 1))


@moves("split")
def split(
    x: np.ndarray, axis: int, num_splits: int | None = None, split_sizes: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    axis = axis_of(axis, x.ndim)
    if split_sizes is None:
        if num_splits is None:
            raise ValueError("neither num_splits nor split_sizes is given")
        return tuple(np.split(x, int(num_splits), axis))
    if sum(split_sizes) != x.shape[axis] or num_splits not in (None, len(split_sizes)):
        raise ValueError(f"sizes {split_sizes.tolist()} for an axis of {x.shape[axis]}")
    return tuple(np.split(x, np.cumsum(split_sizes)[:-1], axis))


@moves("tile")
def tile(x: np.ndarray, reps: np.ndarray) -> np.ndarray:
    if len(reps) != x.ndim or min(reps) < 1:
        raise ValueError(f"repetitions {reps.tolist()} of a tensor of rank {x.ndim}")
    return np.tile(x, reps)


@moves("reverse")
def reverse(x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.flip(x, axes_of(axes, x.ndim))


@moves("pad")
def pad(x: np.ndarray, pad: np.ndarray, mode: str = "constant", constant_val: Any = 0.0) -> np.ndarray:
    """`pad` has (before, after) of the last axes."""
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(pair) for pair in pad.reshape(-1, 2).tolist()]
    if mode == "constant":
        return np.pad(x, widths, constant_values=x.dtype.type(constant_val))
    modes: dict[str, Any] = {"reflect": "reflect", "replicate": "edge"}
    return np.pad(x, widths, modes[mode])


@moves("shape")
def shape(x: np.ndarray) -> np.ndarray:
    return np.array(x.shape, np.int32)


@moves("fill")
def fill(shape: np.ndarray, value: Any = FLOAT_ZERO) -> np.ndarray:
    return np.full(shape.tolist(), value, value.dtype)


@moves("fill_like")
def fill_like(ref_tensor: np.ndarray, value: Any = FLOAT_ZERO) -> np.ndarray:
    return np.full(ref_tensor.shape, value, value.dtype)


@moves("range_1d")
def range_1d(end: np.ndarray, start: np.ndarray, step: np.ndarray) -> np.ndarray:
    count = max(0, math.ceil((end.item() - start.item()) / step.item()))
    return (start + np.arange(count, dtype=start.dtype) * step).astype(start.dtype)


@moves("one_hot")
def one_hot(
    indices: np.ndarray,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Any = ONE,
    off_value: Any = ZERO,
) -> np.ndarray:
    axis = axis_of(axis, indices.ndim + 1)
    hot = np.expand_dims(indices, -1) == np.arange(one_hot_vector_size)
    return np.moveaxis(np.where(hot, on_value, off_value), -1, axis)


@moves("band_part")
def band_part(x: np.ndarray, lower: int = -1, upper: int = -1) -> np.ndarray:
    """Keeps so many diagonals below and above the main one; -1 keeps all."""
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    kept = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
    return np.where(kept, x, x.dtype.type(0))
