"""Quantising a bank: the same memories in fewer bits, written as a new bank.

MLX's affine quantisation along each row of a block's tensors. Blocks are done one at a time, so memory does not
grow with the bank; each is read back from the new file, and what was lost is measured there.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, MemoryBlock, block_name, read_block
from mlx_hiermem.bank.check import require_whole
from mlx_hiermem.bank.manifest import FileEntry
from mlx_hiermem.bank.policy import OPEN, POLICY
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE
from mlx_hiermem.bank.writer import BankWriter
from mlx_hiermem.config import BIASES, DTYPES, GROUP_SIZES, SCALES, MemoryConfig, Quantization
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest
from mlx_hiermem.progress import Progress

KEPT = 16  # "bits" of a level that is not to be quantised
GROUP = 64  # the usual one: half a bit a value in float16, and less is lost than in groups of 128
HEADER = 4096  # bytes of a block file beyond its values, at most
TINY = 1e-30  # what a relative error is taken of, where the original is zero


@dataclass
class LevelReport:
    """What quantising did to the blocks of a level; level 0 is the generic block.

    Errors are ‖new − old‖ / ‖old‖ (Frobenius) of each layer's matrix: the largest, and the mean over all.
    """

    level: int
    quantization: Quantization | None
    blocks: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    largest_error: float = 0.0
    mean_error: float = 0.0
    matrices: int = 0

    def add(self, before: int, after: int, errors: mx.array) -> None:
        """Counts one block in, with the errors [n] of its matrices."""
        self.blocks, self.bytes_before = self.blocks + 1, self.bytes_before + before
        self.bytes_after += after
        self.largest_error = max(self.largest_error, float(errors.max()))
        total = self.mean_error * self.matrices + float(errors.sum())
        self.matrices += errors.size
        self.mean_error = total / self.matrices

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def design(config: MemoryConfig, bits: Sequence[int], group_size: int | None = None) -> MemoryConfig:
    """The same memory in so many bits: one number for each level, of which the last counts for those below too.

    16 keeps a level as it is. Groups are of 64 values, or of 32 where the widths need it. Raises BankError where
    the memory is quantised already, or its widths are no multiples of the group size.
    """
    if config.quantization:
        raise BankError(
            f"the bank is quantised already: {config.precision}", "Quantise the bank that it was made from."
        )
    if not 0 < len(bits) <= config.depth:
        raise BankError(f"bits are given for {len(bits)} levels, the bank has {config.depth}")
    if all(each == KEPT for each in bits):
        raise BankError(
            f"{KEPT} bits keep a level as it is: nothing would change", "Give 8, 4 or 2 for some level."
        )
    if group_size is None:
        fits = (size for size in (GROUP, *GROUP_SIZES) if not any(w % size for w in config.widths.values()))
        group_size = next(fits, GROUP)
    every = (*bits, *[bits[-1]] * (config.depth - len(bits)))
    return replace(
        config, quantization=tuple(None if each == KEPT else Quantization(each, group_size) for each in every)
    )


def quantize(
    bank: MemoryBank,
    out: pathlib.Path,
    config: MemoryConfig,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[LevelReport]:
    """Writes the bank `out` as `config` (see `design`) has it; returns what each level, and generic, lost.

    The policy comes along. `progress` gets (bytes read, bytes in all). Raises BankError where the bank is damaged
    or not whole, OutputError where `out` exists or cannot be written. `resume` continues an interrupted run.
    """
    require_whole(bank)
    policy = bank.policy
    digest = file_digest(bank.root / MANIFEST)
    fingerprint = hashlib.sha256(f"{digest} {config.quantization}".encode()).hexdigest()
    reports: dict[int, LevelReport] = {}
    with BankWriter(out, fingerprint, resume) as writer:
        files = list(_files(bank))
        writer.reserve({name: _expected(config, level, entry) for name, level, entry in files})
        done, total, written = 0, sum(entry.bytes for _, _, entry in files), dict[str, FileEntry]()
        for name, level, entry in files:
            written[name], errors = _convert(bank, writer, config, name, level, entry)
            report = reports.setdefault(level, LevelReport(level, config.quantized(level)))
            report.add(entry.bytes, written[name].bytes, errors)
            done += entry.bytes
            if progress:
                progress(done, total)
        if policy != OPEN:
            policy.write(writer.partial / POLICY)
        manifest = bank.manifest if bank.sources else replace(bank.manifest, sources=None)
        rows = {node: replace(row, **asdict(written[block_name(node)])) for node, row in manifest.blocks.items()}
        recipe = manifest.recipe | {"quantized": {"from": digest, "precision": config.precision}}
        writer.copy(TREE, bank.root / TREE, manifest.tree)
        if sources := manifest.sources:
            writer.copy(WINDOWS_FILE, bank.root / WINDOWS_FILE, sources.texts)
            writer.copy(INDEX_FILE, bank.root / INDEX_FILE, sources.index)
        writer.finish(
            replace(manifest, memory=config, blocks=rows, generic=written.get(GENERIC_FILE), recipe=recipe)
        )
    return [reports[level] for level in sorted(reports, key=lambda level: level or config.depth + 1)]


def quantized(
    block: MemoryBlock, how: Quantization
) -> tuple[dict[str, tuple[Sequence[int], np.ndarray]], dict[str, str]]:
    """A plain block's tensors as a quantised one's, for `write_block`: (shapes and data, dtypes) by name."""
    tensors: dict[str, mx.array] = {}
    for name, values in block.tensors.items():
        # On the CPU, so that every machine rounds alike and equal banks have equal digests.
        packed, scales, biases = mx.quantize(values, how.group_size, how.bits, stream=mx.cpu)
        tensors |= {name: packed, name + SCALES: scales, name + BIASES: biases}
    mx.eval(tensors)
    data: dict[str, tuple[Sequence[int], np.ndarray]] = {
        name: (tensor.shape, np.asarray(tensor.view(mx.uint8))) for name, tensor in tensors.items()
    }
    return data, {name: str(tensor.dtype).removeprefix("mlx.core.") for name, tensor in tensors.items()}


def _files(bank: MemoryBank) -> Iterator[tuple[str, int, FileEntry]]:
    """(name, level, size and digest) of the block files."""
    for node, row in bank.manifest.blocks.items():
        yield block_name(node), len(node), FileEntry(row.bytes, row.sha256)
    if bank.manifest.generic:
        yield GENERIC_FILE, 0, bank.manifest.generic


def _expected(config: MemoryConfig, level: int, entry: FileEntry) -> int:
    """About the bytes that a block file of so many will have."""
    how, width = config.quantized(level), 8 * DTYPES[config.dtype]
    return int(entry.bytes * (how.bits / width + 2 / how.group_size)) + HEADER if how else entry.bytes


def _convert(
    bank: MemoryBank, writer: BankWriter, config: MemoryConfig, name: str, level: int, entry: FileEntry
) -> tuple[FileEntry, mx.array]:
    """Writes one block file, unless an interrupted run did; (its size and digest, the errors of its matrices)."""
    how, source = config.quantized(level), bank.root / name
    if how is None:
        if not writer.finished(name):
            writer.copy(name, source, entry)
        return entry, mx.zeros(len(config.layers) * len(config.widths))
    if file_digest(source) != entry.sha256:
        raise BankError(f"{source} is not what its manifest says", "See `hiermem bank verify` of that bank.")
    block = read_block(source, bank.config, level)
    written = writer.finished(name) or writer.write(name, *quantized(block, how))
    errors = _errors(block, read_block(writer.partial / name, config, level))
    if not mx.isfinite(errors).all().item():
        raise BankError(f"{source} has values that are not finite numbers", "Convert or pull that bank again.")
    return written, errors


def _errors(old: MemoryBlock, new: MemoryBlock) -> mx.array:
    """‖new − old‖ / ‖old‖ of each layer's matrices [r, width]: [L · tensors]."""
    found = []
    for name, exact in old.tensors.items():
        exact = exact.astype(mx.float32)
        lost = mx.linalg.norm(new.values(name).astype(mx.float32) - exact, axis=[1, 2])
        found.append(lost / mx.maximum(mx.linalg.norm(exact, axis=[1, 2]), TINY))
    return mx.concatenate(found)
