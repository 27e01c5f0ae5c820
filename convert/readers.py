"""Raw tensors, and the reader of a .safetensors file.

Read with one pread per request instead of the library's mmap: pages of a mapping count as resident memory,
and a bank is many times larger than the memory there is. (The library also has no bfloat16 in numpy.)
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_hiermem.errors import CheckpointError
from mlx_hiermem.safetensors_file import read_header

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# dtype -> how numpy carries it. numpy has no bfloat16: its bits travel as uint16.
NUMPY_DTYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint32": "<u4",  # MLX's quantised weights
    "uint8": "|u1",
    "bool": "|b1",
}
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U32": "uint32",
    "U8": "uint8",
    "BOOL": "bool",
}
SAME_WIDTH_INTEGERS = {  # of a float's bits: exponent all ones and no sign, i.e. infinity
    "float64": ("<i8", "<u8", 0x7FF0_0000_0000_0000),
    "float32": ("<i4", "<u4", 0x7F80_0000),
    "float16": ("<i2", "<u2", 0x7C00),
    "bfloat16": ("<i2", "<u2", 0x7F80),
}
READ_LIMIT = 1 << 30  # bytes per pread: macOS refuses 2 GiB and more
# what DistributedDataParallel puts in front of names, and torch.compile, FSDP and activation checkpoints anywhere
WRAPPERS = re.compile(
    r"^(?:module\.)+|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True)
class RawTensor:
    """A tensor as stored: `data` has `shape`; bfloat16 is carried as its bits in uint16."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def float32(self) -> np.ndarray:
        """The values as float32, whatever they were stored as (a copy, unless they were)."""
        if self.dtype == "bfloat16":  # the upper half of a float32
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # float64; whoever cares asks is_finite of the result
            return self.data.astype(np.float32, copy=False)

    def astype(self, dtype: str) -> RawTensor:
        """The values as float32, float16 or bfloat16, rounded to nearest even; too large ones become infinite."""
        if dtype == self.dtype:
            return self
        values = self.float32()
        if dtype == "bfloat16":
            bits = values.view(np.uint32)
            data = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        else:
            with np.errstate(over="ignore"):
                data = values.astype(NUMPY_DTYPES[dtype])
        return RawTensor(dtype, self.shape, data)


def is_finite(raw: RawTensor) -> bool:
    """Whether no value is infinite or NaN. Integers always are.

    Read as integers, non-finite floats are those at or above infinity's bits: in signed order the positive
    ones, in unsigned order the negative ones. Two maxima need no temporary array, unlike np.isfinite.
    """
    if raw.dtype not in SAME_WIDTH_INTEGERS or raw.data.size == 0:
        return True
    signed, unsigned, infinity = SAME_WIDTH_INTEGERS[raw.dtype]
    sign = 1 << (8 * raw.data.dtype.itemsize - 1)
    data = np.ascontiguousarray(raw.data)
    return int(data.view(signed).max()) < infinity and int(data.view(unsigned).max()) < sign + infinity


class CheckpointFile(Protocol):
    """One file, or several that belong together: its tensors' dtypes and shapes, and rows of their data."""

    file: pathlib.Path
    files: list[pathlib.Path]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]
    extras: dict[str, Any]

    def rows(self, name: str, start: int, stop: int) -> RawTensor: ...

    def close(self) -> None: ...


class SafetensorsFile:
    """One .safetensors file."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file, self.files = file, [file]
        self._fd = os.open(file, os.O_RDONLY)
        try:
            header = read_header(file, CheckpointError)
            self.metadata, self.extras = header.metadata, dict[str, Any]()
            self.tensors = {name: (self._dtype(name, one.dtype), one.shape) for name, one in header.tensors.items()}
            self._offsets = {name: one.begin for name, one in header.tensors.items()}
        except BaseException:
            self.close()
            raise

    def _dtype(self, name: str, code: str) -> str:
        if code not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{self.file}: the tensor {name} has the dtype {code}, which is not supported",
                "Save it as float32, float16 or bfloat16.",
            )
        return SAFETENSORS_DTYPES[code]

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file} is truncated or damaged: {why}", "Copy or download it again.")

    def rows(self, name: str, start: int, stop: int) -> RawTensor:
        dtype, shape = self.tensors[name]
        row = size_of(dtype, shape[1:])
        data = read_at(self._fd, row * (stop - start), self._offsets[name] + row * start)
        if data is None:
            raise self._damaged(f"the data of {name} cannot be read to its end")
        rows = (stop - start, *shape[1:]) if shape else ()
        return RawTensor(dtype, rows, data.view(NUMPY_DTYPES[dtype]).reshape(rows))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_at(descriptor: int, size: int, offset: int) -> np.ndarray | None:
    """[size] bytes of a file from `offset`; None if there are not so many, or the disk fails."""
    data = np.empty(size, dtype=np.uint8)
    view = data.data
    while view:  # one turn, unless the request is huge
        try:
            count = os.preadv(descriptor, [view[:READ_LIMIT]], offset)
        except OSError:
            return None
        if not count:
            return None
        view, offset = view[count:], offset + count
    return data


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    count = 1
    for n in shape:
        count *= n
    return count * np.dtype(NUMPY_DTYPES[dtype]).itemsize


def plain_name(name: str) -> str:
    """A tensor's name without what training puts into it: `_orig_mod.module.a.weight` is `a.weight`."""
    while (plain := WRAPPERS.sub("", name)) != name:
        name = plain
    return name


def some(names: Sequence[str], limit: int = 8) -> str:
    """A list for an error message, cut where it would no longer be read."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
