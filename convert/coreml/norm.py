"""Norms that float16 can hold.

SmolLM2's residual stream reaches 22 560, whose square is far beyond float16's 65 504. So values are divided by
their largest before they are squared; every step below stays between about 1e-4 and 1e4:

    m = max(|x|, sqrt(eps))        x · 1 / (m · sqrt(mean((x / m)²) + (sqrt(eps) / m)²))
"""

from __future__ import annotations

import math

from mlx_hiermem.convert.coreml.architecture import Norm
from mlx_hiermem.convert.coreml.mil import Var, Weights, half, mb


def norm(x: Var, of: Norm, weights: Weights, name: str) -> Var:
    """RMSNorm or LayerNorm over the last axis, which is `of.width` wide."""
    if of.centred:
        x = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[-1], keep_dims=True), name=f"{name}_centred")
    root = half(math.sqrt(of.eps))
    peak = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True, name=f"{name}_peak")
    peak = mb.maximum(x=peak, y=root)
    unit = mb.real_div(x=x, y=peak, name=f"{name}_unit")
    mean = mb.reduce_mean(x=mb.mul(x=unit, y=unit), axes=[-1], keep_dims=True, name=f"{name}_mean_square")
    floor = mb.real_div(x=root, y=peak)
    length = mb.sqrt(x=mb.add(x=mean, y=mb.mul(x=floor, y=floor)))
    # x and not x / m goes on: most of x / m is below what float16 holds exactly where one value is huge.
    x = mb.mul(x=x, y=mb.real_div(x=mb.real_div(x=half(1.0), y=length), y=peak), name=f"{name}_normed")
    if of.gain is not None:
        x = mb.mul(x=x, y=weights.constant(f"{name}_gain", of.gain), name=f"{name}_scaled")
    if of.bias is not None:
        x = mb.add(x=x, y=weights.constant(f"{name}_bias", of.bias), name=f"{name}_shifted")
    return x
