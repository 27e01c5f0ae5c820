"""AdamW for blocks that are updated as seldom as they are fetched: each counts its own steps.

mlx.optimizers' AdamW does the arithmetic. Its state is one for all parameters; here every block brings its own, so
that a block not fetched does not move, its moments included (arXiv:2510.02375, §3: updates of level l are k^l times
rarer than the anchor's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
from mlx.optimizers import AdamW, clip_grad_norm

from mlx_hiermem.cpu.compiling import compiled
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.blocks import Tensors, TrainedBlock

BETAS = (0.9, 0.95)


def schedule(done: float, settings: TrainingSettings) -> float:
    """The share of the full rate after a share `done` of the training: a linear warm-up, then half a cosine."""
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
    """One step on the blocks fetched; returns the gradient's norm over all of them before it was clipped."""
    clipped, norm = clip_grad_norm([dict(gradient) for gradient in gradients], clip)
    for block, own in zip(blocks, clipped, strict=True):
        block.updates += 1
        setting = mx.array([block.updates, rate, weight_decay], mx.float32)
        for name, weight in block.weights.items():
            moved, moments = _compiled()(weight, own[name], block.moments[name], setting)
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
def _compiled() -> Callable[..., Any]:
    return compiled(_move)
