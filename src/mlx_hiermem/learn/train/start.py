"""What a block begins with: nothing that changes the anchor, and units that are of use to it at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.memory.ffn import feed_forward, projections
from mlx_hiermem.memory.slot import rows


def new_block(config: MemoryConfig, node: Path, seed: int, layers: Sequence[nn.Module] = ()) -> Tensors:
    """A block [L, r, width] without effect on the anchor (arXiv:2510.02375, §2.2), the same whenever it is made.

    One factor is zero; the others are truncated normal at 3 standard deviations of 1 / sqrt(width), LoRA's A is
    Kaiming uniform (a = sqrt 5). With the anchor's `layers`, an FFN memory's units read what units of the anchor
    read, and learn faster (docs/decisions/2026-11-30-blocks-begin-with-the-anchors-units.md). The empty path is the
    generic block, of the fetched size.
    """
    units = config.block_sizes[len(node) - 1] if node else config.fetched_size
    zero = {"ffn": ("down",), "kv": ("v",)}.get(config.kind, ())
    key = mx.random.key(int.from_bytes(hashlib.sha256(f"{seed} {node}".encode()).digest()[:8], "little"))
    block = {}
    for name, shape in config.shapes(units).items():
        key, now = mx.random.split(key)
        std = shape[-1] ** -0.5
        if name in zero or name.endswith(".b"):
            block[name] = mx.zeros(shape)
        elif name.endswith(".a"):
            block[name] = mx.random.uniform(-std, std, shape, key=now)
        else:
            block[name] = mx.random.truncated_normal(-3.0, 3.0, shape, key=now) * std
    if config.kind == "ffn" and layers:
        _take_units(block, config, layers, key)
    mx.eval(block)
    return block


def _take_units(block: Tensors, config: MemoryConfig, layers: Sequence[nn.Module], key: mx.array) -> None:
    """Puts rows of the anchor's gate and up projections, of units drawn at random, into a block [L, r, d].

    A block with more units than the anchor has keeps the rest: twice the same unit would learn the same.
    """
    for at, (layer, now) in enumerate(zip(config.layers, mx.random.split(key, len(config.layers)), strict=True)):
        gate, up, _ = projections(feed_forward(layers[layer]))
        chosen = mx.random.permutation(config.ffn_width, key=now)[: block["gate"].shape[1]]  # [n]
        block["gate"][at, : len(chosen)] = rows(gate, chosen)  # [n, d]
        block["up"][at, : len(chosen)] = rows(up, chosen)
