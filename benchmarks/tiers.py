"""The paper's hypothetical hardware (arXiv:2510.02375, Fig. 5), and its bank on the devices of `hiermem plan`.

    python benchmarks/tiers.py        nothing is measured; a second

A new topic's blocks come from memory for the levels that fit there whole, beside anchor and program, and from the
device's storage or an external disk for the others; a flat bank of the same fetch brings all of them from there.
"""

from __future__ import annotations

import json
from typing import Any

import common

from mlx_hiermem import plan
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.tiers import Stored, Tier, fetch_ms, flat_ms

# (512, 128, 32, 0) for 24 layers of 1 024, in 16 bits: the paper's 410M with 12.7B of memory (Table 1, B2).
MEMORY = MemoryConfig("ffn", 16, (512, 128, 32, 0), tuple(range(24)), 1024, "bfloat16")
ANCHOR_BYTES, KV_BYTES, CONTEXT = 2 * 411_665_408, 2 * 2 * 24 * 1024, 8192
PAPER = (Tier("memory"), Tier("flash", 0.5), Tier("external disk", 0.1), Tier("external disk", 0.1))
WHERE = ("iphone-15", ""), ("iphone-16", ""), ("macbook-air-8gb", ""), ("macbook-pro-16gb", "")
ON_DISKS = ("macbook-air-8gb", "usb-ssd"), ("macbook-air-8gb", "usb-hard-disk")


def levels() -> tuple[plan.Level, ...]:
    found = []
    for level, units in enumerate(MEMORY.block_sizes, 1):
        block, count = 2 * MEMORY.parameters(units), MEMORY.branching**level if units else 0
        found.append(plan.Level(level, count, block, block * count))
    return tuple(found)


def the_paper() -> dict[str, float]:
    stored = [Stored(level.block_bytes, level.bytes, tier) for level, tier in zip(levels(), PAPER, strict=True)]
    flat = flat_ms(stored, PAPER[1])
    return {
        "levels 1 and 2, ms": fetch_ms(stored[:2]),
        "level 3 alone, ms": fetch_ms(stored[2:]),
        "flat bank, ms": flat,
    }


def on_device(name: str, disk: str) -> dict[str, Any]:
    size = plan.ModelSize("410M", ANCHOR_BYTES, KV_BYTES, CONTEXT, levels())
    result = plan.plan(size, plan.device(name, disk), [2048])
    figures = {"levels_in_memory": result.pinned_levels, "topic_ms": result.topic_ms, "flat_ms": result.flat_ms}
    below_2 = result.fetches[2].cold_ms
    return {"device": name, "disk": disk, "fits": result.fits, **figures, "levels_1_2_stay_ms": below_2}


def main() -> None:
    result = {"paper": the_paper(), "devices": [on_device(*where) for where in (*WHERE, *ON_DISKS)]}
    common.RESULTS.mkdir(exist_ok=True)
    (common.RESULTS / "tiers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    common.table(list(result["paper"]), [[f"{value:.2f}" for value in result["paper"].values()]])
    print()
    rows = []
    for row in result["devices"]:
        times = [f"{row[key]:.1f} ms" for key in ("topic_ms", "levels_1_2_stay_ms", "flat_ms")]
        memory = str(row["levels_in_memory"]) if row["fits"] else "does not fit"
        rows.append([row["device"], row["disk"] or "its own", memory, *times])
    common.table(("device", "disk", "levels in memory", "new topic", "levels 1–2 stay", "flat bank"), rows)


if __name__ == "__main__":
    main()
