"""The constants of a Core ML program: values written in it, and blobs in its weight.bin.

weight.bin is a 64-byte header, then for each tensor a 64-byte record (sentinel, type, size, offset) followed by
its bytes, all little-endian and aligned to 64. Types below a byte are packed from the lowest bit on.
"""

from __future__ import annotations

import math
import pathlib
import struct
from typing import Any

import numpy as np

from mlx_hiermem.errors import CoreMLError

# MIL's DataType; those below a byte are held one to a byte, the rest as numpy's type of that name.
DTYPES = {
    1: "bool", 2: "str", 10: "float16", 11: "float32", 12: "float64", 21: "int8", 22: "int16", 23: "int32",
    24: "int64", 25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2",
    37: "uint1", 38: "uint6", 39: "uint3",
}  # fmt: skip
# weight.bin numbers the types in its own way.
BLOB_DTYPES = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
SENTINEL = 0xDEADBEEF
RECORD = struct.Struct("<IIQQ")  # sentinel, type, bytes, offset


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """What a MIL type is held as: a type below a byte takes one."""
    return np.dtype(("int8" if dtype == "int4" else "uint8") if dtype in BITS else dtype)


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return -(-math.prod(shape) * BITS.get(dtype, numpy_dtype(dtype).itemsize * 8) // 8)


def decode(data: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Little-endian bytes of a tensor -> the tensor."""
    if dtype not in BITS:
        return np.frombuffer(data, numpy_dtype(dtype)).reshape(shape)
    values = unpack(np.frombuffer(data, np.uint8), BITS[dtype], math.prod(shape))
    if dtype == "int4":
        values = np.where(values > 7, values.astype(np.int8) - 16, values.astype(np.int8))
    return values.reshape(shape)


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` integers of so many bits -> uint8 [count]; the first is in the lowest bits of the first byte."""
    each = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(each, axis=1, bitorder="little").reshape(count)


class WeightFile:
    """A weight.bin, mapped into memory; each blob is read once."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file = file
        try:
            self.data = np.memmap(file, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CoreMLError(f"cannot read {file}: {error}", "Export the model again.") from error

    def read(self, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The tensor whose record begins at `offset`; CoreMLError where it is not the one declared."""
        where = f"the blob at {offset} of {self.file}"
        if offset + RECORD.size > len(self.data):
            raise CoreMLError(f"{where} is beyond its end ({len(self.data)} bytes)", "Export the model again.")
        sentinel, number, size, begin = RECORD.unpack(self.data[offset : offset + RECORD.size].tobytes())
        if sentinel != SENTINEL:
            raise CoreMLError(f"{where} has no record (found {sentinel:#x})", "Export the model again.")
        if (found := BLOB_DTYPES.get(number, f"type {number}")) != dtype:
            raise CoreMLError(f"{where} is {found}, declared is {dtype}")
        if size != stored_bytes(shape, dtype):
            raise CoreMLError(f"{where} has {size} bytes, a {dtype} {list(shape)} has {stored_bytes(shape, dtype)}")
        if begin + size > len(self.data):
            raise CoreMLError(
                f"{where} is cut off: it ends at {begin + size}, the file at {len(self.data)}",
                "Export the model again.",
            )
        return decode(self.data[begin : begin + size], shape, dtype)
