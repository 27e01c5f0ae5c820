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
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.learn.blocks import Tensors
from mlx_hiermem.learn.forward import Anchor
from mlx_hiermem.learn.loss import divergence, next_token
from mlx_hiermem.learn.packing import Batch
from mlx_hiermem.memory.attach import attach


@dataclass(frozen=True)
class Inputs:
    """A batch as the anchor takes it. Without `states` the whole model runs."""

    batch: Batch
    states: mx.array | None = None  # [B, T, d]: what enters the first memory layer
    teacher: mx.array | None = None  # [M, d]: what leaves the teacher's last layer where something is learnt
    taught: mx.array | None = None  # bool [M]: where there is a teacher; elsewhere the next token is learnt


class Learner:
    """An anchor with a place for memories. Not for several threads: a memory is attached while it computes."""

    def __init__(self, model: nn.Module, config: MemoryConfig, vocabulary: int | None = None) -> None:
        """Raises AnchorError where the architecture cannot carry this memory, or cannot be run by parts."""
        self.config, self.anchor = config, Anchor(model, vocabulary)
        self.anchor.check()
        self.attachment = attach(model, config)
        self.first_layer = min(config.layers)

    def gradients(
        self, blocks: Sequence[Tensors], inputs: Inputs, scale: float, anchor: Tensors | None = None
    ) -> tuple[float, list[Tensors], Tensors]:
        """The loss summed over what is learnt, and the gradients of `scale` times it: of each block, of the anchor.

        `anchor` are the parameters (by their names) that learn too; none are where it stands still.
        """

        def loss(blocks: list[Tensors], own: Tensors) -> mx.array:
            if own:
                self.anchor.model.update(tree_unflatten(list(own.items())))
            return self._losses(blocks, inputs).sum() * scale

        compute = mx.value_and_grad(loss, argnums=(0, 1) if anchor else 0)
        value, found = compute(list(blocks), anchor or {})
        self.attachment.clear()
        if anchor:
            self.anchor.model.update(tree_unflatten(list(anchor.items())))  # in place of what was traced
        of_blocks, of_anchor = found if anchor else (found, {})
        mx.eval(value, of_blocks, of_anchor)
        return float(value) / scale, of_blocks, of_anchor

    def losses(self, blocks: Sequence[Tensors], inputs: Inputs) -> np.ndarray:
        """[M] loss of each learnt token under these blocks (none: without memory); 0 where the batch fills up."""
        values = self._losses(blocks, inputs)
        self.attachment.clear()
        return np.array(values)

    def _losses(self, blocks: Sequence[Tensors], inputs: Inputs) -> mx.array:
        batch, states = inputs.batch, inputs.states
        if blocks:
            joined = [MemoryBlock(dict(block), 0) for block in blocks]
            self.attachment.fill(FetchedMemory.join(self.config, joined))
        else:
            self.attachment.clear()
        documents = mx.array(batch.documents) if batch.packed else None
        layer = self.first_layer if states is not None else 0
        logits = self.anchor.logits(mx.array(batch.tokens), mx.array(batch.positions), documents, layer, states)
        values = next_token(logits, mx.array(batch.targets))
        if inputs.teacher is not None and inputs.taught is not None:
            taught = divergence(logits, self.anchor.head(inputs.teacher))
            values = mx.where(inputs.taught, taught, values)
        return values * mx.array(batch.weights)

    def trainable(self) -> Tensors:
        """The anchor's parameters by name, for co-training. Raises AnchorError where they are quantised."""
        parameters: dict[str, Any] = dict(tree_flatten(self.anchor.model.parameters()))
        if whole := [name for name, value in parameters.items() if not mx.issubdtype(value.dtype, mx.floating)]:
            raise AnchorError(f"the anchor is quantised ({whole[0]})", "Co-train one that is not.")
        return {name: value.astype(mx.float32) for name, value in parameters.items()}
