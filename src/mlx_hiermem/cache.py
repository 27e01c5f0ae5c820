"""The block cache: blocks that were read stay in memory up to a byte budget, least recently used out first.

Blocks of the pinned levels (level 1: few, and part of every path) leave only when nothing else is left to
evict. A block is read from disk when a path first needs it and never before. Whoever knows a path early can have
its files read ahead (`prefetch`), into the system's page cache, where no array has to be made on another thread.
Where the bank's drive is gone, paths go on with the blocks that are here.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import FetchedMemory, MemoryBlock, block_name
from mlx_hiermem.config import GENERIC_NODE, Path
from mlx_hiermem.errors import BankError


@dataclass
class CacheStats:
    """Since the cache was made."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    remote_fetches: int = 0  # blocks that had to come from the hub first
    remote_bytes: int = 0


@dataclass(frozen=True)
class Fetch:
    """A path's memory, and what getting it took. `memory` is None where no node on the path has a block."""

    memory: FetchedMemory | None
    nodes: tuple[Path, ...] = ()
    bytes_read: int = 0  # from disk, by this fetch
    hits: int = 0

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks' names: equal names mean equal weights."""
        return tuple(str(node) or "generic" for node in self.nodes)


@dataclass
class BlockCache:
    bank: MemoryBank
    budget: int = 512 << 20  # bytes
    pinned_levels: frozenset[int] = frozenset({1})
    stats: CacheStats = field(default_factory=CacheStats)

    def __post_init__(self) -> None:
        self._blocks: OrderedDict[Path, MemoryBlock] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")  # started when it is first needed
        self.bytes = 0  # of all cached blocks
        self.away = False  # the bank cannot be reached: what was asked for last could not all be read

    @property
    def blocks(self) -> int:
        """How many blocks are cached."""
        return len(self._blocks)

    def __contains__(self, node: Path) -> bool:
        return node in self._blocks

    def take_over(self, old: BlockCache) -> None:
        """After an edit of the bank: the old cache, but for blocks that are changed, gone or closed now."""
        for node, block in old._blocks.items():
            mine, theirs = self.bank.digest(node), old.bank.digest(node)
            if mine and mine == theirs and not self.bank.policy.blocker(node):
                self._blocks[node] = block
                self.bytes += block.nbytes

    def fetch(self, path: Path) -> Fetch:
        """Joins the blocks of a path, reading those that are not cached.

        Raises BankError where one cannot be read; but where the whole bank cannot be reached, it is left out.
        """
        return self._fetch(tuple(self.bank.nodes_on(path)))

    def fetch_generic(self) -> Fetch:
        """The control block, through the same cache."""
        return self._fetch((GENERIC_NODE,))

    def prefetch(self, path: Path) -> Future[None] | None:
        """Has the files of a path's blocks read ahead on a thread; None where all are here, or on the hub."""
        nodes = [node for node in self.bank.nodes_on(path) if node not in self]
        files = [file for file in (self.bank.root / block_name(node) for node in nodes) if os.path.isfile(file)]
        return self._reader.submit(read_ahead, files) if files else None

    def _fetch(self, nodes: tuple[Path, ...]) -> Fetch:
        with self._lock:
            before = (self.stats.bytes_read, self.stats.hits)
            found = {node: block for node in nodes if (block := self._try(node)) is not None}
            nodes, blocks = tuple(found), list(found.values())
            self._evict(keep=nodes)
            bytes_read, hits = self.stats.bytes_read - before[0], self.stats.hits - before[1]
        memory = FetchedMemory.join(self.bank.config, blocks) if blocks else None
        return Fetch(memory, nodes, bytes_read, hits)

    def _try(self, node: Path) -> MemoryBlock | None:
        try:
            return self._get(node)
        except BankError:
            if not self.bank.is_away:
                raise
            self.away = True
            return None

    def _get(self, node: Path) -> MemoryBlock:
        if node in self._blocks:
            self.stats.hits += 1
            self._blocks.move_to_end(node)
            return self._blocks[node]
        block = self.bank.read(node) if node != GENERIC_NODE else self.bank.read_generic()
        self.stats.misses += 1
        self.stats.bytes_read += block.nbytes
        if remote := self.bank.remote:
            self.stats.remote_fetches, self.stats.remote_bytes = remote.fetches, remote.bytes
        self._blocks[node] = block
        self.bytes += block.nbytes
        return block

    def _evict(self, keep: Iterable[Path]) -> None:
        if self.bytes <= self.budget:
            return
        kept = set(keep)
        candidates = [node for node in self._blocks if node not in kept]
        candidates.sort(key=lambda node: len(node) in self.pinned_levels)  # stable: LRU order, pinned last
        for node in candidates:
            if self.bytes <= self.budget:
                return
            self.bytes -= self._blocks.pop(node).nbytes
            self.stats.evictions += 1


def read_ahead(files: Iterable[pathlib.Path]) -> None:
    """Reads files into the page cache. One that cannot be read is left to whoever needs it."""
    buffer = bytearray(1 << 20)
    for file in files:
        with contextlib.suppress(OSError), file.open("rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):  # the disk may go on while we copy
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            while stream.readinto(buffer):
                pass
