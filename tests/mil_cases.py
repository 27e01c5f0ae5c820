"""What each operation of the interpreter is held to: how it is written in MIL, and its definition in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_hiermem.convert.coreml.mil import mb

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    """Values that float16 holds."""
    return rng.standard_normal(shape).astype(np.float16).astype(np.float32)


def integers(*shape: int, low: int = 0, high: int = 5) -> np.ndarray:
    return rng.integers(low, high, shape).astype(np.int32)


def double(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).double()


@dataclass
class Case:
    """`build` gets a function that casts constants, and the inputs; `expected` tensors in float64 or int32."""

    name: str
    build: Callable[..., Any]
    expected: Callable[..., Any]
    inputs: Sequence[np.ndarray]


X, Y, POSITIVE = normal(2, 3, 4), normal(2, 3, 4), np.abs(normal(2, 3, 4)) + 0.25
N, M = integers(2, 3, 4, low=-4), integers(2, 3, 4, low=1)
ODD = np.array([[[0, -0.5, 0.5, 1.5], [2.5, -2.5, 1e-4, 65_000]]], np.float16).astype(np.float32)
W, B = normal(5, 4), normal(5)
Q, K, V = normal(1, 2, 3, 8), normal(1, 2, 5, 8), normal(1, 2, 5, 6)
BIAS, MASK = normal(1, 1, 3, 5), np.arange(15).reshape(1, 1, 3, 5) % 4 > 0
T = torch


def unary(name: str, definition: Callable[[Tensor], Tensor], x: np.ndarray = X) -> Case:
    return Case(name, lambda c, x: getattr(mb, name)(x=x), definition, [x])


def binary(name: str, definition: Callable[..., Tensor], x: np.ndarray = X, y: np.ndarray = Y) -> Case:
    return Case(name, lambda c, x, y: getattr(mb, name)(x=x, y=y), definition, [x, y])


def reduced(name: str, definition: Callable[[Tensor], Tensor], x: np.ndarray = X) -> Case:
    return Case(name, lambda c, x: getattr(mb, name)(x=x, axes=[1, -1]), definition, [x])


ELEMENTWISE = [
    *[unary(name, getattr(T, name)) for name in ("abs", "ceil", "cos", "exp", "floor", "sin", "square", "tanh")],
    *[unary(name, getattr(T, name)) for name in ("erf", "relu", "sigmoid", "sign", "exp2")],
    unary("round", T.round, ODD),
    unary("sqrt", T.sqrt, POSITIVE),
    unary("rsqrt", T.rsqrt, POSITIVE),
    unary("log", T.log, POSITIVE),
    unary("silu", F.silu),
    unary("silu", F.silu, np.float32([[-60_000, -90, -12, 30, 60_000]])),
    unary("softplus", F.softplus, ODD),
    unary("gelu", F.gelu),
    unary("inverse", lambda x: 1 / (x + 1e-4), POSITIVE),
    unary("identity", lambda x: x),
    Case(
        "gelu", lambda c, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh"), [X]
    ),
    Case("gelu", lambda c, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * T.sigmoid(1.702 * x), [X]),
    Case("rsqrt", lambda c, x: mb.rsqrt(x=x, epsilon=c(0.5)), lambda x: (x + 0.5).rsqrt(), [POSITIVE]),
    Case("clip", lambda c, x: mb.clip(x=x, alpha=c(-0.5), beta=c(0.25)), lambda x: x.clamp(-0.5, 0.25), [X]),
    binary("add", T.add),
    binary("sub", T.sub),
    binary("mul", T.mul),
    binary("real_div", T.div),
    binary("add", T.add, X, normal(3, 1)),
    binary("sub", T.sub, N, M),
    binary("mul", T.mul, N, M),
    binary("floor_div", T.floor_divide, N, M),
    binary("mod", T.remainder, N, M),
    binary("mod", T.remainder),
    binary("pow", T.pow, POSITIVE),
    binary("maximum", T.maximum),
    binary("minimum", T.minimum, N, M),
    binary("equal", T.eq, N, M),
    binary("not_equal", T.ne, N, M),
    binary("less", T.lt, N, M),
    binary("less", T.lt),
    binary("less_equal", T.le, N, M),
    binary("greater", T.gt, N, M),
    binary("greater_equal", T.ge, N, M),
    *[
        Case(
            name,
            lambda c, x, y, name=name: getattr(mb, name)(x=mb.greater(x=x, y=0), y=mb.greater(x=y, y=2)),
            lambda x, y, name=name: getattr(T, name)(x > 0, y > 2),
            [N, M],
        )
        for name in ("logical_and", "logical_or", "logical_xor")
    ],
    Case("logical_not", lambda c, x: mb.logical_not(x=mb.greater(x=x, y=0)), lambda x: ~(x > 0), [N]),
    Case(
        "select",
        lambda c, i, x, y: mb.select(cond=mb.greater(x=i, y=0), a=x, b=y),
        lambda i, x, y: T.where(i > 0, x, y),
        [N, X, Y],
    ),
    Case("cast", lambda c, x: mb.cast(x=x, dtype="int32"), lambda x: x.to(T.int32), [ODD]),
    Case("cast", lambda c, x: mb.cast(x=x, dtype="bool"), lambda x: x != 0, [ODD]),
    Case("cast", lambda c, x: mb.cast(x=x, dtype="fp32"), lambda x: x, [N]),
    Case("cast", lambda c, x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), lambda x: x.half(), [N + 2047]),
]

REDUCTIONS = [
    reduced("reduce_sum", lambda x: x.sum((1, 2))),
    reduced("reduce_mean", lambda x: x.mean((1, 2))),
    reduced("reduce_max", lambda x: x.amax((1, 2))),
    reduced("reduce_min", lambda x: x.amin((1, 2))),
    reduced("reduce_max", lambda x: x.amax((1, 2)), N),
    reduced("reduce_prod", lambda x: x.flatten(1).prod(1)),
    reduced("reduce_sum_square", lambda x: x.square().sum((1, 2))),
    reduced("reduce_l1_norm", lambda x: x.abs().sum((1, 2))),
    reduced("reduce_l2_norm", lambda x: x.flatten(1).norm(dim=1)),
    reduced("reduce_log_sum", lambda x: x.sum((1, 2)).log(), POSITIVE),
    reduced("reduce_log_sum_exp", lambda x: x.logsumexp((1, 2))),
    Case("reduce_sum", lambda c, x: mb.reduce_sum(x=x), lambda x: x.sum(), [X]),
    Case("reduce_mean", lambda c, x: mb.reduce_mean(x=x, axes=[0], keep_dims=True), lambda x: x.mean(0, True), [X]),
    Case("reduce_argmax", lambda c, x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1), [X]),
    Case("reduce_argmin", lambda c, x: mb.reduce_argmin(x=x, keep_dims=True), lambda x: x.argmin(-1, True), [X]),
    Case("softmax", lambda c, x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1), [X * 9]),
    Case("softmax", lambda c, x: mb.softmax(x=x), lambda x: x.softmax(-1), [ODD]),
    Case(
        "layer_norm",
        lambda c, x: mb.layer_norm(x=x, axes=[-1], gamma=c(B[:4]), beta=c(W[0]), epsilon=c(1e-3)),
        lambda x: F.layer_norm(x, (4,), double(B[:4]), double(W[0]), 1e-3),
        [X],
    ),
    Case(
        "layer_norm",
        lambda c, x: mb.layer_norm(x=x, axes=[1, 2], gamma=c(Y[0]), epsilon=c(1e-5)),
        lambda x: F.layer_norm(x, (3, 4), double(Y[0])),
        [X],
    ),
    Case(
        "l2_norm",
        lambda c, x: mb.l2_norm(x=x, epsilon=c(1e-3)),
        lambda x: x / (x.square().sum() + float(np.float16(1e-3))).sqrt(),
        [X],
    ),
    Case("cumsum", lambda c, x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), [X]),
    Case(
        "cumsum",
        lambda c, x: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True),
        lambda x: x.flip(2).cumsum(2).flip(2) - x,
        [N],
    ),
    Case("topk", lambda c, x: mb.topk(x=x, k=2, axis=1), lambda x: tuple(x.topk(2, 1)), [X]),
    Case("topk", lambda c, x: mb.topk(x=x, k=3, ascending=True), lambda x: tuple(x.topk(3, largest=False)), [X]),
]

PRODUCTS = [
    Case("linear", lambda c, x: mb.linear(x=x, weight=c(W), bias=c(B)), lambda x: x @ double(W).T + double(B), [X]),
    Case("linear", lambda c, x: mb.linear(x=x, weight=c(W)), lambda x: x @ double(W).T, [X]),
    Case("matmul", lambda c, x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: x @ y.mT, [X, Y]),
    Case("matmul", lambda c, x, y: mb.matmul(x=x, y=y, transpose_x=True), lambda x, y: x.mT @ y, [X, Y]),
    Case("matmul", lambda c, x, y: mb.matmul(x=x, y=y), lambda x, y: x @ y, [normal(2, 1, 3, 4), normal(5, 4, 2)]),
    Case(
        "einsum",
        lambda c, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        lambda x, y: T.einsum("nchw,nwhu->nchu", x, y),
        [normal(1, 2, 3, 4), normal(1, 4, 3, 5)],
    ),
    Case(
        "einsum",
        lambda c, x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"),
        lambda x, y: T.einsum("chw,whr->chr", x, y.expand(4, 3, 5)),
        [normal(2, 3, 4), normal(4, 1, 5)],
    ),
    Case(
        "scaled_dot_product_attention",
        lambda c, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        F.scaled_dot_product_attention,
        [Q, K, V],
    ),
    Case(
        "scaled_dot_product_attention",
        lambda c, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        F.scaled_dot_product_attention,
        [Q, K, V, BIAS],
    ),
    Case(
        "scaled_dot_product_attention",
        lambda c, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=MASK),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, T.tensor(MASK)),
        [Q, K, V],
    ),
]

LAYOUT = [
    Case("reshape", lambda c, x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, 6), [X]),
    Case("reshape", lambda c, x: mb.reshape(x=x, shape=[0, 2, -1]), lambda x: x.reshape(2, 2, 6), [X]),
    Case("transpose", lambda c, x: mb.transpose(x=x, perm=[2, 0, -2]), lambda x: x.permute(2, 0, 1), [X]),
    Case("expand_dims", lambda c, x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None], [X]),
    Case("expand_dims", lambda c, x: mb.expand_dims(x=x, axes=[1, 2]), lambda x: x[:, None, None], [X]),
    Case("squeeze", lambda c, x: mb.squeeze(x=x, axes=[-1]), lambda x: x[..., 0], [X[:1, :, :1]]),
    Case("squeeze", lambda c, x: mb.squeeze(x=x), lambda x: x[0, :, 0], [X[:1, :, :1]]),
    Case("concat", lambda c, x, y: mb.concat(values=(x, y), axis=-2), lambda x, y: T.cat((x, y), 1), [X, X[:, :1]]),
    Case(
        "concat",
        lambda c, x, y: mb.concat(values=(x, y), axis=1, interleave=True),
        lambda x, y: T.stack((x, y), 2).flatten(1, 2),
        [X, Y],
    ),
    Case("stack", lambda c, x, y: mb.stack(values=(x, y), axis=1), lambda x, y: T.stack((x, y), 1), [X, Y]),
    Case("split", lambda c, x: mb.split(x=x, num_splits=2, axis=-1), lambda x: x.chunk(2, -1), [X]),
    Case("split", lambda c, x: mb.split(x=x, split_sizes=[1, 2], axis=1), lambda x: x.split([1, 2], 1), [X]),
    Case("tile", lambda c, x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: x.repeat(1, 2, 3), [X]),
    Case("reverse", lambda c, x: mb.reverse(x=x, axes=[0, -1]), lambda x: x.flip((0, 2)), [X]),
    Case(
        "pad",
        lambda c, x: mb.pad(x=x, pad=[1, 0, 0, 2], constant_val=c(0.5)),
        lambda x: F.pad(x, (0, 2, 1, 0), value=0.5),
        [X],
    ),
    Case("pad", lambda c, x: mb.pad(x=x, pad=[1, 2], mode="reflect"), lambda x: F.pad(x, (1, 2), "reflect"), [X]),
    Case(
        "pad", lambda c, x: mb.pad(x=x, pad=[2, 1], mode="replicate"), lambda x: F.pad(x, (2, 1), "replicate"), [X]
    ),
    Case("shape", lambda c, x: mb.shape(x=x), lambda x: T.tensor(x.shape), [X]),
    Case(
        "fill",
        lambda c, i: mb.mul(x=mb.fill(shape=[2, 3], value=7), y=i),
        lambda i: T.full((2, 3), 7) * i,
        [N[0, :2, :3]],
    ),
    Case("fill_like", lambda c, x: mb.fill_like(ref_tensor=x, value=c(1.5)), lambda x: T.full_like(x, 1.5), [X]),
    Case(
        "range_1d",
        lambda c, i: mb.range_1d(start=mb.squeeze(x=i), end=11, step=3),
        lambda i: T.arange(2, 11, 3),
        [np.int32([2])],
    ),
    Case(
        "one_hot",
        lambda c, i: mb.one_hot(indices=i, one_hot_vector_size=5, axis=1, on_value=3, off_value=-1),
        lambda i: F.one_hot(i.long(), 5).permute(0, 2, 1) * 4 - 1,
        [integers(2, 3)],
    ),
    Case("band_part", lambda c, x: mb.band_part(x=x, lower=1, upper=0), lambda x: x.triu(-1).tril(0), [X]),
    Case("band_part", lambda c, x: mb.band_part(x=x, lower=-1, upper=1), lambda x: x.tril(1), [X]),
]


def sliced(expected: Callable[[Tensor], Tensor], x: np.ndarray = X, **how: Any) -> Case:
    return Case("slice_by_index", lambda c, x: mb.slice_by_index(x=x, **how), expected, [x])


NO, LAST = [False, False, False], [False, False, True]
ROWS = integers(2, 3, high=3)
INDEXING = [
    sliced(lambda x: x[:, 1:3, 0:4:2], begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]),
    sliced(
        lambda x: x[1:, :, :2],
        begin=[1, 2, 3],
        end=[2, 1, 2],
        begin_mask=[False, True, True],
        end_mask=[False, True, False],
    ),
    sliced(lambda x: x[1, :2, -1], begin=[1, 0, -1], end=[0, 2, 0], squeeze_mask=[True, False, True]),
    sliced(
        lambda x: x.flip(2)[:, -2:],
        begin=[0, -2, 0],
        end=[2, 3, 0],
        stride=[1, 1, -1],
        begin_mask=LAST,
        end_mask=LAST,
    ),
    Case(
        "slice_by_index",
        lambda c, x, b, e: mb.slice_by_index(x=x, begin=b, end=e),
        lambda x, b, e: x[1:2, 0:2, 1:4],
        [X, np.int32([1, 0, 1]), np.int32([2, 2, 4])],
    ),
    Case(
        "slice_by_size",
        lambda c, x, b: mb.slice_by_size(x=x, begin=b, size=[1, 2, -1]),
        lambda x, b: x[1:, :2, 2:],
        [X, np.int32([1, 0, 2])],
    ),
    Case(
        "slice_update",
        lambda c, x, u, b: mb.slice_update(x=x, update=u, begin=b, end=mb.add(x=b, y=[1, 2, 4])),
        lambda x, u, b: T.cat((x[:1], T.cat((x[1:, :1], u), 1))),
        [X, Y[:1, :2], np.int32([1, 1, 0])],
    ),
    Case(
        "slice_update",
        lambda c, x, u: mb.slice_update(
            x=x,
            update=u,
            begin=[0, 0, 1],
            end=[0, 0, 0],
            end_mask=[True] * 3,
            stride=[1, 1, 2],
            squeeze_mask=[True, False, False],
        ),
        lambda x, u: T.stack((T.stack((x[0, :, 0], u[:, 0], x[0, :, 2], u[:, 1]), 1), x[1])),
        [X, Y[0, :, :2]],
    ),
    Case("gather", lambda c, x, i: mb.gather(x=x, indices=i, axis=1), lambda x, i: x[:, i.long()], [X, ROWS]),
    Case(
        "gather",
        lambda c, x, i: mb.gather(x=x, indices=i, axis=-1, validate_indices=True),
        lambda x, i: x[..., i.long()],
        [X, ROWS],
    ),
    Case(
        "gather",
        lambda c, x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        lambda x, i: T.stack([x[0][:, i[0].long()], x[1][:, i[1].long()]]),
        [X, ROWS],
    ),
    Case(
        "gather_along_axis",
        lambda c, x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
        lambda x, i: x.gather(1, i.long()),
        [X, integers(2, 2, 4, high=3)],
    ),
    Case(
        "gather_nd",
        lambda c, x, i: mb.gather_nd(x=x, indices=i),
        lambda x, i: x[i[:, 0].long(), i[:, 1].long()],
        [X, integers(5, 2, high=2)],
    ),
    Case(
        "gather_nd",
        lambda c, x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
        lambda x, i: T.stack([x[0][i[0, :, 0].long()], x[1][i[1, :, 0].long()]]),
        [X, integers(2, 3, 1, high=3)],
    ),
]

CASES = [*ELEMENTWISE, *REDUCTIONS, *PRODUCTS, *LAYOUT, *INDEXING]
