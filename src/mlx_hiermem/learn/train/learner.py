"""Loss and gradients of one group of texts under one memory, on an anchor that stands still or learns too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_hiermem.bank.block import FetchedMemory, MemoryBlock
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.cpu.compiling import compiled
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.learn.train.gating import quicken
from mlx_hiermem.learn.train.loss import divergence, next_token
from mlx_hiermem.learn.train.packing import Batch
from mlx_hiermem.memory.attach import attach
from mlx_hiermem.partial import Anchor


@dataclass(frozen=True)
class Inputs:
    """A batch as the anchor takes it. Without `states` the whole model runs."""

    batch: Batch
    states: mx.array | None = None  # [B, T, d]: what enters the first memory layer
    teacher: mx.array | None = None  # [M, d]: what leaves the teacher's last layer where something is learnt
    taught: mx.array | None = None  # bool [M]: where there is a teacher; elsewhere the next token is learnt

    @property
    def arrays(self) -> Tensors:
        """All of it by name, as compiled functions take it."""
        batch, found = self.batch, {"states": self.states, "teacher": self.teacher, "taught": self.taught}
        found |= {name: mx.array(getattr(batch, name)) for name in ("tokens", "positions", "targets", "weights")}
        if batch.packed:
            found["documents"] = mx.array(batch.documents)
        return {name: value for name, value in found.items() if value is not None}


class Learner:
    """An anchor with a place for memories. Not for several threads: a memory is attached while it computes."""

    def __init__(self, model: nn.Module, config: MemoryConfig, vocabulary: int | None = None) -> None:
        """Raises AnchorError where the architecture cannot carry this memory, or cannot be run by parts."""
        self.config, self.anchor = config, Anchor(model, vocabulary)
        self.anchor.check()
        quicken(self.anchor.layers)
        self.attachment = attach(model, config)
        self.first_layer = min(config.layers)
        self._gradients = compiled(self._compute_gradients)

    def gradients(
        self, blocks: Sequence[Tensors], inputs: Inputs, scale: float, anchor: Tensors | None = None
    ) -> tuple[float, list[Tensors], Tensors]:
        """The loss summed over what is learnt, and the gradients of `scale` times it: of each block, of the anchor.

        `anchor` are the parameters (by their names) that learn too; none are where it stands still.
        """
        value, of_blocks, of_anchor = self._gradients(list(blocks), anchor or {}, inputs.arrays, mx.array(scale))
        self.attachment.clear()
        if anchor:
            self.anchor.model.update(tree_unflatten(list(anchor.items())))  # in place of what was traced
        mx.eval(value, of_blocks, of_anchor)
        return float(value), of_blocks, of_anchor

    def _compute_gradients(
        self, blocks: list[Tensors], anchor: Tensors, arrays: Tensors, scale: mx.array
    ) -> tuple[mx.array, list[Tensors], Tensors]:
        """(summed loss, gradients of the blocks, of the anchor); nothing is evaluated."""

        def loss(blocks: list[Tensors], own: Tensors) -> tuple[mx.array, mx.array]:
            if own:
                self.anchor.model.update(tree_unflatten(list(own.items())))
            total = self._losses(blocks, arrays).sum()
            return total * scale, total

        compute = mx.value_and_grad(loss, argnums=(0, 1) if anchor else 0)
        (_, total), found = compute(blocks, anchor)
        return (total, *found) if anchor else (total, found, {})

    def losses(self, blocks: Sequence[Tensors], inputs: Inputs, anchor: Tensors | None = None) -> np.ndarray:
        """[M] loss of each learnt token under these blocks (none: without memory); 0 where the batch fills up."""
        if anchor:
            self.anchor.model.update(tree_unflatten(list(anchor.items())))
        values = self._losses(blocks, inputs.arrays)
        self.attachment.clear()
        return np.array(values)

    def _losses(self, blocks: Sequence[Tensors], arrays: Tensors) -> mx.array:
        if blocks:
            joined = [MemoryBlock(dict(block), 0) for block in blocks]
            self.attachment.fill(FetchedMemory.join(self.config, joined))
        else:
            self.attachment.clear()
        states = arrays.get("states")
        layer = self.first_layer if states is not None else 0
        logits = self.anchor.logits(arrays["tokens"], arrays["positions"], arrays.get("documents"), layer, states)
        values = next_token(logits, arrays["targets"])
        if "teacher" in arrays:
            taught = divergence(logits, self.anchor.head(arrays["teacher"]))
            values = mx.where(arrays["taught"], taught, values)
        return values * arrays["weights"]

    def trainable(self) -> Tensors:
        """The anchor's parameters by name, for co-training. Raises AnchorError where they are quantised."""
        parameters: dict[str, Any] = dict(tree_flatten(self.anchor.model.parameters()))
        if whole := [name for name, value in parameters.items() if not mx.issubdtype(value.dtype, mx.floating)]:
            raise AnchorError(f"the anchor is quantised ({whole[0]})", "Co-train one that is not.")
        return {name: value.astype(mx.float32) for name, value in parameters.items()}
