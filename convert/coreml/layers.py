"""What the layers are made of: norms that float16 can hold, and attention over a cache that is a state.

SmolLM2's residual stream reaches 22 560, whose square is far beyond float16's 65 504. So values are divided by
their largest before they are squared; every step below stays between about 1e-4 and 1e4:

    m = max(|x|, sqrt(eps))        x · 1 / (m · sqrt(mean((x / m)²) + (sqrt(eps) / m)²))

k_cache and v_cache are [layers, key/value heads, context, head dim], the last two axes perhaps
filled up. A call writes its tokens' keys and values at `position` and attends to all that stands there up to each
token; what lies beyond is masked, so it may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.convert.coreml.mil import Var, Weights, half, mb
from mlx_hiermem.convert.export.architecture import Architecture, Layer, Linear, Norm

MASKED = 30_000.0  # taken off a score: nothing is left of its share, and float16 holds the difference


class Cache:
    """A state and what it holds after the layers so far."""

    def __init__(self, state: Var) -> None:
        self.state, self.value = state, mb.read_state(input=state)


@dataclass
class Positions:
    """What all layers need to know of where a call's T tokens stand in the context of C.

    `begin` and `end` [1], `rows` [T] int32. Masks by window and rotations by frequencies are made when first used.
    """

    tokens: int
    context: int
    begin: Var
    weights: Weights

    def __post_init__(self) -> None:
        self.end = mb.add(x=self.begin, y=np.int32(self.tokens), name="end")
        steps = np.arange(self.tokens, dtype=np.int32)
        self.rows = mb.add(x=self.begin, y=self.weights.constant(f"steps_{self.tokens}", steps), name="positions")
        self.masks: dict[int, Var] = {}
        self.rotations: dict[bytes, tuple[Var, Var]] = {}

    def mask(self, window: int) -> Var:
        """[T, C]: 0 where a token sees a position, else far below. 0 is an endless window."""
        if window not in self.masks:
            places = self.weights.constant("places", np.arange(self.context, dtype=np.int32)[None])
            rows = mb.expand_dims(x=self.rows, axes=[1])
            seen = mb.less_equal(x=places, y=rows)
            if window:
                near = mb.greater(x=places, y=mb.sub(x=rows, y=np.int32(window)))
                seen = mb.logical_and(x=seen, y=near)
            # Arithmetic, not select: with scalar branches its declared shape is a scalar's.
            hidden = mb.sub(x=mb.cast(x=seen, dtype="fp16"), y=half(1.0))
            self.masks[window] = mb.mul(x=hidden, y=half(MASKED), name=f"mask_{window}")
        return self.masks[window]

    def rotation(self, frequencies: np.ndarray) -> tuple[Var, Var]:
        """cos and signed sin [T, 1, head dim], from tables of the whole context.

        A position of some hundreds times a frequency would be off by up to a radian in float16.
        """
        key = frequencies.tobytes()
        if key not in self.rotations:
            angles = np.arange(self.context)[:, None] * frequencies
            number = len(self.rotations)
            tables = {
                "cos": np.concatenate([np.cos(angles), np.cos(angles)], axis=1),
                "sin": np.concatenate([-np.sin(angles), np.sin(angles)], axis=1),
            }
            cos, sin = (
                mb.expand_dims(
                    x=mb.gather(x=self.weights.constant(f"rope_{number}_{part}", table), indices=self.rows, axis=0),
                    axes=[1],
                    name=f"{part}_{number}",
                )
                for part, table in tables.items()
            )
            self.rotations[key] = cos, sin
        return self.rotations[key]


def attention(
    x: Var, index: int, layer: Layer, sizes: Architecture, at: Positions, caches: Sequence[Cache], weights: Weights
) -> Var:
    """[1, T, d] -> [1, T, d]; writes the layer's part of the caches (keys, values)."""
    name, tokens, width = f"layers_{index}_attention", at.tokens, sizes.head_dim
    group = sizes.heads // sizes.kv_heads
    q = linear(x, layer.q, weights)
    k = linear(x, layer.k, weights)
    v = mb.reshape(x=linear(x, layer.v, weights), shape=[tokens, sizes.kv_heads, width])
    q = _heads(q, layer.q_norm, sizes.heads, layer, at, weights, f"{name}_q")
    k = _heads(k, layer.k_norm, sizes.kv_heads, layer, at, weights, f"{name}_k")
    # Scaled before the product, which would grow with the head's width.
    q = mb.mul(x=q, y=half(sizes.scale), name=f"{name}_q_scaled")
    k = _remember(k, caches[0], index, at, f"{name}_keys")
    v = _remember(v, caches[1], index, at, f"{name}_values")
    # The queries that share keys become rows of one product; repeating the keys would copy the cache.
    q = mb.transpose(x=mb.reshape(x=q, shape=[tokens, sizes.kv_heads, group, width]), perm=[1, 2, 0, 3])
    q = mb.reshape(x=q, shape=[sizes.kv_heads, group * tokens, width])
    scores = mb.matmul(x=q, y=k, transpose_y=True, name=f"{name}_scores")
    scores = mb.reshape(x=scores, shape=[sizes.kv_heads, group, tokens, at.context])
    scores = mb.add(x=scores, y=at.mask(layer.sliding_window), name=f"{name}_masked")
    shares = mb.softmax(x=scores, axis=-1, name=f"{name}_shares")
    shares = mb.reshape(x=shares, shape=[sizes.kv_heads, group * tokens, at.context])
    heads = mb.matmul(x=shares, y=v, name=f"{name}_heads")
    heads = mb.reshape(x=heads, shape=[sizes.kv_heads, group, tokens, width])
    heads = mb.reshape(x=mb.transpose(x=heads, perm=[2, 0, 1, 3]), shape=[1, tokens, sizes.heads * width])
    return linear(heads, layer.o, weights)


