"""A memory's design for one anchor: which layers carry it, and widths that fit that anchor."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.memory.ffn import feed_forward, projections
from mlx_hiermem.memory.lora import projection
from mlx_hiermem.memory.slot import sizes

PLACEMENTS = ("uniform", "early", "middle", "late")
UNITS = 330  # of a block in all layers together, where none are asked for: 11 in each of 30


def memory_layers(placement: str | Sequence[int], layers: int) -> tuple[int, ...]:
    """Indices of the layers that carry memory in an anchor of this depth: all, or the first, middle or last third.

    The paper's ten layers of 35 are such a third. Early and middle do badly there (Table 9 of arXiv:2510.02375). So
    they do here, where all layers learn more than the last from the same texts (docs/replication.md, rows 4, 4a).
    """
    if not isinstance(placement, str):
        return tuple(placement)
    third = max(1, round(layers / 3))
    first = {"uniform": 0, "early": 0, "middle": (layers - third) // 2, "late": layers - third}
    if placement not in first:
        raise HierMemError(
            f"placement '{placement}' is not known", f"Use {', '.join(PLACEMENTS)}, or layer indices."
        )
    return tuple(range(first[placement], layers if placement == "uniform" else first[placement] + third))


def default_size(placement: str | Sequence[int], layers: int) -> int:
    """Units of a block in one layer, so that a memory in few layers is as large as one in many."""
    return max(1, round(UNITS / max(1, len(memory_layers(placement, layers)))))


def memory_config(
    model: nn.Module,
    kind: str,
    branching: int,
    block_sizes: Sequence[int],
    placement: str | Sequence[int] = "uniform",
    dtype: str = "float16",
) -> MemoryConfig:
    """A memory for this mlx-lm model, its widths read from the model.

    Raises AnchorError where the architecture has no such projections.
    """
    layers = memory_layers(placement, len(model.layers))
    layer = model.layers[layers[0] if 0 <= layers[0] < len(model.layers) else 0]
    gate = sizes(projections(feed_forward(layer))[0])
    widths = [0, 0]  # an FFN memory needs none of these, and not every layer has attention projections of its own
    if kind != "ffn":
        widths = [sizes(projection(layer, name))[1] for name in ("q", "k")]
    return MemoryConfig(
        kind,
        branching,
        tuple(block_sizes),
        layers,
        hidden=gate[0],
        dtype=dtype,
        ffn_width=gate[1],
        q_width=widths[0],
        kv_width=widths[1],
    )
