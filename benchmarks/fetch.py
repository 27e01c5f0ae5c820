"""Fetching a path at the paper's scale, against one plain read of the same bytes, and against a flat bank.

    python benchmarks/fetch.py --folder SCRATCH          # writes 10 GB there, and removes them; some minutes

The bank has the paper's 160M shape, (256, 64, 16, 0): 4 368 blocks, 9.2 GB in bfloat16; a path is three files of
36 MB together. `preadv` reads the same three files into memory that the process has already, as MLX keeps the
memory of blocks that were let go. Warm: the files are in the page cache. Cold: they were put out of it. The flat
bank has one level of 336 units, the same bytes for every question. With `--quick` the bank has a quarter of the
units and a branching of 4.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import banks
import common

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import MemoryConfig, Path

FLAT_BLOCKS = 16  # of the flat bank; more would only be more to write


class BlockReader:
    """Plain reads into one buffer."""

    def __init__(self, root: pathlib.Path, size: int) -> None:
        self.root = root
        self.buffer = memoryview(bytearray(b"x" * size))  # written once, so that its pages are there

    def read(self, nodes: Sequence[Path]) -> int:
        """One preadv for each block, again only where it was short; returns the bytes."""
        total = 0
        for node in nodes:
            descriptor = os.open(self.root / block_name(node), os.O_RDONLY)
            size, done = os.fstat(descriptor).st_size, 0
            while done < size:
                done += os.preadv(descriptor, [self.buffer[total + done : total + size]], done)
            os.close(descriptor)
            total += size
        return total


class Bank:
    """A bank, the paths to ask it for, and which of their blocks a cache has beforehand."""

    def __init__(self, root: pathlib.Path, seed: int = 0) -> None:
        self.bank, self.random = MemoryBank.open(root), random.Random(seed)
        config = self.bank.config
        self.levels = sum(1 for units in config.block_sizes if units)
        self.next_path()

    def next_path(self) -> Path:
        """Another one; the files of its blocks are on the disk only."""
        self.path = Path(self.random.randrange(self.bank.config.branching) for _ in range(self.levels))
        return self.path

    def nodes(self, kept: int = 0) -> list[Path]:
        """The path's blocks below the levels that stay."""
        return self.path.prefixes()[kept:]

    def files(self, kept: int = 0) -> list[pathlib.Path]:
        return [self.bank.root / block_name(node) for node in self.nodes(kept)]

    def cache(self, kept: int) -> BlockCache:
        """A cache that has the path's upper levels."""
        cache = BlockCache(self.bank)
        if kept:
            cache.fetch(Path(self.path[:kept]))
        return cache


def against_preadv(subject: Bank, state: Callable[[Any], None], runs: int, kept: int = 0) -> dict[str, Any]:
    """Our fetch and the plain read of the same files, in turns."""
    reader = BlockReader(subject.bank.root, 2 * subject.bank.config.fetched_parameters + (1 << 20))
    cache = subject.cache(kept)

    def prepare() -> None:
        nonlocal cache
        subject.next_path()
        cache = subject.cache(kept)
        state(subject.files(kept))

    sides = {"preadv": lambda: reader.read(subject.nodes(kept)), "fetch": lambda: cache.fetch(subject.path)}
    result = common.compared(common.turns(sides, runs, prepare), "preadv")
    return {"bytes": reader.read(subject.nodes(kept)), "files": len(subject.nodes(kept)), **result}


def flat_against_tree(tree: Bank, flat: Bank, runs: int) -> dict[str, Any]:
    """Cold fetches: of everything, with level 1 in memory, and where all but the last level stay."""
    found = {}
    for event, kept in (("cold start", 0), ("level 1 in memory", 1), ("topic change", tree.levels - 1)):
        cache: dict[str, BlockCache] = {}

        def prepare(kept: int = kept, cache: dict[str, BlockCache] = cache) -> None:
            for name, subject, stays in (("flat", flat, 0), ("tree", tree, kept)):
                subject.next_path()
                cache[name] = subject.cache(stays)
                common.drop(subject.files(stays))

        sides = {
            "flat": lambda cache=cache: cache["flat"].fetch(flat.path),
            "tree": lambda cache=cache: cache["tree"].fetch(tree.path),
        }
        times = common.turns(sides, runs, prepare)
        sizes = {"tree_bytes": _bytes(tree, kept), "flat_bytes": _bytes(flat, 0)}
        found[event] = sizes | common.compared(times, "flat")
    return found


def _bytes(subject: Bank, kept: int) -> int:
    return sum(file.stat().st_size for file in subject.files(kept))


def shape(quick: bool) -> MemoryConfig:
    full = banks.paper_160m()
    return replace(full, branching=4, block_sizes=(64, 16, 4, 0)) if quick else full


def main() -> None:
    parser = common.options(__doc__, runs=31, quick=7)
    parser.add_argument(
        "--folder", type=pathlib.Path, help="where to write; default: the system's temporary folder"
    )
    parser.add_argument("--bank", type=pathlib.Path, help=argparse.SUPPRESS)  # one that is there already
    asked, before = common.parsed(parser), os.getloadavg()[0]
    config = shape(asked.quick)
    flat = replace(config, branching=FLAT_BLOCKS, block_sizes=(config.fetched_size,))
    size = 2 * (config.bank_parameters * (not asked.bank) + flat.bank_parameters)
    with banks.scratch(asked.folder, 1.1 * size) as folder:
        if not asked.bank:
            banks.make_bank(folder / "tree", config)
        banks.make_bank(folder / "flat", flat)
        os.sync()
        tree, flat_bank = Bank(asked.bank or folder / "tree"), Bank(folder / "flat")
        result: dict[str, Any] = {"block_sizes": config.block_sizes, "branching": config.branching}
        for name, state in (("warm", common.bring), ("cold", common.drop)):
            result[name] = against_preadv(tree, state, asked.runs)
        result["flat"] = flat_against_tree(tree, flat_bank, asked.runs)
    common.save(__file__, result, asked, before)
    show(result)


def show(result: dict[str, Any]) -> None:
    rows = []
    for name in ("warm", "cold"):
        row = result[name]
        cells = [common.around(row[side]["wall_ms"], 1) for side in ("preadv", "fetch")]
        rows.append([name, f"{row['bytes'] / 1e6:.1f} MB", *cells, common.around(row["fetch"]["wall_ratio"])])
    common.table(("path", "bytes", "preadv, ms", "fetch, ms", "ratio"), rows)
    rows = []
    for event, row in result["flat"].items():
        sizes = f"{row['tree_bytes'] / 1e6:.1f} of {row['flat_bytes'] / 1e6:.1f} MB"
        cells = [common.around(row[side]["wall_ms"], 1) for side in ("tree", "flat")]
        rows.append([event, sizes, *cells, common.around(row["tree"]["wall_ratio"])])
    print()
    common.table(("event", "read", "tree, ms", "flat, ms", "ratio"), rows)


if __name__ == "__main__":
    main()
