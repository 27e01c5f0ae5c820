"""Two banks of one anchor and one tree become one: level-1 subtrees train apart and are merged afterwards.

Without a shared parameter between subtrees that costs nothing (arXiv:2510.02375, §3).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np

from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, block_name
from mlx_hiermem.bank.check import require_whole
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry, in_order, order
from mlx_hiermem.bank.policy import OPEN, POLICY, REACHES, BankPolicy
from mlx_hiermem.bank.sources import LeafSources
from mlx_hiermem.bank.writer import BankWriter
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest
from mlx_hiermem.progress import Progress
from mlx_hiermem.tree import ClusterTree

SHOWN = 8  # conflicts that an error names
TOLERANCE = 1e-5  # of equal centroids: saved by other machines, or in another order of sums


def merge(
    first: MemoryBank,
    second: MemoryBank,
    out: pathlib.Path,
    prefer: str = "",
    resume: bool = False,
    progress: Progress | None = None,
) -> MemoryBank:
    """Writes a bank with the blocks of both to `out`, a folder that is not there yet.

    Blocks that differ for one node, and differing generic blocks, are conflicts: refused, or decided by
    `prefer` (first or second). What either bank blocks stays blocked. Raises BankError for banks of different
    anchors, designs, embedders or trees, and for damaged ones. `resume` continues an interrupted run;
    `progress` gets (bytes copied, bytes in all).
    """
    _check_designs(first, second)
    for bank in (first, second):
        require_whole(bank)
    tree = merge_trees(first.tree, second.tree)
    clashes = conflicts(first.manifest, second.manifest)
    if clashes and prefer not in ("first", "second"):
        more = f" and {len(clashes) - SHOWN} more" if len(clashes) > SHOWN else ""
        raise BankError(
            f"both banks have a block of their own for {', '.join(clashes[:SHOWN])}{more}",
            "Say whose count with --prefer first or --prefer second.",
        )
    above, below = (second, first) if prefer == "second" else (first, second)
    fingerprint = " ".join(file_digest(bank.root / MANIFEST) for bank in (above, below))
    with BankWriter(out, fingerprint, resume) as writer:
        files = _files(above, below)
        writer.reserve({name: entry.bytes for name, (_, entry) in files.items()})
        done, total = 0, sum(entry.bytes for _, entry in files.values())
        for name, (bank, entry) in files.items():
            if not writer.finished(name):
                writer.copy(name, bank.root / name, entry)
            done += entry.bytes
            if progress:
                progress(done, total)
        policy = merge_policies(first.policy, second.policy)
        if policy != OPEN:
            policy.write(writer.partial / POLICY)
        manifest = replace(merge_manifests(above.manifest, below.manifest), tree=writer.write_tree(tree))
        kept = above.sources or below.sources  # neither, where both were pulled without
        sources = writer.write_sources(merge_sources(above, below), tree) if kept else None
        writer.finish(replace(manifest, sources=sources))
    return MemoryBank.open(out)


def _check_designs(first: MemoryBank, second: MemoryBank) -> None:
    """Raises BankError for banks of different anchors, memories or embedders, naming the settings that differ."""
    ours, theirs = first.manifest, second.manifest
    ours.check_anchor(theirs.anchor)
    for what in ("memory", "embedder"):
        one, other = getattr(ours, what), getattr(theirs, what)
        differing = [field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)]
        if differing:
            raise BankError(
                f"{first.root} and {second.root} are banks of different {what} settings: {', '.join(differing)}",
                "Quantise both alike, or merge first." if differing == ["quantization"] else "",
            )


def conflicts(first: BankManifest, second: BankManifest) -> list[str]:
    """Nodes, and `generic`, for which both have a block and not the same."""
    shared = first.blocks.keys() & second.blocks.keys()
    found = [str(node) for node in sorted(shared) if first.blocks[node].sha256 != second.blocks[node].sha256]
    if first.generic and second.generic and first.generic.sha256 != second.generic.sha256:
        found.append("generic")
    return found


def merge_trees(first: ClusterTree, second: ClusterTree) -> ClusterTree:
    """The nodes of both. Raises BankError where a node of both has two centroids."""
    sizes = {(tree.branching, tree.depth, tree.dim) for tree in (first, second)}
    if len(sizes) > 1:
        raise BankError("the banks' trees differ in branching, depth or dimension", "Only banks of one tree merge.")
    centroids, present = [], []
    pairs = zip(first.centroids, first.present, second.centroids, second.present, strict=True)
    for level, (c1, p1, c2, p2) in enumerate(pairs, 1):
        both = p1 & p2
        same = np.isclose(c1, c2, rtol=TOLERANCE, atol=TOLERANCE).all(axis=-1)
        if (both & ~same).any():
            row = int(np.flatnonzero((both & ~same).reshape(-1))[0])
            node = Path.of_row(row, level, first.branching)
            raise BankError(f"the banks' trees have different centroids at {node}", "Only banks of one tree merge.")
        centroids.append(np.where(p1[..., None], c1, c2))
        present.append(p1 | p2)
    return ClusterTree(centroids, present)


def merge_policies(first: BankPolicy, second: BankPolicy) -> BankPolicy:
    """What either blocks; `parent` where either says so, for it gives less away; the longer reach."""
    on_blocked = "parent" if "parent" in (first.on_blocked, second.on_blocked) else "sibling"
    reaches = {name: max(getattr(first, name), getattr(second, name)) for name in REACHES}
    return replace(first.block(second.blocked), on_blocked=on_blocked, **reaches)


def merge_manifests(above: BankManifest, below: BankManifest) -> BankManifest:
    """The rows of both, those of `above` where both have one; of recipes and licences that differ, both."""
    blocks: dict[Path, BlockEntry] = {**below.blocks, **above.blocks}
    labels = {node: label for node, label in (below.labels | above.labels).items() if node not in blocks}
    recipe = above.recipe if above.recipe == below.recipe else {"merged": [above.recipe, below.recipe]}
    return replace(
        above,
        blocks=in_order(blocks),
        generic=above.generic or below.generic,
        labels=labels,
        recipe=recipe,
        licence="; ".join(dict.fromkeys(filter(None, (above.licence, below.licence)))),
    )


def merge_sources(above: MemoryBank, below: MemoryBank) -> Iterator[LeafSources]:
    """Each leaf's windows from the bank whose block counts there: `above`, unless it says nothing of that block."""
    leaves = {leaf for bank in (above, below) if bank.sources for leaf in bank.sources.leaves()}
    for leaf in sorted(leaves, key=order):
        found = above.sources.read(leaf) if above.sources else None
        ours, theirs = (bank.manifest.blocks.get(leaf) for bank in (above, below))
        if not found and below.sources and (not ours or (theirs and ours.sha256 == theirs.sha256)):
            found = below.sources.read(leaf)
        if found:
            yield found


def _files(above: MemoryBank, below: MemoryBank) -> dict[str, tuple[MemoryBank, FileEntry]]:
    """File name -> the bank to copy it from, its size and digest there."""
    files: dict[str, tuple[MemoryBank, FileEntry]] = {}
    for bank in (below, above):
        manifest = bank.manifest
        rows = {block_name(node): FileEntry(row.bytes, row.sha256) for node, row in manifest.blocks.items()}
        if manifest.generic:
            rows[GENERIC_FILE] = manifest.generic
        files |= {name: (bank, entry) for name, entry in rows.items()}
    return files
