"""The tiers: the paper's figures from its inputs, and placing levels."""

from __future__ import annotations

import pytest

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.tiers import Stored, Tier, fetch_ms, flat_ms, place

# What reproduces Fig. 5; see docs/decisions/2026-11-21-papers-hypothetical-hardware.md for how it was found.
MEMORY = Tier("memory")
FLASH = Tier("flash", 0.5)
EXTERNAL = Tier("external disk", 0.1)


def paper_levels() -> list[tuple[float, float]]:
    """The 410M anchor's (512, 128, 32, 0) in 16 bits (arXiv:2510.02375, Table 1, B2): bytes of a block, of all."""
    memory = MemoryConfig("ffn", 16, (512, 128, 32, 0), tuple(range(24)), 1024, "bfloat16")
    assert memory.fetched_parameters == 49_545_216
    assert memory.bank_parameters == 12_683_575_296  # 12.7B
    blocks = [2 * memory.parameters(units) for units in memory.block_sizes]
    return [(block, block * 16**level) for level, block in enumerate(blocks, 1)]


def test_the_papers_four_figures() -> None:
    levels = [
        Stored(*sizes, tier)
        for sizes, tier in zip(paper_levels(), (MEMORY, FLASH, EXTERNAL, EXTERNAL), strict=True)
    ]
    cold, change = fetch_ms(levels[:2]), fetch_ms(levels[2:])
    flat = flat_ms(levels, FLASH)
    assert (round(cold), round(change), round(flat)) == (38, 47, 198)
    assert (cold, change, flat) == pytest.approx((37.748736, 47.18592, 198.180864))


def test_tiers_are_read_in_turn_or_together() -> None:
    levels = [
        Stored(8e6, 0, Tier("a", 8)),
        Stored(4e6, 0, Tier("b", 1, file_ms=0.5)),
        Stored(0, 0, Tier("c", 1e-9)),
    ]
    assert fetch_ms(levels) == pytest.approx(1 + 4.5)
    assert fetch_ms(levels, together=True) == pytest.approx(4.5)
    assert fetch_ms([]) == 0
    same = [Stored(4e6, 0, FLASH), Stored(4e6, 0, FLASH)]
    assert fetch_ms(same, together=True) == fetch_ms(same) == pytest.approx(16)  # one tier is one line


def test_levels_go_down_the_tiers() -> None:
    small, large = Tier("small", room=10), Tier("large", room=100)
    placed = place([(1, 4), (1, 6), (1, 90), (1, 11), (1, 1)], (small, large, Tier("rest")))
    assert [level.tier.name for level in placed] == ["small", "small", "large", "rest", "rest"]
    assert [level.tier.name for level in place([(1, 1000)], (small,))] == ["small"]  # there is no other
    paper = place(paper_levels(), (Tier("memory", room=3e9), Tier("flash", 0.5, room=6e9), EXTERNAL))
    assert [level.tier.name for level in paper] == ["memory", "flash", "external disk", "external disk"]
