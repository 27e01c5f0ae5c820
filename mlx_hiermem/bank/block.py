"""One memory block: a file, the stacked tensors in it, and several blocks joined along a path.

A block file is an ordinary safetensors file whose tensors are [L, r, width], contiguous, so that reading a
block is one sequential read. Units are axis 1 of every tensor, therefore blocks join and slice there.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.errors import BankError

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class MemoryBlock:
    """The tensors of one block (each [L, r, width]) and the bytes its file has."""

    tensors: dict[str, mx.array]
    nbytes: int


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
            parts = [block.tensors[name] for block in blocks]
            if name.endswith(".b"):
                parts = [part * (config.alpha / part.shape[1]) for part in parts]
            joined[name] = mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return cls(config, joined)

    @property
    def units(self) -> int:
        return next(iter(self.tensors.values())).shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def block_name(path: Path) -> str:
    """The block's file below the bank's folder: (10, 7) -> blocks/10/7.safetensors."""
    return "blocks/" + "/".join(map(str, path)) + ".safetensors"


def read_block(file: pathlib.Path, config: MemoryConfig, units: int | None = None) -> MemoryBlock:
    """Reads a block whole. Raises BankError if it is missing, damaged or of another shape."""
    try:
        tensors = mx.load(str(file), format="safetensors")
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        nbytes = file.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:
        raise BankError(
            f"cannot read the block {file}: {error}",
            "Run `hiermem verify`; fetch or convert the block again.",
        ) from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    units = units if units is not None else next(iter(found.values()), (0, 0, 0))[1]
    if found != config.shapes(units):
        raise BankError(
            f"the block {file} holds {found}, expected {config.shapes(units)}",
            "It belongs to another bank or another version of this one.",
        )
    return MemoryBlock({name: tensors[name] for name in config.widths}, nbytes)


def write_block(
    file: pathlib.Path, tensors: Mapping[str, tuple[Sequence[int], Any]], dtype: str
) -> tuple[int, str]:
    """Writes name -> (shape, bytes-like) as safetensors, in the order given; returns (bytes, sha256).

    Takes raw buffers rather than arrays because numpy has no bfloat16, and because a converter that streams
    a bank should not copy each block once more.
    """
    header, offset = {}, 0
    for name, (shape, data) in tensors.items():
        size = memoryview(data).nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
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
