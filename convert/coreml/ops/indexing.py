"""Reading and writing parts of tensors. An index out of bounds is an error, also where Core ML promises none."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.ops.registry import axis_of, moves


def check_bounds(indices: np.ndarray, size: int) -> None:
    """From iOS 17 on negative indices are out of bounds too."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        wrong = indices[(indices < 0) | (indices >= size)]
        raise IndexError(f"index {wrong.flat[0]} is out of bounds for {size} rows")


@moves("gather")
def gather(
    x: np.ndarray, indices: np.ndarray, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> np.ndarray:
    """Shape x[:axis] + indices[batch_dims:] + x[axis + 1:]."""
    axis, batch = axis_of(axis, x.ndim), int(batch_dims)
    check_bounds(indices, x.shape[axis])
    if not batch:
        return np.take(x, indices, axis)
    rows = [gather(x[i], indices[i], axis - 1, batch - 1) for i in range(x.shape[0])]
    return np.stack(rows)


@moves("gather_along_axis")
def gather_along_axis(
    x: np.ndarray, indices: np.ndarray, axis: int = 0, validate_indices: bool = False
) -> np.ndarray:
    check_bounds(indices, x.shape[axis_of(axis, x.ndim)])
    return np.take_along_axis(x, indices, axis_of(axis, x.ndim))


@moves("gather_nd")
def gather_nd(
    x: np.ndarray, indices: np.ndarray, batch_dims: int = 0, validate_indices: bool = False
) -> np.ndarray:
    """indices [..., K] point into the first K axes of x (after the batch axes)."""
    if batch_dims:
        return np.stack([gather_nd(x[i], indices[i], int(batch_dims) - 1) for i in range(x.shape[0])])
    columns = np.moveaxis(indices, -1, 0)
    for size, column in zip(x.shape, columns, strict=False):
        check_bounds(column, size)
    return np.asarray(x[tuple(columns)])


def region(
    x: np.ndarray, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[slice | int, ...]:
    """The part of x that slice_by_index and slice_update mean, as numpy's index.

    Where numpy would cut a begin or end to what there is, this raises IndexError.
    """
    rank = x.ndim
    steps = [1] * rank if stride is None else stride.tolist()
    masks = [[False] * rank if mask is None else mask.tolist() for mask in (begin_mask, end_mask, squeeze_mask)]
    if not len(begin) == len(end) == len(steps) == rank:
        raise ValueError(f"begin {begin.tolist()} and end {end.tolist()} for a tensor of rank {rank}")
    found: list[slice | int] = []
    for axis, (first, last, step) in enumerate(zip(begin.tolist(), end.tolist(), steps, strict=True)):
        open_begin, open_end, squeeze = (mask[axis] for mask in masks)
        size = x.shape[axis]
        if squeeze:
            if not -size <= first < size:
                raise IndexError(f"index {first} is out of bounds for axis {axis} of {size}")
            found.append(first)
            continue
        for value, is_open in ((first, open_begin), (last, open_end)):
            if not is_open and not -size <= value <= size:
                raise IndexError(f"{first}:{last} is out of bounds for axis {axis} of {size}")
        found.append(slice(None if open_begin else first, None if open_end else last, step))
    return tuple(found)


@moves("slice_by_index")
def slice_by_index(
    x: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    stride: np.ndarray | None = None,
    begin_mask: np.ndarray | None = None,
    end_mask: np.ndarray | None = None,
    squeeze_mask: np.ndarray | None = None,
) -> np.ndarray:
    return np.asarray(x[region(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


@moves("slice_update")
def slice_update(
    x: np.ndarray,
    update: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    stride: np.ndarray | None = None,
    begin_mask: np.ndarray | None = None,
    end_mask: np.ndarray | None = None,
    squeeze_mask: np.ndarray | None = None,
    in_place: bool = False,
) -> np.ndarray:
    """`in_place` is the interpreter's: x may be written over."""
    part = region(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[part].shape != update.shape:
        raise ValueError(f"an update {list(update.shape)} for a region {list(x[part].shape)}")
    changed = x if in_place else x.copy()
    changed[part] = update
    return changed


@moves("slice_by_size")
def slice_by_size(x: np.ndarray, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A size of -1 means all that follows."""
    ends = [
        own if count == -1 else int(first + count) for own, first, count in zip(x.shape, begin, size, strict=True)
    ]
    for axis, (first, last) in enumerate(zip(begin.tolist(), ends, strict=True)):
        if not 0 <= first <= last <= x.shape[axis]:
            raise IndexError(f"{first}:{last} is out of bounds for axis {axis} of {x.shape[axis]}")
    return x[tuple(slice(int(first), last) for first, last in zip(begin, ends, strict=True))]
