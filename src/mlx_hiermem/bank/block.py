"""One memory block: a file, the stacked tensors in it, and several blocks joined along a path.

A block file is an ordinary safetensors file whose tensors are [L, r, width], contiguous, so that reading a
block is one sequential read. Units are axis 1 of every tensor, therefore blocks join and slice there. A tensor of a
quantised block is three: integers, scales and biases. They stay so in memory until the block is joined.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.config import BIASES, GENERIC_LEVEL, GENERIC_NODE, SCALES, MemoryConfig, Path, Quantization
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import reason
from mlx_hiermem.safetensors_file import read_header

GENERIC_FILE = "generic.safetensors"
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "int64": "I64"}


DTYPE_NAMES = {stored: name for name, stored in SAFETENSORS_DTYPES.items()}
# dtype -> the integers that its numbers can be looked at as, and the bits of the exponent in them
EXPONENTS = {"float32": (mx.uint32, 0x7F800000), "float16": (mx.uint16, 0x7C00), "bfloat16": (mx.uint16, 0x7F80)}


@dataclass(frozen=True)
class MemoryBlock:
    """The tensors of one block as its file has them (see `MemoryConfig.stored`), and the bytes of the file."""

    tensors: dict[str, mx.array]
    nbytes: int
    quantization: Quantization | None = None

    def values(self, name: str) -> mx.array:
        """One tensor [L, r, width] in the bank's dtype, dequantised where the block is quantised."""
        how, tensor = self.quantization, self.tensors[name]
        if how is None:
            return tensor
        scales, biases = self.tensors[name + SCALES], self.tensors[name + BIASES]
        return mx.dequantize(tensor, scales, biases, how.group_size, how.bits)


@dataclass(frozen=True)
class FetchedMemory:
    """A path's blocks joined along the units: each tensor [L, R, width], R = sum of r_l.

    LoRA scales are folded into the B matrices (each block is an adapter of its own rank), so whoever
    attaches the memory needs no further setting.
    """

    config: MemoryConfig
    tensors: dict[str, mx.array]

    @classmethod
    def join(cls, config: MemoryConfig, blocks: Sequence[MemoryBlock]) -> FetchedMemory:
        """Concatenates blocks along axis 1 (arXiv:2510.02375, Eq. 2.2)."""
        joined = {}
        for name in config.widths:
            parts = [block.values(name) for block in blocks]
            if name.endswith(".b"):  # in float32: in half precision, a scale such as 2/3 costs the last digits
                parts = [part.astype(mx.float32) * (config.alpha / part.shape[1]) for part in parts]
            joined[name] = mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return cls(config, joined)

    def by_layer(self, name: str) -> list[mx.array]:
        """One tensor's layers, each [R, width]: views of it, where indexing would copy."""
        tensor = self.tensors[name]
        return [layer.squeeze(0) for layer in mx.split(tensor, tensor.shape[0])]

    @property
    def units(self) -> int:
        return next(iter(self.tensors.values())).shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def block_name(path: Path) -> str:
    """The block's file below the bank's folder: (10, 7) -> blocks/10/7.safetensors."""
    if path == GENERIC_NODE:
        return GENERIC_FILE
    return "blocks/" + "/".join(map(str, path)) + ".safetensors"


def read_block(
    file: pathlib.Path,
    config: MemoryConfig,
    level: int = GENERIC_LEVEL,
    check: Callable[[bytes], None] | None = None,
) -> MemoryBlock:
    """Reads a block of a level whole; level 0 is the generic block, which may have any number of units.

    Raises BankError if the file is missing, damaged or of other tensors than `MemoryConfig.stored` says. The header
    is compared before any tensor is made. `check` is shown the bytes that these are made of; all numbers must be
    finite then.
    """
    again = "Run `hiermem bank verify`; fetch or convert the block again."
    try:
        data = file.read_bytes() if check else None
        header = read_header(file, BankError, data=data)
    except OSError as error:
        raise BankError(f"cannot read the block {file}: {reason(error)}", again) from error
    except BankError as error:
        why = error.what.removeprefix(f"cannot read {file}: ").replace(str(file), "it")
        raise BankError(f"cannot read the block {file}: {why}", again) from error
    found = {name: (DTYPE_NAMES.get(row.dtype, row.dtype), row.shape) for name, row in header.tensors.items()}
    some_shape = next((shape for _, shape in found.values() if len(shape) == 3), (0, 0, 0))
    expected = config.stored(level, config.block_sizes[level - 1] if level else some_shape[1])
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise BankError(
                f"the block {file} holds {_described(found, name)}, expected {_described(expected, name)}",
                "It belongs to another bank or another version of this one.",
            )
    if check and data is not None:
        check(data)
    try:
        tensors = mx.load(str(file) if data is None else io.BytesIO(data), format="safetensors")
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        nbytes = file.stat().st_size if data is None else len(data)
    except (OSError, RuntimeError, ValueError) as error:
        raise BankError(f"cannot read the block {file}: {error}", again) from error
    block = MemoryBlock({name: tensors[name] for name in expected}, nbytes, config.quantized(level))
    if check and not is_finite(block):
        raise BankError(f"the block {file} has values that are not finite numbers", "Convert or pull it again.")
    return block


def is_finite(block: MemoryBlock) -> bool:
    """Whether no number of a block is infinite or NaN: those have all bits of their exponent set."""
    for tensor in block.tensors.values():
        name = str(tensor.dtype).removeprefix("mlx.core.")
        if name in EXPONENTS:  # packed integers have none
            bits, exponent = EXPONENTS[name]
            raw = np.array(tensor.view(bits), copy=False)
            if raw.size and int((raw & exponent).max()) == exponent:
                return False
    return True


def _described(tensors: Mapping[str, tuple[str, Sequence[int]]], name: str) -> str:
    """`gate float16 [10, 24, 576]`, or `no gate`."""
    dtype, shape = tensors.get(name, ("", ()))
    return f"{name} {dtype} {list(shape)}" if dtype else f"no {name}"


def write_block(
    file: pathlib.Path, tensors: Mapping[str, tuple[Sequence[int], Any]], dtype: str | Mapping[str, str]
) -> tuple[int, str]:
    """Writes name -> (shape, bytes-like) as safetensors, in the order given; returns (bytes, sha256).

    `dtype` is that of all tensors, or name -> dtype. Takes raw buffers rather than arrays because numpy has no
    bfloat16, and because a converter that streams a bank should not copy each block once more.
    """
    header, offset = {}, 0
    for name, (shape, data) in tensors.items():
        size = memoryview(data).nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype if isinstance(dtype, str) else dtype[name]],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data starts on a multiple of 8 bytes
    digest, total = hashlib.sha256(), 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb", buffering=0) as stream:
        for piece in (len(head).to_bytes(8, "little") + head, *(data for _, data in tensors.values())):
            view = memoryview(piece).cast("B")
            digest.update(view)
            while view:  # a raw write may be short
                written = stream.write(view)
                total += written
                view = view[written:]
    return total, digest.hexdigest()
