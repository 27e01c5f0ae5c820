"""AdamW for blocks that are updated as seldom as they are fetched: each counts its own steps.

mlx.optimizers' AdamW does the arithmetic. Its state is one for all parameters; here every block brings its own, so
that a block not fetched does not move, its moments included (arXiv:2510.02375, §3: updates of level l are k^l times
rarer than the anchor's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
from mlx.optimizers import AdamW, clip_grad_norm

from mlx_hiermem.learn.blocks import Tensors, TrainedBlock
from mlx_hiermem.learn.settings import TrainingSettings

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
    rates: Sequence[tuple[float, float]],
    clip: float,
) -> float:
    """One step on the blocks fetched; returns the gradient's norm over all of them before it was clipped.

    `rates` are each block's (learning rate, weight decay).
    """
    clipped, norm = clip_grad_norm([dict(gradient) for gradient in gradients], clip)
    for block, own, (rate, decay) in zip(blocks, clipped, rates, strict=True):
        block.updates += 1
        adam = AdamW(rate, BETAS, weight_decay=decay, bias_correction=True)
        adam.state["step"] = mx.array(block.updates, mx.float32)
        block.weights = {name: _moved(adam, own[name], value, block, name) for name, value in block.weights.items()}
    mx.eval(norm, [block.arrays for block in blocks])
    return float(norm)


def _moved(adam: AdamW, gradient: mx.array, weight: mx.array, block: TrainedBlock, name: str) -> mx.array:
    moments: Tensors = block.moments[name]
    return adam.apply_single(gradient, weight, moments)
