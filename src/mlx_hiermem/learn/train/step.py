"""One training step: the loss of a group of texts under one memory, its gradients, and AdamW on the fetched blocks.

The anchor is frozen. Losses are computed in float32: next-token cross-entropy, or the divergence from a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm

from mlx_hiermem.bank.block import FetchedMemory, MemoryBlock
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.batches import Batch
from mlx_hiermem.learn.train.blocks import Tensors, TrainedBlock
from mlx_hiermem.memory.attach import attach
from mlx_hiermem.partial import PartialAnchor

BETAS = (0.9, 0.95)  # of AdamW (App. A.2)


@dataclass(frozen=True)
class Inputs:
    """A batch as the anchor takes it. Without `states` the whole model runs."""

    batch: Batch
    states: mx.array | None = None  # [B, T, d]: what enters the first memory layer
    begun: mx.array | None = None  # [1, P, d]: the same of the batch's beginning
    teacher: mx.array | None = None  # [M, d]: what leaves the teacher's last layer where something is learnt
    taught: mx.array | None = None  # bool [M]: where there is a teacher; elsewhere the next token is learnt

    @property
    def arrays(self) -> Tensors:
        """All of it by name, as compiled functions take it."""
        batch = self.batch
        found = {"states": self.states, "begun": self.begun, "teacher": self.teacher, "taught": self.taught}
        found |= {name: mx.array(getattr(batch, name)) for name in ("tokens", "positions", "targets", "weights")}
        if batch.packed:
            found["documents"] = mx.array(batch.documents)
        if len(batch.beginning):
            found["beginning"] = mx.array(batch.beginning[None])
        return {name: value for name, value in found.items() if value is not None}


class MemoryLoss:
    """Loss and gradients of blocks on a frozen anchor. Not for several threads: a memory is attached meanwhile."""

    def __init__(self, model: nn.Module, config: MemoryConfig, vocabulary: int | None = None) -> None:
        """Raises AnchorError where the architecture cannot carry this memory, or cannot be run by parts."""
        self.config, self.anchor = config, PartialAnchor(model, vocabulary)
        self.anchor.check()
        self.attachment = attach(model, config)
        self.first_layer = min(config.layers)
        self._gradients = _compiled(self._compute_gradients)

    def gradients(
        self, blocks: Sequence[Tensors], inputs: Inputs, scale: float
    ) -> tuple[np.ndarray, np.ndarray, list[Tensors]]:
        """What is learnt: each token's loss [M] and whether it was the likeliest [M]; and each block's gradients of
        `scale` times the losses' sum."""
        values, likeliest, gradients = self._gradients(list(blocks), inputs.arrays, mx.array(scale))
        self.attachment.clear()
        mx.eval(values, likeliest, gradients)
        return np.array(values), np.array(likeliest), gradients

    def _compute_gradients(
        self, blocks: list[Tensors], arrays: Tensors, scale: mx.array
    ) -> tuple[mx.array, mx.array, list[Tensors]]:
        """(losses [M], whether each target was likeliest [M], gradients of the blocks); nothing is evaluated."""

        def loss(blocks: list[Tensors]) -> tuple[mx.array, mx.array, mx.array]:
            values, logits = self._losses(blocks, arrays)
            return values.sum() * scale, values, logits

        (_, values, logits), gradients = mx.value_and_grad(loss)(blocks)
        return values, logits.argmax(-1) == arrays["targets"], gradients

    def per_token(self, blocks: Sequence[Tensors], inputs: Inputs) -> np.ndarray:
        """[M] loss of each learnt token under these blocks (none: without memory); 0 where the batch fills up."""
        values, _ = self._losses(blocks, inputs.arrays)
        self.attachment.clear()
        return np.array(values)

    def _losses(self, blocks: Sequence[Tensors], arrays: Tensors) -> tuple[mx.array, mx.array]:
        """(losses [M], logits [M, V])."""
        if blocks:
            joined = [MemoryBlock(dict(block), 0) for block in blocks]
            self.attachment.fill(FetchedMemory.join(self.config, joined))
        else:
            self.attachment.clear()
        states = arrays.get("states")
        layer = self.first_layer if states is not None else 0
        cache = None
        if "beginning" in arrays:
            rows = len(arrays["tokens"])
            cache = self.anchor.begin(arrays["beginning"], rows, layer, arrays.get("begun"))
        logits = self.anchor.logits(
            arrays["tokens"], arrays["positions"], arrays.get("documents"), layer, states, cache
        )
        values = next_token(logits, arrays["targets"])
        if "teacher" in arrays:
            taught = divergence(logits, self.anchor.head(arrays["teacher"]))
            values = mx.where(arrays["taught"], taught, values)
        return values * arrays["weights"], logits


