"""What grows with the bank: opening it, routing, fetching, and memory, from 16 leaves to 65 536.

    python benchmarks/growth.py            # 75 000 small files, 400 MB; two minutes

Trees of four levels and branching 2, 4, 8 and 16, a block for every node (30, 340, 4 680 and 69 904), so that every
fetch is four small files. Routing starts from a text's embedding, which does not depend on the bank. Opening is
compared with the bank of 340 blocks, routing and fetching with that of 16 leaves. The resident memory is what a
process took to open a bank, route and fetch.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import time
from typing import Any

import banks
import common
import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import MemoryConfig, Path

BRANCHINGS, QUICK = (2, 4, 8, 16), (2, 4, 8)
FETCHES = 50  # a turn


def shape(branching: int) -> MemoryConfig:
    return MemoryConfig("ffn", branching, (2, 2, 2, 2), (0,), 64, "bfloat16")


class Subject:
    """One bank."""

    def __init__(self, root: pathlib.Path, branching: int) -> None:
        self.root, self.branching = root, branching
        self.bank = MemoryBank.open(root)
        self.random = np.random.default_rng(0)

    def open(self) -> None:
        """What `load` does with a bank, down to the first path's rows of the table."""
        bank = MemoryBank.open(self.root)
        _ = bank.tree, bank.policy
        assert len(bank.nodes_on(Path((0, 1, 0, 1)))) == 4

    def route(self) -> None:
        for vector in self.random.standard_normal((FETCHES, banks.DIM), dtype=np.float32):
            self.bank.tree.route(vector)

    def fetch(self) -> None:
        """Each with an empty cache, the files in the page cache."""
        for row in self.random.integers(0, self.branching**4, FETCHES):
            BlockCache(self.bank).fetch(Path.of_row(int(row), 4, self.branching))


def memory(root: pathlib.Path, branching: int) -> None:
    """Of a process: resident bytes before and after a bank is used; printed."""
    start, seconds = _resident(), time.perf_counter()
    subject = Subject(root, branching)
    subject.open()
    seconds = time.perf_counter() - seconds
    subject.route()
    subject.fetch()
    print(f'{{"resident_mb": {(_resident() - start) / 1e6}, "first_open_ms": {1e3 * seconds}}}')


def _resident() -> int:
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("RssAnon:")[1].split()[0]) << 10  # without pages of mapped files
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(subjects: dict[int, Subject], runs: int) -> list[dict[str, Any]]:
    times = {}
    for what, against in (("open", "4"), ("route", "2"), ("fetch", "2")):
        sides = {str(branching): getattr(subject, what) for branching, subject in subjects.items()}
        times[what] = common.compared(common.turns(sides, runs), against)
    rows = []
    for branching, subject in subjects.items():
        rows.append(
            {
                "leaves": branching**4,
                "blocks": len(subject.bank.manifest.blocks),
                "manifest_bytes": (subject.root / "bank.json").stat().st_size,
                **{what: times[what][str(branching)] for what in times},
                "process": common.child(__file__, "--child", str(subject.root), str(branching)),
            }
        )
    return rows


def main() -> None:
    parser = common.options(__doc__, runs=21, quick=5)
    parser.add_argument("--folder", type=pathlib.Path, help="where to write; default: a temporary folder")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked, before = common.parsed(parser), os.getloadavg()[0]
    if asked.child:
        return memory(pathlib.Path(asked.child[0]), int(asked.child[1]))
    subjects = {}
    with banks.scratch(asked.folder, 1e9) as folder:
        for branching in QUICK if asked.quick else BRANCHINGS:
            banks.make_bank(folder / str(branching), shape(branching))
            subjects[branching] = Subject(folder / str(branching), branching)
        rows = measure(subjects, asked.runs)
    common.save(__file__, {"fetches": FETCHES, "rows": rows}, asked, before)
    cells = []
    for row in rows:
        each = [f"{row[what]['wall_ms']['median'] / FETCHES:.3f}" for what in ("route", "fetch")]
        ratios = [common.around(row[what]["wall_ratio"]) for what in ("open", "route", "fetch")]
        opened = f"{row['open']['wall_ms']['median']:.2f}"
        cells.append([str(row["leaves"]), str(row["blocks"]), opened, *each, *ratios])
        cells[-1].append(f"{row['process']['resident_mb']:.1f}")
    header = ["leaves", "blocks", "open, ms", "route, ms", "fetch, ms", "open ×", "route ×", "fetch ×", "MB"]
    common.table(header, cells)


if __name__ == "__main__":
    main()
