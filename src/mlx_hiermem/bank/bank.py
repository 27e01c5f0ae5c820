"""A memory bank on disk: opened by its manifest, read a block at a time, checked on demand.

Opening reads bank.json and maps the tree; a block file is opened when that block is asked for, never before.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

from mlx_hiermem.bank.block import GENERIC_FILE, MemoryBlock, block_name, read_block
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.remote import Origin, RemoteTier
from mlx_hiermem.config import GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest
from mlx_hiermem.tree import ClusterTree

MANIFEST, TREE = "bank.json", "tree.safetensors"
EDIT = "edit"  # the folder of a change that is being made; see `commit`


Stamp = tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]


class MemoryBank:
    def __init__(self, root: pathlib.Path, manifest: BankManifest, stamp: Stamp | None = None) -> None:
        self.root, self.manifest = root, manifest
        self.stamp = stamp or _stamp(root)  # where it differs later, the bank was edited

    @classmethod
    def open(cls, root: pathlib.Path | str) -> MemoryBank:
        """Reads the manifest; no block is touched."""
        root = pathlib.Path(root)
        if not root.is_dir():
            raise BankError(f"there is no bank at {root}")
        stamp = _stamp(root)  # first: a change in between is seen later
        return cls(root, BankManifest.read(root / MANIFEST), stamp)

    @property
    def is_edited(self) -> bool:
        """Whether the manifest or the policy have been written since; false where the bank is gone."""
        now = _stamp(self.root)
        return now != self.stamp and now[0] is not None

    @property
    def key(self) -> str:
        """Stands for what the blocks held when the bank was opened."""
        return f"{self.root}@{self.stamp[0]}"

    def __repr__(self) -> str:
        blocks = f"{len(self.manifest.blocks)} blocks ({self.config.kind}, {self.config.precision})"
        return f"<MemoryBank {self.root}: {blocks} for {self.manifest.anchor.name}>"

    @property
    def config(self) -> MemoryConfig:
        return self.manifest.memory

    @cached_property
    def tree(self) -> ClusterTree:
        tree = ClusterTree.load(self.root / TREE)
        if (tree.branching, tree.depth) != (self.config.branching, self.config.depth):
            raise BankError(
                f"the tree in {self.root} has branching {tree.branching} and depth {tree.depth}, "
                f"the manifest says {self.config.branching} and {self.config.depth}"
            )
        return tree

    @cached_property
    def policy(self) -> BankPolicy:
        """What may not be used. Raises BankError where it names nodes that the tree does not have."""
        policy = BankPolicy.read(self.root / POLICY)
        unknown = {node for node in policy.blocked if not self.tree.has(node)}
        # While nodes are being removed, the tree is a step ahead of the policy.
        if unknown and not (self.root / EDIT).exists():
            raise BankError(
                f"{self.root / POLICY} blocks {min(unknown)}, which the bank's tree does not have",
                "Correct it, or unblock that node.",
            )
        return replace(policy, blocked=policy.blocked - unknown)

    def state(self, node: Path) -> str:
        """Of a node's block: `blocked` (itself or above), `on disk`, `remote` (on the hub), or `missing`."""
        if self.policy.blocker(node):
            return "blocked"
        if (self.root / block_name(node)).is_file():
            return "on disk"
        return "remote" if self.remote else "missing"

    @cached_property
    def remote(self) -> RemoteTier | None:
        """Where blocks that are not here come from; None where the bank was not pulled from the hub."""
        origin = Origin.read(self.root)
        return RemoteTier(self.root, origin) if origin else None

    def digest(self, node: Path) -> str:
        """What the manifest says of a node's block, or of the generic block; empty where it has none."""
        if node == GENERIC_NODE:
            return self.manifest.generic.sha256 if self.manifest.generic else ""
        return self.manifest.blocks[node].sha256 if self.manifest.has_block(node) else ""

    def nodes_on(self, path: Path) -> list[Path]:
        """The nodes of a path that have a block, level 1 first. A path may lead below them, or be ragged."""
        return [node for node in path.prefixes() if self.manifest.has_block(node)]

    def read(self, node: Path) -> MemoryBlock:
        """Reads one node's block, from the hub where it was left there."""
        if not self.manifest.has_block(node):
            raise BankError(f"the bank has no block {node}", "`hiermem route` shows the paths of a text.")
        if self.remote:
            self.remote.bring(node, block_name(node))
        return read_block(self.root / block_name(node), self.config, len(node))

    def read_generic(self) -> MemoryBlock:
        """Reads the control block of the fetched size."""
        if self.manifest.generic is None:
            raise BankError(f"the bank {self.root} has no generic block", "Use memory none or fetched.")
        if self.remote:
            self.remote.bring(GENERIC_NODE, GENERIC_FILE)
        return read_block(self.root / GENERIC_FILE, self.config)

    def files(self) -> Iterator[tuple[str, int, str]]:
        """(name, bytes, sha256) of every file that the manifest vouches for."""
        yield TREE, self.manifest.tree.bytes, self.manifest.tree.sha256
        if self.manifest.generic:
            yield GENERIC_FILE, self.manifest.generic.bytes, self.manifest.generic.sha256
        for path, entry in self.manifest.blocks.items():
            yield block_name(path), entry.bytes, entry.sha256

    def problems(self, progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
        """Checks every file's size and digest; yields one line for each that differs. What is on the hub is not.

        `progress` is called with (bytes checked, bytes in all).
        """
        files = list(self.files())
        done, total = 0, sum(size for _, size, _ in files)
        for name, size, digest in files:
            file = self.root / name
            if not file.is_file():
                if not self.remote:
                    yield f"{name} is missing"
            elif file.stat().st_size != size:
                yield f"{name} has {file.stat().st_size} bytes, the manifest says {size}"
            elif file_digest(file) != digest:
                yield f"{name} has changed: its sha256 is not the manifest's"
            done += size
            if progress:
                progress(done, total)


def _stamp(root: pathlib.Path) -> Stamp:
    """Tells versions of the manifest and of the policy apart. Both are replaced as a whole, never written into."""
    found: list[tuple[int, int, int] | None] = []
    for name in (MANIFEST, POLICY):
        try:
            status = (root / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found[0], found[1]