# Losses


def next_token(logits: mx.array, targets: mx.array) -> mx.array:
    """logits [M, V], targets [M] -> -log p of each target [M]."""
    logits = logits.astype(mx.float32)
    return logsumexp(logits) - mx.take_along_axis(logits, targets[:, None], -1)[:, 0]


def divergence(logits: mx.array, teacher: mx.array) -> mx.array:
    """KL(teacher || student) [M] of logits [M, V]; the teacher gets no gradient."""
    logits, teacher = logits.astype(mx.float32), mx.stop_gradient(teacher.astype(mx.float32))
    top, exponentials, total = _softmax_parts(teacher)
    p = mx.stop_gradient(exponentials / total)
    constant = mx.stop_gradient((p * teacher).sum(-1) - (top + mx.log(total))[:, 0])
    return logsumexp(logits) - (p * logits).sum(-1) + constant


def logsumexp(logits: mx.array) -> mx.array:
    """[M, V] -> [M]. Its gradient is the softmax, whose exponentials are kept from the forward pass."""
    parts: Any = _logsumexp(logits)
    return parts[0]


@mx.custom_function
def _logsumexp(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    top, exponentials, total = _softmax_parts(logits)
    return (top + mx.log(total))[:, 0], exponentials, total


@_logsumexp.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
    _, exponentials, total = outputs
    return exponentials * (cotangents[0][:, None] / total)


def _softmax_parts(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(maximum [M, 1], exp(logits - maximum) [M, V], its sum [M, 1])."""
    top = logits.max(-1, keepdims=True)
    exponentials = mx.exp(logits - top)
    return top, exponentials, exponentials.sum(-1, keepdims=True)


# The optimiser


@dataclass(frozen=True)
class StepResult:
    """What one step was."""

    loss: float  # summed over the tokens learnt
    learnt: int
    tokens: int
    norm: float  # of the gradient, before it was clipped
    rate: float


def rate_factor(done: float, settings: TrainingSettings) -> float:
    """The part of the full rate after a part `done` of the training: linear warm-up, half a cosine (App. A.2)."""
    if done < settings.warm_up:
        return max(done / settings.warm_up, 1e-3)
    rest = (done - settings.warm_up) / (1 - settings.warm_up)
    return settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * min(rest, 1)))


def update(
    blocks: Sequence[TrainedBlock],
    gradients: Sequence[Mapping[str, mx.array]],
    rate: float,
    weight_decay: float,
    clip: float,
) -> float:
    """One step of AdamW on the blocks that were fetched, in place; returns the norm of the unclipped gradients.

    mlx.optimizers' AdamW does the arithmetic. Its state is one for all parameters; here every block brings its own,
    so that a block that was not fetched does not move, its moments included (arXiv:2510.02375, §3: updates of level
    l are k^l times rarer than the anchor's).
    """
    clipped, norm = clip_grad_norm([dict(gradient) for gradient in gradients], clip)
    for block, own in zip(blocks, clipped, strict=True):
        block.updates += 1
        setting = mx.array([block.updates, rate, weight_decay], mx.float32)
        for name, weight in block.weights.items():
            moved, moments = _compiled_move()(weight, own[name], block.moments[name], setting)
            block.weights[name], block.moments[name] = moved, moments
    mx.eval(norm, [block.arrays for block in blocks])
    return float(norm)


def _move(weight: mx.array, gradient: mx.array, moments: Tensors, setting: mx.array) -> tuple[mx.array, Tensors]:
    """One tensor after a step, and its moments; `setting` holds the number of updates, the rate and the decay."""
    adam = AdamW(0.0, BETAS, weight_decay=setting[2], bias_correction=True)
    adam.state["step"], adam.state["learning_rate"] = setting[0], setting[1]
    after = dict(moments)
    return adam.apply_single(gradient, weight, after), after


@cache
def _compiled_move() -> Callable[..., Any]:
    return _compiled(_move)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on a GPU. On a CPU that would earn nothing, and need a C++ compiler."""
    return mx.compile(function) if mx.default_device().type == mx.DeviceType.gpu else function
