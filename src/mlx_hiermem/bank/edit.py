"""Editing a bank in place: blocks leave it, join it, are closed and opened. Each call is one edit (see `commit`).

That a block of its own cluster holds what the cluster's texts taught is what makes this possible
(arXiv:2510.02375, §1, §4). A removal takes the block, its row of the table and its centroid; what the same
texts may have taught the blocks above it, the generic block or the anchor stays there. Sources go and come with the
block of their leaf.
"""

from __future__ import annotations

import math
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import MemoryBlock, block_name, read_block, write_block
from mlx_hiermem.bank.check import require_tree
from mlx_hiermem.bank.commit import FORGET, LEARNING, Edit, editing
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry, SourcesEntry, in_order, order
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.quantize import quantized
from mlx_hiermem.bank.remote import REMOTE, Origin
from mlx_hiermem.bank.sources import INDEX_FILE, LeafSources, write_sources
from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest, write_json
from mlx_hiermem.tree import ClusterTree


@dataclass(frozen=True)
class Removed:
    """What a removal took: the nodes with a block, and their files' bytes."""

    nodes: tuple[Path, ...]
    bytes: int


def remove(root: pathlib.Path, paths: Iterable[Path]) -> Removed:
    """Removes nodes and all below them. Raises BankError for a node that the bank does not have.

    Repeating a removal that was interrupted is no error. Where `hiermem learn` keeps the texts, a note in the bank
    says that those of the removed nodes are to be dropped (`learn.publish.forget`), whatever becomes of this run.
    """
    with editing(root) as edit:
        bank = _open(root)
        wanted = {path for path in paths if path not in edit.finished}
        for node in wanted - bank.manifest.blocks.keys():
            bank.tree.check([node])

        def goes(path: Path) -> bool:
            return not wanted.isdisjoint(path.prefixes())

        blocks = bank.manifest.blocks
        removed = Removed(tuple(filter(goes, blocks)), sum(row.bytes for path, row in blocks.items() if goes(path)))
        manifest = replace(
            bank.manifest,
            blocks={path: row for path, row in blocks.items() if not goes(path)},
            labels={path: label for path, label in bank.manifest.labels.items() if not goes(path)},
        )
        left = (one for one in bank.sources.all() if not goes(one.leaf)) if bank.sources else None
        manifest = replace(manifest, sources=_stage_sources(edit, bank, left))
        _write(edit, manifest, bank.tree.without(wanted))
        policy = BankPolicy.read(root / POLICY)
        if any(map(goes, policy.blocked)):
            open_ = frozenset(path for path in policy.blocked if not goes(path))
            replace(policy, blocked=open_).write(edit.file(POLICY))
        for node in wanted:
            edit.remove(node)
        if (root.absolute().parent / LEARNING).is_dir():
            write_json(edit.file(FORGET), [str(node) for node in sorted(wanted)])
    return removed


def add(
    root: pathlib.Path,
    file: pathlib.Path,
    path: Path,
    *,
    centroid: np.ndarray | None = None,
    label: str | None = None,
    documents: int | None = None,
    sources: Sequence[str] | None = None,
    replacing: bool = False,
) -> BlockEntry:
    """A block file becomes the block of `path`; returns its row of the table.

    A node that the tree lacks needs a `centroid` [dim], by which texts are routed to it; its parent must be
    there. A file from another bank brings its row along, of which label, documents and sources can be set, and the
    windows of its leaf; those of the block whose place it takes go. A plain block is quantised where the bank is.
    Raises BankError where the block does not fit, or where there is one already and `replacing` is not set.
    """
    row = _provenance(root, file, path)
    with editing(root) as edit:
        bank = _open(root)
        known = bank.tree.has(path)
        tree = _with_node(bank.tree, path, centroid) if centroid is not None or not known else None
        if not bank.config.block_sizes[len(path) - 1]:
            raise BankError(f"this bank has no blocks at level {len(path)}")
        if known and path in bank.manifest.blocks and not replacing:
            raise BankError(f"the bank has a block {path} already", "Replace it with --replace.")
        target = edit.file(block_name(path))
        shutil.copyfile(file, target)  # first, so that what is checked is what joins
        if row.sha256 not in ("", file_digest(target)):
            raise BankError(
                f"{file} is not what its bank's manifest says", "See `hiermem bank verify` of that bank."
            )
        _fit(target, file, bank, path)
        entry = BlockEntry(
            path,
            target.stat().st_size,
            file_digest(target),
            label=(row.label or bank.manifest.label(path)) if label is None else label,
            documents=row.documents if documents is None else documents,
            tokens=row.tokens,
            sources=row.sources if sources is None else tuple(sources),
        )
        blocks = in_order({**bank.manifest.blocks, path: entry})
        labels = {node: text for node, text in bank.manifest.labels.items() if node != path}
        manifest = replace(bank.manifest, blocks=blocks, labels=labels)
        _write(edit, replace(manifest, sources=_stage_sources(edit, bank, _exchanged(bank, path, file))), tree)
        if origin := Origin.read(root):  # the hub does not have this block: it is here to stay
            replace(origin, subtrees=origin.subtrees | {path}).write(edit.file(REMOTE).parent)
    return entry


def block(root: pathlib.Path, paths: Sequence[Path], on_blocked: str | None = None) -> BankPolicy:
    """Closes nodes and all below them, and says what becomes of their texts. Returns the new policy."""
    with editing(root) as edit:
        MemoryBank.open(root).tree.check(paths)
        policy = BankPolicy.read(root / POLICY).block(paths)
        policy = replace(policy, on_blocked=on_blocked or policy.on_blocked)
        policy.write(edit.file(POLICY))
    return policy


