"""What decides how a bank is trained, and the memory designs that one may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.memory.lora import projection
from mlx_hiermem.memory.slot import sizes

PLACEMENTS = ("uniform", "early", "middle", "late")
FINEST, COARSER = 8, 3  # units of a block at the finest level, and times more at each level above
ENOUGH, FEWEST, MOST = 100_000, 3, 16  # tokens learnt by a subtree, over all epochs; epochs, where they are chosen
ATTENTION, OBJECTIVES = ("document", "row"), ("next-token", "distillation")


@dataclass(frozen=True)
class TrainingSettings:
    """All but `states_bytes` enters the fingerprint of a run: an interrupted one goes on with the same only.

    A step is `groups` groups of texts, about `group_tokens` tokens each; a group is of one leaf, so its texts share
    one memory. The optimiser is the paper's (arXiv:2510.02375, App. A.2), at a higher rate: a leaf sees thousands
    of tokens here and millions there. Rates and the warm-up are shares of a subtree's training.
    """

    epochs: int = 4
    groups: int = 1  # many small steps: with 4, elements took half as many epochs more (docs/learning.md)
    group_tokens: int = 256
    rate: float = 6e-3
    final_rate: float = 0.05  # of `rate`
    warm_up: float = 0.04
    weight_decay: float = 1e-3
    clip: float = 1.0
    objective: str = "next-token"  # or distillation, for the examples that have a teacher
    attention: str = "document"  # or `row`: texts are joined to rows, and see those before them
    row_tokens: int = 512  # with attention `row`
    generic: bool = True  # the control block, in a share 1 / (k + 1) of the groups
    cotrain: bool = False  # the anchor learns too (Table 1, row A2)
    anchor_rate: float = 1e-4
    anchor_weight_decay: float = 0.1
    seed: int = 0
    blocks_bytes: int = 2 << 30  # of blocks and their optimiser states in memory; the rest is on disk
    states_bytes: int = 20 << 30  # of hidden states on disk, for the subtree in training

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                raise HierMemError(f"{name} '{getattr(self, name)}' is not known", f"Use {' or '.join(known)}.")
        if self.cotrain and self.objective == "distillation":
            raise HierMemError("distillation needs an anchor that stands still", "Leave out --cotrain.")
        positive = ("epochs", "groups", "group_tokens", "rate", "clip", "row_tokens", "blocks_bytes")
        if wrong := [name for name in positive if getattr(self, name) <= 0]:
            raise HierMemError(f"{wrong[0]} must be more than 0")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def epochs_for(tokens: int) -> int:
    """How often a subtree of so many tokens is learnt, so that it learns about `ENOUGH`."""
    return min(max(round(ENOUGH / max(tokens, 1)), FEWEST), MOST)


def memory_layers(placement: str | Sequence[int], layers: int) -> tuple[int, ...]:
    """Indices of the layers that carry memory in an anchor of so many: all, or the first, middle or last third.

    The paper's ten layers of 35 are such a third; early and middle work poorly there (arXiv:2510.02375, Table 9).
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


def memory_config(
    model: nn.Module,
    kind: str,
    branching: int,
    block_sizes: Sequence[int],
    placement: str | Sequence[int] = "late",
    dtype: str = "float16",
) -> MemoryConfig:
    """A memory for this mlx-lm model, its widths read from the model.

    Raises AnchorError where the architecture has no such projections.
    """
    layers = memory_layers(placement, len(model.layers))
    layer = model.layers[layers[0] if 0 <= layers[0] < len(model.layers) else 0]
    gate, query, key = (sizes(projection(layer, name)) for name in ("gate", "q", "k"))
    return MemoryConfig(
        kind,
        branching,
        tuple(block_sizes),
        layers,
        hidden=gate[0],
        dtype=dtype,
        ffn_width=gate[1],
        q_width=query[1],
        kv_width=key[1],
    )


@dataclass(frozen=True)
class MemorySettings:
    """The memory's design. Without `sizes`, a level's blocks are `COARSER` times those of the level below."""

    kind: str = "ffn"
    sizes: tuple[int, ...] = ()
    placement: str | tuple[int, ...] = "late"
    dtype: str = "float16"

    def of(self, model: nn.Module, branching: int, depth: int) -> MemoryConfig:
        """For a tree of this shape. A small corpus may have grown fewer levels than there are sizes."""
        sizes = self.sizes[:depth] or tuple(FINEST * COARSER ** (depth - level) for level in range(1, depth + 1))
        sizes += (0,) * (depth - len(sizes))
        return memory_config(model, self.kind, branching, sizes, self.placement, self.dtype)
