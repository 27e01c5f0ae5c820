"""Compressed constants: integers with scales, palettes, sparse masks. iOS 16 and iOS 18 share names.

Results have the type of the scales or the palette: float16 constants are multiplied out in float32 and rounded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.ops.elementwise import CASTS
from mlx_hiermem.convert.coreml.ops.registry import axis_of, computes, moves
from mlx_hiermem.convert.coreml.weights import unpack


def _scale_dtype(arguments: dict[str, Any]) -> str:
    return str(arguments["scale"].dtype)


@computes("constexpr_affine_dequantize", casts=_scale_dtype)
def affine_dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: int
) -> np.ndarray:
    """scale * (data - zero point), each a scalar or one value for each index of `axis`."""
    shape = [1] * quantized_data.ndim
    shape[axis_of(axis, len(shape))] = -1
    zero_point, scale = (v.astype(np.float32).reshape(shape if v.ndim else ()) for v in (zero_point, scale))
    return scale * (quantized_data.astype(np.float32) - zero_point)


@computes("constexpr_blockwise_shift_scale", casts=_scale_dtype)
def blockwise_shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """scale * (data - offset), one of each for each block; a block has data.shape / scale.shape values."""
    values = _blocks(data.astype(np.float32), scale.shape)
    if offset is not None:
        values = values - _blocks(offset.astype(np.float32), scale.shape)
    return (values * _blocks(scale, scale.shape)).reshape(data.shape)


def _blocks(x: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """[a, b, ...] -> [blocks of a, size of each, blocks of b, size of each, ...]."""
    if len(counts) != x.ndim or any(size % count for size, count in zip(x.shape, counts, strict=True)):
        raise ValueError(f"{list(counts)} blocks in a tensor {list(x.shape)}")
    return x.reshape([n for size, count in zip(x.shape, counts, strict=True) for n in (count, size // count)])


@moves("constexpr_lut_to_dense")
def lut_to_dense(
    indices: np.ndarray,
    lut: np.ndarray,
    shape: np.ndarray | None = None,
    vector_axis: int | None = None,
) -> np.ndarray:
    """iOS 16: bytes that pack indices into lut [P], and the result's shape. iOS 18: indices of the result's rank
    K into lut [groups..., P, V]: each dimension in as many groups, and V values along `vector_axis` for an index.
    """
    if shape is not None:
        bits = int(math.log2(lut.size))
        return lut[unpack(indices, bits, math.prod(shape.tolist()))].reshape(shape.tolist())
    groups, palette, vector = lut.shape[:-2], lut.shape[-2], lut.shape[-1]
    if indices.size and indices.max() >= palette:
        raise IndexError(f"index {indices.max()} is out of bounds for a palette of {palette}")
    split = _blocks(indices, groups)
    which = np.arange(math.prod(groups)).reshape([n for count in groups for n in (count, 1)])
    values = lut.reshape(-1, palette, vector)[which, split].reshape(*indices.shape, vector)
    if vector == 1 and vector_axis is None:
        return values[..., 0]
    axis = axis_of(vector_axis, indices.ndim)
    merged = list(indices.shape)
    merged[axis] *= vector
    return np.moveaxis(values, -1, axis + 1).reshape(merged)


@moves("constexpr_sparse_to_dense")
def sparse_to_dense(nonzero_data: np.ndarray, mask: np.ndarray, shape: np.ndarray | None = None) -> np.ndarray:
    """The values go where the mask is 1, row by row. iOS 16 packs the mask and gives the shape."""
    if shape is not None:
        mask = unpack(mask, 1, math.prod(shape.tolist())).reshape(shape.tolist())
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@computes("constexpr_cast", casts=lambda arguments: CASTS[arguments["output_dtype"]])
def constexpr_cast(source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    return source_val.astype(CASTS[output_dtype])