def linear(x: Var, of: Linear, weights: Weights, name: str = "") -> Var:
    """x [..., in] -> [..., out]."""
    if of.bias is None:  # coremltools would write zeros of its own for each, and each function
        bias = weights.constant(f"zeros_{len(of.weight)}", np.zeros(len(of.weight)))
    else:
        bias = weights.constant(f"{of.name}_bias", of.bias)
    return mb.linear(x=x, weight=weights.matrix(of.name, of.weight), bias=bias, name=name or f"{of.name}_out")


def _heads(x: Var, of: Norm | None, count: int, layer: Layer, at: Positions, weights: Weights, name: str) -> Var:
    """Queries or keys [1, T, heads x width] -> normed and turned [T, heads, width]."""
    over_all = of is not None and of.width == x.shape[-1]
    if of is not None and over_all:
        x = norm(x, of, weights, f"{name}_norm")
    x = mb.reshape(x=x, shape=[at.tokens, count, x.shape[-1] // count])
    if of is not None and not over_all:
        x = norm(x, of, weights, f"{name}_norm")
    if layer.frequencies is None:
        return x
    cos, sin = at.rotation(layer.frequencies)
    one, other = mb.split(x=x, num_splits=2, axis=-1)
    turned = mb.mul(x=mb.concat(values=[other, one], axis=-1), y=sin)
    return mb.add(x=mb.mul(x=x, y=cos), y=turned, name=f"{name}_turned")


def _remember(x: Var, cache: Cache, index: int, at: Positions, name: str) -> Var:
    """Writes [T, heads, width] at its positions; returns the layer's whole cache [heads, C, width]."""
    width = x.shape[-1]
    update = mb.expand_dims(x=mb.transpose(x=x, perm=[1, 0, 2]), axes=[0])
    update = fill(update, at.tokens, cache.value.shape[-1])
    back = np.array([0], np.int32)
    begin = mb.concat(values=[np.array([index, 0], np.int32), at.begin, back], axis=0)
    end = mb.concat(values=[np.array([index + 1, 0], np.int32), at.end, back], axis=0)
    whole = [False, True, False, True]  # axes of which all is written
    written = mb.slice_update(
        x=cache.value, update=update, begin=begin, end=end, begin_mask=whole, end_mask=whole, name=f"{name}_cache"
    )
    cache.value = mb.coreml_update_state(state=cache.state, value=written, name=f"{name}_stored")
    return take(cache.value, index, name, width)


def fill(x: Var, rows: int, width: int) -> Var:
    """Its last two axes with zeros behind, up to `rows` and `width`."""
    missing = rows - x.shape[-2], width - x.shape[-1]
    if not any(missing):
        return x
    return mb.pad(x=x, pad=[0, missing[0], 0, missing[1]], mode="constant", constant_val=half(0.0))


def take(x: Var, index: int, name: str, width: int) -> Var:
    """Row `index` of the first axis, which is dropped, and the first `width` of the last."""
    rest = [0] * (x.rank - 2)
    keep = [False] + [True] * (x.rank - 2) + [x.shape[-1] == width]
    squeeze = [True] + [False] * (x.rank - 1)
    return mb.slice_by_index(
        x=x,
        begin=[index, *rest, 0],
        end=[index + 1, *rest, width],
        end_mask=keep,
        squeeze_mask=squeeze,
        name=name,
    )


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
