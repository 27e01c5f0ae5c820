"""A memory bank on disk: opened by its manifest, read a block at a time, checked as it is read.

Opening reads bank.json and maps the tree; a block file is opened when that block is asked for, never before. At its
first reading a file's digest must be the manifest's, and its numbers finite. HIERMEM_VERIFY=0 leaves that out.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

from mlx_hiermem.bank.block import GENERIC_FILE, MemoryBlock, block_name, read_block
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.remote import Origin, RemoteTier, node_of
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE, BankSources, standing
from mlx_hiermem.config import GENERIC_LEVEL, GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest, path_of, reason
from mlx_hiermem.tree import ClusterTree

MANIFEST, TREE = "bank.json", "tree.safetensors"
VERIFY = "HIERMEM_VERIFY"  # in the environment: 0 reads files unchecked
EDIT = "edit"  # the folder of a change that is being made; see `commit`


Stamp = tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]


class MemoryBank:
    def __init__(
        self, root: pathlib.Path, manifest: BankManifest, stamp: Stamp | None = None, verify: bool | None = None
    ) -> None:
        """`verify`: whether files are checked when they are first read; None asks HIERMEM_VERIFY."""
        self.root, self.manifest = root, manifest
        self.verify = os.environ.get(VERIFY) != "0" if verify is None else verify
        self._verified: set[str] = set()  # files that were right when they were first read
        self.stamp = stamp or _stamp(root)  # where it differs later, the bank was edited

    @classmethod
    def open(cls, root: pathlib.Path | str, verify: bool | None = None) -> MemoryBank:
        """Reads the manifest; no block is touched."""
        root = path_of(root, "folder of a bank")
        if not root.is_dir():
            raise BankError(f"there is no bank at {root}")
        stamp = _stamp(root)  # first: a change in between is seen later
        return cls(root, BankManifest.read(root / MANIFEST), stamp, verify)

    @property
    def is_edited(self) -> bool:
        """Whether the manifest or the policy have been written since; false where the bank is gone."""
        now = _stamp(self.root)
        return now != self.stamp and now[0] is not None

    @property
    def is_away(self) -> bool:
        """Whether the bank that was opened cannot be reached: its drive was unplugged, its folder moved."""
        return _stamp(self.root)[0] is None

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
        if self.verify and (self.root / TREE).is_file():
            self._require(TREE, file_digest(self.root / TREE))
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

    @cached_property
    def sources(self) -> BankSources | None:
        """The windows that were learnt; None where the bank was made or shared without them."""
        if self.manifest.sources is None or (self.remote and not (self.root / INDEX_FILE).is_file()):
            return None
        for name in (WINDOWS_FILE, INDEX_FILE) if self.verify else ():
            if (file := standing(self.root, name, self.root / EDIT)).is_file():
                self._require(name, file_digest(file))
        return BankSources(self.root, self.root / EDIT)

    def state(self, node: Path) -> str:
        """Of a node's block: `blocked` (itself or above), `on disk`, `remote` (on the hub), or `missing`."""
        if self.policy.blocker(node):
            return "blocked"
        if os.path.isfile(self.root / block_name(node)):  # false, too, where the disk fails
            return "on disk"
        return "remote" if self.remote else "missing"

    @cached_property
    def remote(self) -> RemoteTier | None:
        """Where blocks that are not here come from; None where the bank was not pulled from the hub."""
        origin = Origin.read(self.root)
        return RemoteTier(self.root, origin) if origin else None

    def digest(self, node: Path) -> str:
        """What the manifest says of a node's block, or of the generic block; empty where it has none."""
        return digest_in(self.manifest, block_name(node))

    def nodes_on(self, path: Path) -> list[Path]:
        """The nodes of a path that have a block, level 1 first. A path may lead below them, or be ragged."""
        return [node for node in path.prefixes() if self.manifest.has_block(node)]

    def read(self, node: Path) -> MemoryBlock:
        """Reads one node's block, from the hub where it was left there."""
        if not self.manifest.has_block(node):
            raise BankError(f"the bank has no block {node}", "`hiermem route` shows the paths of a text.")
        if self.remote:
            self.remote.bring(node, block_name(node))
        return self._read(block_name(node), len(node))

    def read_generic(self) -> MemoryBlock:
        """Reads the control block of the fetched size."""
        if self.manifest.generic is None:
            raise BankError(f"the bank {self.root} has no generic block", "Use memory none or fetched.")
        if self.remote:
            self.remote.bring(GENERIC_NODE, GENERIC_FILE)
        return self._read(GENERIC_FILE, GENERIC_LEVEL)

    def _read(self, name: str, level: int) -> MemoryBlock:
        """Reads a block file, checked where it is the first time."""

        def check(data: bytes) -> None:
            self._require(name, hashlib.sha256(data).hexdigest())

        new = self.verify and name not in self._verified
        block = read_block(self.root / name, self.config, level, check if new else None)
        self._verified.add(name)
        return block

    def _require(self, name: str, found: str) -> None:
        """Raises BankError where the manifest has another digest for a file.

        The manifest on disk counts too, and that of an edit which is being carried out: of an edit the blocks come
        first, then the tree, then the manifest.
        """
        if found == digest_in(self.manifest, name):
            return
        later = [file for file in (self.root / EDIT / MANIFEST, self.root / MANIFEST) if file.is_file()]
        if found not in [digest_in(BankManifest.read(file), name) for file in later]:
            raise BankError(
                f"{self.root / name} has changed: its sha256 is not the manifest's",
                "`hiermem bank verify` says what else has, `hiermem bank repair` mends it from another copy.",
            )

    def files(self) -> Iterator[tuple[str, int, str]]:
        """(name, bytes, sha256) of every file that the manifest vouches for."""
        yield TREE, self.manifest.tree.bytes, self.manifest.tree.sha256
        if self.manifest.generic:
            yield GENERIC_FILE, self.manifest.generic.bytes, self.manifest.generic.sha256
        if sources := self.manifest.sources:
            yield WINDOWS_FILE, sources.texts.bytes, sources.texts.sha256
            yield INDEX_FILE, sources.index.bytes, sources.index.sha256
        for path, entry in self.manifest.blocks.items():
            yield block_name(path), entry.bytes, entry.sha256

    def problems(self, progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
        """One line for each file that is not the manifest's; see `damaged`."""
        return (f"{name} {what}" for name, what in self.damaged(progress))

    def damaged(self, progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, str]]:
        """Checks every file's size and digest; yields (name, what is wrong) of each that differs, is missing or
        cannot be read. What is on the hub is not missing.

        `progress` is called with (bytes checked, bytes in all).
        """
        files = list(self.files())
        done, total = 0, sum(size for _, size, _ in files)
        for name, size, digest in files:
            if what := self.damage(name, size, digest):
                yield name, what
            done += size
            if progress:
                progress(done, total)

    def damage(self, name: str, size: int, digest: str) -> str:
        """What is wrong with a file; empty where it is the manifest's, or still on the hub."""
        file = self.root / name
        try:
            if not file.is_file():
                return "" if self.remote else "is missing"
            if (found := file.stat().st_size) != size:
                return f"has {found} bytes, the manifest says {size}"
            return "" if file_digest(file) == digest else "has changed: its sha256 is not the manifest's"
        except OSError as error:  # a bad sector, a drive that went away
            return f"cannot be read: {reason(error)}"


def digest_in(manifest: BankManifest, name: str) -> str:
    """The sha256 of a bank's file; empty where the manifest has no such file."""
    if name == TREE:
        return manifest.tree.sha256
    if name == GENERIC_FILE:
        return manifest.generic.sha256 if manifest.generic else ""
    if name in (WINDOWS_FILE, INDEX_FILE):
        sources = manifest.sources
        return (sources.texts if name == WINDOWS_FILE else sources.index).sha256 if sources else ""
    node = node_of(name)
    return manifest.blocks[node].sha256 if manifest.has_block(node) else ""


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
