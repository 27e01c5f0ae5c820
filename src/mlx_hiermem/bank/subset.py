"""A bank to share without some of its subtrees, and a receipt of what is not in it.

Left out are the blocks, their rows and labels, the centroids and the windows of these subtrees, and the names of
documents that only they have learnt. What the receipt says: see `receipt`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, block_name
from mlx_hiermem.bank.check import require_whole
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry
from mlx_hiermem.bank.policy import OPEN, POLICY
from mlx_hiermem.bank.receipt import RECEIPT, LeftOut, Receipt
from mlx_hiermem.bank.writer import BankWriter
from mlx_hiermem.config import Path
from mlx_hiermem.files import file_digest, write_json
from mlx_hiermem.progress import Progress


def export(
    bank: MemoryBank,
    out: pathlib.Path,
    without: Sequence[Path],
    sources: bool = True,
    resume: bool = False,
    progress: Progress | None = None,
) -> Receipt:
    """Writes the bank without these nodes, and all below them, to `out`, a folder that is not there yet.

    `sources`: with the texts of the leaves that stay, where the bank keeps some. Raises BankError for nodes that
    the bank does not have, and for a damaged bank; OutputError as BankWriter.
    """
    require_whole(bank)
    bank.tree.check(without)
    nodes = sorted({node for node in without if not any(up in without for up in node.prefixes()[:-1])})

    def goes(path: Path) -> bool:
        return any(node in path.prefixes() for node in nodes)

    manifest, made_of = _without(bank.manifest, goes), file_digest(bank.root / MANIFEST)
    kept = bank.sources if sources else None
    fingerprint = f"{made_of} without {' '.join(map(str, nodes))} {bool(kept)}"
    with BankWriter(out, fingerprint, resume) as writer:
        _copy(bank, writer, manifest, progress)
        policy = replace(bank.policy, blocked=frozenset(path for path in bank.policy.blocked if not goes(path)))
        if policy != OPEN:
            policy.write(writer.partial / POLICY)
        tree = bank.tree.without(nodes)
        left = writer.write_sources((one for one in kept.all() if not goes(one.leaf)), tree) if kept else None
        manifest = replace(manifest, tree=writer.write_tree(tree), sources=left)
        manifest.write(writer.partial / MANIFEST)
        before = bank.manifest.sources.windows if bank.manifest.sources else 0
        above = sorted({up for node in nodes for up in node.prefixes() if up in manifest.blocks})
        receipt = Receipt(
            made_of,
            file_digest(writer.partial / MANIFEST),
            tuple(map(str, nodes)),
            tuple(LeftOut(str(p), row.bytes, row.sha256) for p, row in bank.manifest.blocks.items() if goes(p)),
            before - (left.windows if left else 0),
            (*map(str, above), *["generic"] * bool(manifest.generic), "anchor"),
        )
        write_json(writer.partial / RECEIPT, receipt.to_json(), indent=1)
        writer.finish(manifest)
    return receipt


def _without(manifest: BankManifest, goes: Callable[[Path], bool]) -> BankManifest:
    """The manifest without the rows and labels of what goes, and without documents that nothing else has learnt."""
    gone = {name for path, row in manifest.blocks.items() if goes(path) for name in row.sources}
    above = {up for path in manifest.blocks for up in path.prefixes()[:-1]}  # learn what a leaf below learns
    stays = [row for path, row in manifest.blocks.items() if not goes(path)]
    gone -= {name for row in stays if row.path not in above for name in row.sources}

    def told(row: BlockEntry) -> BlockEntry:
        return replace(row, sources=tuple(name for name in row.sources if name not in gone))

    labels = {path: label for path, label in manifest.labels.items() if not goes(path)}
    return replace(manifest, blocks={row.path: told(row) for row in stays}, labels=labels)


def _copy(bank: MemoryBank, writer: BankWriter, manifest: BankManifest, progress: Progress | None) -> None:
    """The blocks that stay, and the generic one."""
    files = {block_name(path): FileEntry(row.bytes, row.sha256) for path, row in manifest.blocks.items()}
    if manifest.generic:
        files[GENERIC_FILE] = manifest.generic
    writer.reserve({name: entry.bytes for name, entry in files.items()})
    done, total = 0, sum(entry.bytes for entry in files.values())
    for name, entry in files.items():
        if not writer.finished(name):
            writer.copy(name, bank.root / name, entry)
        done += entry.bytes
        if progress:
            progress(done, total)
