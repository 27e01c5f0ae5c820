"""How long a path takes to arrive when its levels lie on different tiers: arithmetic with stated speeds.

Coarse levels are few and asked for by every question, so they lie in memory; fine ones are many, and lie on flash
or on a disk. A flat bank of the same fetch brings every block from one tier (arXiv:2510.02375, Fig. 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tier:
    """`speed` in GB/s, infinite where blocks are used as they lie; `file_ms` before each file; `room` in bytes."""

    name: str
    speed: float = math.inf
    file_ms: float = 0.0
    room: float = math.inf

    def milliseconds(self, size: float, files: int = 1) -> float:
        """Of reading so many bytes in so many files."""
        return files * self.file_ms + size / (self.speed * 1e6) if files else 0.0


@dataclass(frozen=True)
class Stored:
    """One level of a bank: the bytes of a block, those of all its blocks, and where they lie."""

    block: float
    total: float
    tier: Tier


def place(levels: Sequence[tuple[float, float]], tiers: Sequence[Tier]) -> tuple[Stored, ...]:
    """Puts levels (bytes of a block, of all), coarse first, on tiers, fast first.

    Each level lies whole, on the tier of the one before or below. What fits on no other goes to the last one.
    """
    placed, at, left = [], 0, tiers[0].room
    for block, total in levels:
        while total > left and at < len(tiers) - 1:
            at += 1
            left = tiers[at].room
        left -= total
        placed.append(Stored(block, total, tiers[at]))
    return tuple(placed)


def fetch_ms(levels: Sequence[Stored], together: bool = False) -> float:
    """Of bringing one block of each of these levels: tier after tier, or all tiers together."""
    times: dict[Tier, float] = {}
    for level in levels:
        if level.block:
            times[level.tier] = times.get(level.tier, 0.0) + level.tier.milliseconds(level.block)
    return max(times.values(), default=0.0) if together else sum(times.values())


def flat_ms(levels: Sequence[Stored], tier: Tier) -> float:
    """Of bringing the same bytes as one block of a flat bank."""
    return tier.milliseconds(sum(level.block for level in levels))
