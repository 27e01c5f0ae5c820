"""Changing to another path whose blocks are cached: joining, casting and attaching, against copying the same bytes.

    python benchmarks/swap.py        # SmolLM2-135M, R = 336 in 30 layers: 35 MB a path, 70 MB in float32; a minute

The limit is one plain copy of the attached bytes, on one core, between buffers that are there already. On a CPU the
anchor runs in float32, to which the memory is cast; where anchor and bank have one dtype, it is only joined. The
last row is what runs on a GPU: both in bfloat16.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import banks
import common
import mlx.core as mx
import numpy as np

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.model import MemoryModel

SIDES = {  # dtypes of bank and anchor
    "float16 to float32": ("float16", mx.float32),
    "bfloat16 to float32": ("bfloat16", mx.float32),
    "float32": ("float32", mx.float32),
    "bfloat16": ("bfloat16", mx.bfloat16),
}
PATHS = ("0.1.2", "3.2.1", "1.1.1", "2.0.3")  # no two share a block


def measure(model: MemoryModel, runs: int) -> dict[str, Any]:
    for path in PATHS:
        model.select(path, "")
    attached = model.attachment.carriers[0][0][1].tensors[0].itemsize * model.bank.config.fetched_parameters
    source, target = np.ones(attached, np.uint8), np.ones(attached, np.uint8)
    turn = 0

    def swap() -> None:
        nonlocal turn
        turn += 1
        model.select(PATHS[turn % len(PATHS)], "")

    times = common.turns({"copy": lambda: np.copyto(target, source), "swap": swap}, runs)
    return {
        "attached": attached,
        **common.compared(times, "copy"),
    }


def main() -> None:
    parser = common.options(__doc__, runs=51, quick=7)
    parser.add_argument("--folder", type=pathlib.Path, help="where to write; default: a temporary folder")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    found = {}
    for name, (dtype, of_anchor) in list(SIDES.items())[:: 3 if asked.quick else 1]:
        with banks.scratch(asked.folder, 1e9) as folder:
            made = banks.demo_anchor(folder / "model", dtype=dtype)
            anchor = load_anchor(made / "anchor", of_anchor)
            found[name] = measure(MemoryModel(*anchor, MemoryBank.open(made / "bank")), asked.runs)
    common.save(__file__, found, asked, before)
    rows = []
    for name, row in found.items():
        keys = (("copy", "wall_ms"), ("swap", "wall_ms"), ("swap", "wall_ratio"), ("swap", "cpu_ms"))
        rows.append([name, *(common.around(row[side][key], 1) for side, key in keys)])
    common.table(("bank to anchor", "copy, ms", "swap, ms", "ratio", "CPU, ms"), rows)


if __name__ == "__main__":
    main()
