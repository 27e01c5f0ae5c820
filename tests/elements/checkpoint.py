"""The elements' bank as the memory checkpoint that a training elsewhere leaves: one to try `hiermem convert` on.

    python tests/elements/checkpoint.py elements.safetensors

The layout is that of docs/convert.md, one row of a level's tensors per cluster; the settings are in the metadata.
Converted, it gives the bank's blocks again, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import save

from mlx_hiermem.apps.demo.tour import BANK
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.files import new_file

PARTS = {"gate": "w1", "up": "w2", "down": "w3"}  # ours -> the checkpoint's


def tensors(bank: MemoryBank) -> dict[str, np.ndarray]:
    """The documented tensors of a bank of FFN memories that has a generic block: `memory.…` and `tree.…`."""
    config, found = bank.config, dict[str, np.ndarray]()
    for level, units in enumerate(config.block_sizes, 1):
        shape = (config.branching**level, len(config.layers), units, config.hidden)
        rows = {part: np.zeros(shape, config.dtype) for part in PARTS}
        for node in bank.tree.nodes(level):
            block = bank.read(node)
            for part in PARTS:
                rows[part][node.row(config.branching)] = np.array(block.values(part))
        found |= {f"memory.level{level}.{PARTS[part]}": stacked for part, stacked in rows.items()}
        found[f"tree.level{level}.centroids"] = np.array(bank.tree.centroids[level - 1])
        found[f"tree.level{level}.present"] = np.array(bank.tree.present[level - 1])
    generic = bank.read_generic()
    return found | {f"memory.generic.{name}": np.array(generic.values(part)) for part, name in PARTS.items()}


def settings(bank: MemoryBank) -> dict[str, Any]:
    """What tensors do not tell."""
    manifest, config = bank.manifest, bank.config
    entries = {str(path): entry for path, entry in manifest.blocks.items()}
    return {
        "kind": config.kind,
        "branching": config.branching,
        "block_sizes": list(config.block_sizes),
        "layers": list(config.layers),
        "anchor": {
            "name": manifest.anchor.name,
            "hidden": manifest.anchor.hidden,
            "layers": manifest.anchor.layers,
        },
        "licence": manifest.licence,
        "labels": {path: entry.label for path, entry in entries.items()},
        "documents": {path: entry.documents for path, entry in entries.items()},
        "tokens": {path: entry.tokens for path, entry in entries.items()},
        "sources": {path: list(entry.sources) for path, entry in entries.items()},
    }


def write(bank: MemoryBank, file: pathlib.Path) -> None:
    """Writes the checkpoint, whole or not at all."""
    with new_file(file) as partial:
        partial.write_bytes(
            save(tensors(bank), metadata={"config": json.dumps(settings(bank), ensure_ascii=False)})
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    write(MemoryBank.open(BANK), parser.parse_args().file)
