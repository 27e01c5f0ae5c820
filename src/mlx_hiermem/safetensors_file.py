"""Safetensors files: the header, checked before a byte of the data is believed, and the arrays, mapped.

What is damaged raises a typed error that names the file and the tensor; the caller says which type (`raises`).
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_hiermem.errors import FileError, HierMemError
from mlx_hiermem.files import MALFORMED, parse_json, unreadable

if TYPE_CHECKING:
    import numpy as np

AXES = 32  # of a tensor, at most: nothing here has more than four
HEADER_LIMIT = 100_000_000  # bytes: the safetensors format's own
# bytes of a value, by the name that safetensors files give its type
VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
VALUE_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: `begin` and `end` are counted from the file's first byte."""

    dtype: str  # as the file names it: F32, BF16, ...
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of itself."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(
    file: pathlib.Path,
    raises: type[HierMemError] = FileError,
    hint: str = "Copy or download it again.",
    data: bytes | None = None,
) -> SafetensorsHeader:
    """Reads and checks the header of a safetensors file: eight bytes of length, a JSON table, then the data.

    Every tensor must lie in the file, share no byte with another, and have the bytes that its shape and type ask
    for (types that are not in VALUE_BYTES are passed on unchecked). Raises `raises` otherwise. `data` is the whole
    file, where it has been read already.
    """

    def damaged(why: str) -> HierMemError:
        return raises(f"{file} is truncated or damaged: {why}", hint)

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise damaged(f"it lists tensors twice: {', '.join(twice[:8])}")
        return dict(pairs)

    try:
        with file.open("rb") if data is None else io.BytesIO(data) as stream:
            size = os.fstat(stream.fileno()).st_size if data is None else len(data)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise damaged("its header is longer than the file")
            text = stream.read(length)
    except OSError as error:
        raise unreadable(file, error, raises, hint) from error
    try:
        rows = parse_json(text, object_pairs_hook=table)
    except ValueError as error:
        raise damaged("its header is not JSON") from error
    if not isinstance(rows, dict) or not isinstance(metadata := rows.pop("__metadata__", None) or {}, dict):
        raise damaged("its header is not a table of tensors")
    tensors = {}
    for name, row in rows.items():
        try:
            tensors[name] = _stored(name, row, 8 + length, size)
        except ValueError as error:
            raise damaged(str(error)) from error
    ordered = sorted((row.begin, row.end, name) for name, row in tensors.items() if row.end > row.begin)
    for (_, end, one), (begin, _, other) in itertools.pairwise(ordered):
        if begin < end:
            raise damaged(f"{one} and {other} overlap")
    return SafetensorsHeader(tensors, {str(key): str(value) for key, value in metadata.items()})


def map_tensors(
    file: pathlib.Path, dtypes: Sequence[str], raises: type[HierMemError] = FileError, hint: str = ""
) -> dict[str, np.ndarray]:
    """Name -> read-only memory-mapped array of a safetensors file; its own reader copies whole tensors.

    Raises `raises` where the file is damaged, or has a tensor that is not of these dtypes.
    """
    import numpy as np  # here, because every command imports this module

    header = read_header(file, raises, hint)
    names = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "BOOL": "?"}
    data = np.memmap(file, dtype=np.uint8, mode="r")
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in header.tensors.items():
        if tensor.dtype not in dtypes:
            raise raises(f"{file} has {name} as {tensor.dtype}, not as {' or '.join(dtypes)}", hint)
        arrays[name] = data[tensor.begin : tensor.end].view(np.dtype(names[tensor.dtype])).reshape(tensor.shape)
    return arrays


def _stored(name: str, row: Any, start: int, size: int) -> StoredTensor:
    """One row of the header of a file of `size` bytes, whose data starts at `start`. Raises ValueError."""
    try:
        dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or len(shape) > AXES or any(type(number) is not int for number in numbers):
            raise TypeError
        (name + dtype).encode()  # a ValueError for half a surrogate pair
    except MALFORMED as error:
        raise ValueError(f"the header entry of {name} is incomplete") from error
    fits = VALUE_BYTES.get(dtype) is None or end - begin == math.prod(shape) * VALUE_BYTES[dtype]
    if min((*shape, begin, end - begin)) < 0 or not fits:
        raise ValueError(f"the shape {shape} of {name} does not fit its {end - begin} bytes")
    if start + end > size:
        raise ValueError(f"the data of {name} ends beyond the end of the file")
    return StoredTensor(dtype, shape, start + begin, start + end)