def reach(root: pathlib.Path, distance: float) -> BankPolicy:
    """Sets how far a text may be and still get memory (`math.inf`: any text does). Returns the new policy.

    In a bank that keeps its sources the distance is that from the nearest passage, else from the path's last node.
    """
    with editing(root) as edit:
        policy, by_passages = BankPolicy.read(root / POLICY), MemoryBank.open(root).sources is not None
        if by_passages and distance < math.inf:
            policy = replace(policy, passage_reach=distance)
        else:
            policy = replace(policy, reach=distance, passage_reach=math.inf)
        policy.write(edit.file(POLICY))
    return policy


def unblock(root: pathlib.Path, paths: Sequence[Path]) -> BankPolicy:
    """Opens nodes and all below them. Returns the new policy."""
    with editing(root) as edit:
        policy = BankPolicy.read(root / POLICY).unblock(paths)
        policy.write(edit.file(POLICY))
    return policy


def _open(root: pathlib.Path) -> MemoryBank:
    """The bank as it is now."""
    bank = MemoryBank.open(root)
    require_tree(bank)
    return bank


def _write(edit: Edit, manifest: BankManifest, tree: ClusterTree | None) -> None:
    """Stages a manifest, and where the tree changes the tree that it vouches for."""
    if tree is not None:
        file = edit.file(TREE)
        tree.save(file)
        manifest = replace(manifest, tree=FileEntry(file.stat().st_size, file_digest(file)))
    manifest.write(edit.file(MANIFEST))


def _stage_sources(edit: Edit, bank: MemoryBank, found: Iterable[LeafSources] | None) -> SourcesEntry | None:
    """Stages the sources as they are after the edit. A bank whose sources are not here has none from now on: those
    on the hub have windows that this edit may have taken away."""
    if found is None:
        return None
    return write_sources(edit.file(INDEX_FILE).parent.parent, found, bank.tree.branching, bank.tree.dim)


def _exchanged(bank: MemoryBank, path: Path, file: pathlib.Path) -> Iterable[LeafSources] | None:
    """The bank's sources, those of `path` exchanged for what `file` brings along; None where the bank has none."""
    if bank.sources is None:
        return None
    rows = {one.leaf: one for one in bank.sources.all() if one.leaf != path}
    if brought := _windows_of(file, bank, path):
        rows[path] = brought
    return (rows[leaf] for leaf in sorted(rows, key=order))


def _with_node(tree: ClusterTree, path: Path, centroid: np.ndarray | None) -> ClusterTree:
    if centroid is None:
        tree.check_place(path)
        raise BankError(
            f"the bank's tree has no node {path}: texts find a new one by its centroid",
            "Give --centroid, or --example and a text that belongs there.",
        )
    return tree.with_node(path, centroid)


def _bank_of(file: pathlib.Path) -> pathlib.Path | None:
    """The folder of the bank that a block file is in."""
    return next((folder for folder in file.resolve().parents if (folder / MANIFEST).is_file()), None)


def _windows_of(file: pathlib.Path, bank: MemoryBank, path: Path) -> LeafSources | None:
    """What the leaf of a file out of another bank has learnt, as windows of `path`."""
    if (folder := _bank_of(file)) is None:
        return None
    other = MemoryBank.open(folder)
    if other.sources is None or other.manifest.embedder != bank.manifest.embedder:
        return None
    name = file.resolve().relative_to(folder).as_posix()
    node = next((node for node in other.manifest.blocks if block_name(node) == name), None)
    found = other.sources.read(node) if node else None
    return replace(found, leaf=path) if found else None


def _provenance(root: pathlib.Path, file: pathlib.Path, path: Path) -> BlockEntry:
    """The file's row in the table of its bank, which must be of our anchor; else an empty row for `path`."""
    if not file.is_file():
        raise BankError(f"there is no block file {file}")
    if (folder := _bank_of(file)) is None:
        return BlockEntry(path, 0, "")
    manifest = BankManifest.read(folder / MANIFEST)
    MemoryBank.open(root).manifest.check_anchor(manifest.anchor)
    name = file.resolve().relative_to(folder).as_posix()
    found = (row for node, row in manifest.blocks.items() if block_name(node) == name)
    return next(found, BlockEntry(path, 0, ""))


def _fit(file: pathlib.Path, given: pathlib.Path, bank: MemoryBank, path: Path) -> None:
    """Raises BankError unless the file is a block of this bank for that level, finite; quantises a plain one."""
    how = bank.config.quantized(len(path))
    try:
        block = _read(file, bank.config, len(path))
    except BankError as error:
        raise BankError(error.what.replace(str(file), str(given)), "See `hiermem bank add --help`.") from error
    for name in bank.config.widths:
        if not mx.isfinite(block.values(name)).all().item():
            raise BankError(f"{name} in {given} has values that are not finite numbers")
    if how and not block.quantization:
        write_block(file, *quantized(block, how))


def _read(file: pathlib.Path, config: MemoryConfig, level: int) -> MemoryBlock:
    """A block as the bank stores it, or a plain one of the same sizes."""
    try:
        return read_block(file, config, level)
    except BankError:
        if not config.quantized(level):
            raise
        return read_block(file, replace(config, quantization=()), level)
