"""A trained memory checkpoint -> a bank folder, streamed block by block.

A bank is many times larger than memory, so its rows go straight from the checkpoint to block files: read,
checked for finite values, hashed and written by a few threads, of which each holds one block at a time.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mlx_hiermem import __version__
from mlx_hiermem.bank.bank import TREE
from mlx_hiermem.bank.block import GENERIC_FILE, block_name
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry
from mlx_hiermem.bank.writer import BankWriter
from mlx_hiermem.config import DTYPES, GENERIC_LEVEL, GENERIC_NODE, AnchorIdentity, Path
from mlx_hiermem.convert.checkpoint import TensorSource, open_checkpoint
from mlx_hiermem.convert.key_map import KeyMap
from mlx_hiermem.convert.memory_layout import AnchorDims, MemoryLayout, read_layout
from mlx_hiermem.convert.memory_settings import CheckpointSettings, read_settings
from mlx_hiermem.convert.readers import NUMPY_DTYPES, RawTensor, is_finite, some
from mlx_hiermem.errors import CheckpointError
from mlx_hiermem.progress import Progress
from mlx_hiermem.tree import ClusterTree

__all__ = ["AnchorDims", "convert_memory"]

THREADS = 4  # hashing takes the most time, and one core hashes slower than a disk writes
IN_FLIGHT = 512 << 20  # bytes of blocks that threads may hold at a time, or one block if it is larger
OVERHEAD = 2048  # bytes of a block file beyond its values, and of its row in the manifest


def convert_memory(
    checkpoint: pathlib.Path,
    out_bank: pathlib.Path,
    *,
    anchor: AnchorIdentity,
    anchor_dims: AnchorDims,
    key_map: KeyMap | pathlib.Path | None = None,
    dtype: str | None = None,
    resume: bool = False,
    licence: str = "",
    progress: Progress | None = None,
) -> BankManifest:
    """Writes the bank folder `out_bank` from a checkpoint of the documented layout (docs/convert.md).

    Values keep the dtype they have, unless `dtype` asks for another (float64 becomes float32). Peak memory is
    some hundred MB plus the largest block. Raises CheckpointError for a bad checkpoint, AnchorMismatchError
    for one of another anchor, OutputError if the bank cannot be written. `resume` continues an interrupted run.
    """
    if isinstance(key_map, pathlib.Path):
        key_map = KeyMap.read(key_map)
    with open_checkpoint(checkpoint) as source:
        settings = read_settings(checkpoint, source)
        layout = read_layout(source, settings, key_map or KeyMap(), anchor, anchor_dims, dtype)
        _check_paths(settings, layout.tree)
        jobs = _jobs(layout)
        with BankWriter(out_bank, _fingerprint(source, layout, anchor), resume) as writer:
            tree_bytes = sum(array.nbytes for array in (*layout.tree.centroids, *layout.tree.present))
            writer.reserve({job.name: job.nbytes + OVERHEAD for job in jobs} | {TREE: tree_bytes})
            tree = writer.write_tree(layout.tree)
            files = _write_blocks(source, layout, jobs, writer, progress)
            manifest = BankManifest(
                anchor,
                layout.config,
                settings.embedder,
                _block_table(layout, settings, files),
                tree,
                files.get(GENERIC_FILE),
                {node: text for node, text in settings.labels.items() if block_name(node) not in files},
                dict(settings.recipe)
                | {"converted": {"from": [f.name for f in source.files], "by": f"mlx-hiermem {__version__}"}},
                licence or settings.licence,
            )
            writer.finish(manifest)
    return manifest


@dataclass(frozen=True)
class Job:
    """One block to write: its file, its bytes, and where its rows are. Level 0 is the generic block."""

    name: str
    nbytes: int
    level: int
    path: Path

    def __str__(self) -> str:
        return f"cluster {self.path}" if self.level else "the generic block"


def _jobs(layout: MemoryLayout) -> list[Job]:
    """Level by level in row order, so that the checkpoint is read from front to back."""
    jobs = []
    for level in layout.tensors:
        nbytes = layout.config.parameters(layout.units[level]) * DTYPES[layout.config.dtype]
        if level == GENERIC_LEVEL:
            jobs.append(Job(GENERIC_FILE, nbytes, level, GENERIC_NODE))
            continue
        for row in np.flatnonzero(layout.tree.present[level - 1]):
            path = Path.of_row(int(row), level, layout.config.branching)
            jobs.append(Job(block_name(path), nbytes, level, path))
    return jobs


def _check_paths(settings: CheckpointSettings, tree: ClusterTree) -> None:
    tables = (settings.labels, settings.documents, settings.tokens, settings.sources)
    strange = sorted({str(node) for table in tables for node in table if not tree.has(node)})
    if strange:
        raise CheckpointError(f"the settings speak of clusters that the tree does not have: {some(strange)}")


def _fingerprint(source: TensorSource, layout: MemoryLayout, anchor: AnchorIdentity) -> str:
    """Changes with the checkpoint's files and with everything that decides what the blocks hold."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    facts = [files, anchor.to_json(), layout.config.to_json(), repr(layout.tensors)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _write_blocks(
    source: TensorSource,
    layout: MemoryLayout,
    jobs: Sequence[Job],
    writer: BankWriter,
    progress: Progress | None,
) -> dict[str, FileEntry]:
    """Writes the blocks that are not there yet; returns file name -> entry of all, in order."""
    entries, done, total = {}, 0, sum(job.nbytes for job in jobs)

    def convert(job: Job) -> FileEntry:
        entry = writer.finished(job.name)
        return entry or writer.write(job.name, _block(source, layout, job), layout.config.dtype)

    for _, same_size in groupby(jobs, key=lambda job: job.level):
        batch = list(same_size)
        threads = max(1, min(THREADS, IN_FLIGHT // batch[0].nbytes))
        for job, entry in zip(batch, _in_order(convert, batch, threads), strict=True):
            entries[job.name] = entry
            done += job.nbytes
            if progress:
                progress(done, total)
    return entries


def _in_order(convert: Callable[[Job], FileEntry], jobs: Iterable[Job], threads: int) -> Iterator[FileEntry]:
    """Maps with threads, never more than twice as many jobs ahead as there are threads."""
    pending: deque[Future[FileEntry]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(convert, job))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _block(source: TensorSource, layout: MemoryLayout, job: Job) -> dict[str, tuple[Sequence[int], np.ndarray]]:
    """One cluster's tensors as they go to disk: name -> ([L, r, width], values)."""
    config, row = layout.config, job.path.row(layout.config.branching)
    shapes = config.shapes(layout.units[job.level])
    tensors: dict[str, tuple[Sequence[int], np.ndarray]] = {}
    for part, stored in layout.tensors[job.level].items():
        raw = source.rows(stored.name, row, row + 1) if job.level else source.read(stored.name)
        if not is_finite(raw):
            raise CheckpointError(f"{stored.name} has values that are not finite in {job}")
        if stored.swapped or raw.dtype != config.dtype:
            raw = _recast(raw, shapes[part], config.dtype, stored.swapped)
            if not is_finite(raw):
                raise CheckpointError(f"{stored.name} has values too large for {config.dtype} in {job}")
        tensors[part] = (shapes[part], raw.data)
    return tensors


def _recast(raw: RawTensor, shape: tuple[int, int, int], dtype: str, swapped: bool) -> RawTensor:
    """Another dtype or orientation, layer by layer so that only one layer's temporaries are in memory."""
    layers = raw.data.reshape(shape[0], *(shape[:0:-1] if swapped else shape[1:]))
    out = np.empty(shape, dtype=NUMPY_DTYPES[dtype])
    for target, values in zip(out, layers, strict=True):
        target[:] = RawTensor(raw.dtype, values.shape, values.T if swapped else values).astype(dtype).data
    return RawTensor(dtype, shape, out)


def _block_table(
    layout: MemoryLayout, settings: CheckpointSettings, files: Mapping[str, FileEntry]
) -> dict[Path, BlockEntry]:
    """The manifest's rows, in the order of the files."""
    rows = {}
    for job in (job for job in _jobs(layout) if job.level):
        node, entry = job.path, files[job.name]
        rows[node] = BlockEntry(
            node,
            entry.bytes,
            entry.sha256,
            settings.labels.get(node, ""),
            settings.documents.get(node, 0),
            settings.tokens.get(node, 0),
            settings.sources.get(node, ()),
        )
    return rows
