"""Weights in fewer bits: the formats, and what is left of a matrix after one.

    int8           a scale and an offset for each 32 values of a row: 9 bits a weight
    int8_channel   a scale for each row (output channel), symmetric: 8 bits
    int4           as int8 with codes of 4 bits: 5 bits
    lut4           16 values for each 16 rows, found by k-means; every weight is one of them: 4 bits

All are Core ML's own (iOS 18), unpacked on the device. Which weights get which is settled in `mixed_precision.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_hiermem.errors import CoreMLError, HierMemError

HALF_MAX = float(np.finfo(np.float16).max)
FORMATS = ("fp16", "int8", "int8_channel", "int4", "lut4")  # from fine to coarse
BLOCK = 32  # values that share a scale in the block formats
ROWS = 16  # rows that share a table in lut4
ENTRIES = 16  # of a table
ROUNDS = 20  # of k-means
SMALLEST = 6.2e-5  # scale: below, float16 is subnormal, and a device may take it for 0


@dataclass(frozen=True)
class Encoded:
    """Codes [out, in] and what they stand for.

    With `offset` or without: table · (code - offset), one for each block of a row, [out, in / block]. `is_table`:
    the value at the code in table [out / rows, 1, 16, 1]. `packed` is the type below a byte that the codes are
    stored in, held one to a byte here.
    """

    codes: np.ndarray
    table: np.ndarray
    offset: np.ndarray | None = None
    packed: str = ""
    is_table: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the package."""
        offsets = 0 if self.offset is None else self.offset.nbytes
        return self.codes.size // (2 if self.packed else 1) + self.table.nbytes + offsets


def check_half(name: str, values: np.ndarray) -> None:
    """Raises CoreMLError for a weight that float16 does not hold."""
    peak = float(np.abs(values).max(initial=0))
    if not peak <= HALF_MAX:
        raise CoreMLError(f"the weight {name} has the value {peak:g}, which float16 does not hold")


def encode(values: np.ndarray, form: str) -> Encoded:
    """A matrix [out, in] in a format other than fp16. Raises HierMemError for a format there is not."""
    match form:
        case "int8_channel":
            return _symmetric(values)
        case "int8":
            return _blocks(values, 255)
        case "int4":
            return _blocks(values, 15, "uint4")
        case "lut4":
            return _tables(values)
    raise HierMemError(f"unknown weight format '{form}'", f"Known: {', '.join(FORMATS)}.")


def decode(encoded: Encoded) -> np.ndarray:
    """The matrix that codes stand for, in float32, with the roundings of float16."""
    codes, table = encoded.codes, encoded.table
    if encoded.is_table:
        tables = np.repeat(table[:, 0, :, 0], codes.shape[0] // table.shape[0], axis=0)
        return np.take_along_axis(tables, codes.astype(np.int64), axis=1).astype(np.float32)
    block = codes.shape[1] // table.shape[1]
    steps = codes.astype(np.float16)
    if encoded.offset is not None:
        steps = steps - np.repeat(encoded.offset, block, axis=1)
    return (steps * np.repeat(table, block, axis=1)).astype(np.float32)


def rounded(values: np.ndarray, form: str) -> np.ndarray:
    """What a format leaves of a matrix, in float32."""
    if form == "fp16":
        return values.astype(np.float16).astype(np.float32)
    return decode(encode(values, form))


def size(shape: tuple[int, ...], form: str) -> int:
    """Bytes of a matrix [out, in] in a format."""
    rows, columns = shape
    blocks = columns // block_of(columns)
    match form:
        case "int8_channel":
            return rows * columns + 2 * rows
        case "int8":
            return rows * columns + 4 * rows * blocks
        case "int4":
            return rows * columns // 2 + 4 * rows * blocks
        case "lut4":
            return rows * columns // 2 + 2 * ENTRIES * rows // group_of(rows)
    return 2 * rows * columns


def block_of(columns: int) -> int:
    """The largest block of at most 32 values that divides a row."""
    return next(size for size in range(min(BLOCK, columns), 0, -1) if columns % size == 0)


def group_of(rows: int) -> int:
    """The largest group of at most 16 rows that divides them."""
    return next(size for size in range(min(ROWS, rows), 0, -1) if rows % size == 0)


def _symmetric(values: np.ndarray) -> Encoded:
    scales = np.maximum(np.abs(values).max(1, keepdims=True) / 127, SMALLEST).astype(np.float16)
    codes = np.rint(values / scales.astype(np.float32)).clip(-127, 127).astype(np.int8)
    return Encoded(codes, scales)


def _blocks(values: np.ndarray, top: int, packed: str = "") -> Encoded:
    """The offset is a float16: rounded to a whole code it would cost as much as two of the bits."""
    blocks = values.astype(np.float32).reshape(values.shape[0], -1, block_of(values.shape[1]))
    low = blocks.min(-1)
    scales = np.maximum((blocks.max(-1) - low) / top, SMALLEST).astype(np.float16)
    wide = scales.astype(np.float32)
    offsets = (-low / wide).astype(np.float16)
    codes = np.rint(blocks / wide[..., None] + offsets.astype(np.float32)[..., None]).clip(0, top)
    return Encoded(codes.astype(np.uint8).reshape(values.shape), scales, offsets, packed)


def _tables(values: np.ndarray) -> Encoded:
    group = group_of(values.shape[0])
    codes = np.empty(values.shape, np.uint8)
    tables = np.empty((values.shape[0] // group, 1, ENTRIES, 1), np.float16)
    for index in range(len(tables)):
        rows = slice(index * group, (index + 1) * group)
        table = _centres(values[rows]).astype(np.float16)
        tables[index, 0, :, 0] = table
        wide = table.astype(np.float32)
        codes[rows] = np.searchsorted((wide[1:] + wide[:-1]) / 2, values[rows])
    return Encoded(codes, tables, packed="uint4", is_table=True)


def _centres(values: np.ndarray) -> np.ndarray:
    """One-dimensional k-means [16], ascending.

    Begun at quantiles and at the ends: a few outliers can be all-important.
    """
    ordered = np.sort(values.astype(np.float64), axis=None)
    sums = np.concatenate([[0.0], ordered.cumsum()])
    ends = ordered[[0, -1]]
    inner = np.quantile(ordered, (np.arange(ENTRIES - 4) + 0.5) / (ENTRIES - 4))
    centres = np.sort(np.concatenate([inner, ends, ends / 2]))
    for _ in range(ROUNDS):
        edges = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [ordered.size]])
        counts = np.diff(edges)
        means = (sums[edges[1:]] - sums[edges[:-1]]) / np.maximum(counts, 1)
        centres = np.sort(np.where(counts > 0, means, centres))
    return centres
