"""A memory bank as an icicle: every block a rectangle, its area its bytes, below it the blocks of its children.

Siblings share their parent's width in proportion to the bytes of their subtrees, and a block is as tall as its
own bytes then ask for. That tiles the picture without a gap: a node of width w whose subtree has S bytes reaches
S/w down, which is the same for all siblings, whatever the tree's shape.

Only numbers and words here; `png` draws them. The web page lays the blocks out in the same way, for its own size
(`apps/server/page/layout.js`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from mlx_hiermem.apps.cli.display import console, size
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.manifest import BlockEntry
from mlx_hiermem.config import ROOT, Path

WIDTH, HEIGHT = 1200.0, 620.0
FONT = 13.0  # px
CELL = 0.58 * FONT  # px that a letter takes, on average and a little over
STEP = 1.25 * FONT  # from line to line
PAD = 5.0
NAMED_SOURCES = 8  # of each block
STATES = ("on disk", "remote", "blocked", "missing")


@dataclass(frozen=True)
class Block:
    """One rectangle, in px from the top left, and what is written in it."""

    entry: BlockEntry
    x: float
    y: float
    width: float
    height: float
    state: str
    lines: tuple[str, ...]  # as much as has room; none in a small block
    upright: bool  # the lines run from bottom to top

    @property
    def path(self) -> Path:
        return self.entry.path

    def line_place(self, number: int) -> tuple[float, float, bool]:
        """Where line `number` goes: x of its start and y of its middle; where it stands upright, its centre."""
        if self.upright:
            x = self.x + self.width / 2 + (number - (len(self.lines) - 1) / 2) * STEP
            return x, self.y + self.height / 2, True
        middle = self.height / 2 if self.height < 2 * STEP else PAD + STEP / 2 + number * STEP
        return self.x + PAD, self.y + middle, False


@dataclass(frozen=True)
class Picture:
    """`legend` has (state, blocks, bytes) of the states that occur."""

    name: str
    summary: str
    blocks: tuple[Block, ...]
    legend: tuple[tuple[str, int, int], ...]
    width: float = WIDTH
    height: float = HEIGHT


def icicle(bank: MemoryBank, name: str, depth: int = 0) -> Picture:
    """The bank's blocks down to level `depth` (0: all)."""
    rows = {path: row for path, row in bank.manifest.blocks.items() if not depth or len(path) <= depth}
    subtree: dict[Path, int] = defaultdict(int)  # bytes of a node and all below; the root has all
    children: dict[Path, list[Path]] = defaultdict(list)
    for path, row in rows.items():
        for node in (ROOT, *path.prefixes()):
            subtree[node] += row.bytes
    for node in sorted(subtree):
        if node:
            children[Path(node[:-1])].append(node)
    blocks: list[Block] = []
    left: list[tuple[Path, float, float, float]] = [(ROOT, 0.0, 0.0, WIDTH)]
    area = WIDTH * HEIGHT / max(subtree[ROOT], 1)  # px² a byte
    while left:
        node, x, y, width = left.pop()
        if entry := rows.get(node):
            height = entry.bytes * area / width
            blocks.append(_block(entry, x, y, width, height, bank.state(node)))
            y += height
        inhabited = [child for child in children[node] if subtree[child]]
        below = sum(subtree[child] for child in inhabited)
        for child in inhabited:
            share = width * subtree[child] / below
            left.append((child, x, y, share))
            x += share
    blocks.sort(key=lambda block: block.path)
    return Picture(name, _summary(bank, rows), tuple(blocks), _legend(blocks, rows))


def _block(entry: BlockEntry, x: float, y: float, width: float, height: float, state: str) -> Block:
    label = entry.label or str(entry.path)
    longest = max(map(cell_len, label.split()), default=0)
    upright = height > width < longest * CELL + 2 * PAD  # rather than break words
    lines = _fit(label, size(entry.bytes), *((height, width) if upright else (width, height)))
    return Block(entry, x, y, width, height, state, lines, upright)


def _fit(label: str, amount: str, length: float, across: float) -> tuple[str, ...]:
    """The label in as many lines as have room, cut short where it must be; below it the bytes if they fit too.

    Nothing where a line could not hold four letters.
    """
    cells = int((length - 2 * PAD) / CELL)
    room = int((across - PAD / 2) / STEP)
    if cells < 4 or room < 1:
        return ()
    lines = [line.plain.rstrip() for line in Text(label).wrap(console, cells)]
    if len(lines) > room:
        last = " ".join(lines[room - 1 :])
        lines[room - 1 :] = [set_cell_size(last, cells - 1).rstrip() + "…"]
    if len(lines) < room and cell_len(amount) <= cells:
        lines.append(amount)
    return tuple(lines)


def _summary(bank: MemoryBank, rows: dict[Path, BlockEntry]) -> str:
    levels = len({len(path) for path in rows})
    total = size(sum(row.bytes for row in rows.values()))
    return (
        f"{len(rows)} blocks on {levels} level{'s' * (levels != 1)}, {total}, for the anchor "
        f"{bank.manifest.anchor.name}. The area of a block is its bytes; below it are the blocks of its children."
    )


def _legend(blocks: list[Block], rows: dict[Path, BlockEntry]) -> tuple[tuple[str, int, int], ...]:
    found = []
    for state in STATES:
        paths = [block.path for block in blocks if block.state == state]
        if paths:
            found.append((state, len(paths), sum(rows[path].bytes for path in paths)))
    return tuple(found)


def block_row(entry: BlockEntry, state: str) -> dict[str, Any]:
    """A block as the pages take it: an entry of `/v1/memory`, and of the file of `hiermem bank show`."""
    return {
        "path": str(entry.path),
        "label": entry.label,
        "level": len(entry.path),
        "bytes": entry.bytes,
        "documents": entry.documents,
        "tokens": entry.tokens,
        "sources": list(entry.sources[:NAMED_SOURCES]),
        "more_sources": max(len(entry.sources) - NAMED_SOURCES, 0),
        "state": state,
    }
