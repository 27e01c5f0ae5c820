"""Loss and gradients of one group of texts under one memory, on a frozen anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hiermem.bank.block import FetchedMemory, MemoryBlock
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.cpu.compiling import compiled
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

    def gradients(self, blocks: Sequence[Tensors], inputs: Inputs, scale: float) -> tuple[float, list[Tensors]]:
        """The loss summed over what is learnt, and each block's gradients of `scale` times it."""
        value, gradients = self._gradients(list(blocks), inputs.arrays, mx.array(scale))
        self.attachment.clear()
        mx.eval(value, gradients)
        return float(value), gradients

    def _compute_gradients(
        self, blocks: list[Tensors], arrays: Tensors, scale: mx.array
    ) -> tuple[mx.array, list[Tensors]]:
        """(summed loss, gradients of the blocks); nothing is evaluated."""

        def loss(blocks: list[Tensors]) -> tuple[mx.array, mx.array]:
            total = self._losses(blocks, arrays).sum()
            return total * scale, total

        (_, total), gradients = mx.value_and_grad(loss)(blocks)
        return total, gradients

    def losses(self, blocks: Sequence[Tensors], inputs: Inputs) -> np.ndarray:
        """[M] loss of each learnt token under these blocks (none: without memory); 0 where the batch fills up."""
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
