"""Slots: how a module of the anchor gets a place for memory without changing the model around it.

A module that carries memory becomes an instance of a subclass of its own class. Parameter paths, weights and
quantisation stay as they are; the memory's arrays live in a plain `Slot` beside them, so that saving,
quantising or training the anchor never sees them. An empty slot costs one `if`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.errors import AnchorError


class Slot:
    """What one carrier module adds. `names` are the tensors (see MemoryConfig.widths) it takes from a memory.

    It holds one memory for the whole batch, tensors [R, width], or the table of several: tensors [S, R, width],
    and `rows` [B] saying which of the S memories each sequence has (see `MemoryTable`).
    """

    def __init__(self, names: Sequence[str], dtype: mx.Dtype) -> None:
        self.names, self.dtype = tuple(names), dtype
        self.tensors: tuple[mx.array, ...] = ()
        self.rows: mx.array | None = None
        self.real: mx.array | None = None  # [S, R], in a table: which units are a memory's own and not padding

    def fill(self, tensors: Sequence[mx.array]) -> None:
        """One layer's tensors, each [R, width], cast to what the carrier computes in."""
        self.tensors, self.rows = tuple(tensor.astype(self.dtype) for tensor in tensors), None

    def clear(self) -> None:
        self.tensors, self.rows = (), None

    def onto(self, index: int, x: mx.array) -> mx.array:
        """x [B, T, width] times each unit of tensor `index` -> [B, T, R]."""
        units = self.tensors[index]
        if self.rows is None:
            return x @ units.T
        return mx.gather_mm(x, units.swapaxes(-1, -2), rhs_indices=self.rows)

    def back(self, index: int, inner: mx.array) -> mx.array:
        """The units of tensor `index` summed with weights inner [B, T, R] -> [B, T, width]."""
        units = self.tensors[index]
        return inner @ units if self.rows is None else mx.gather_mm(inner, units, rhs_indices=self.rows)

    def __deepcopy__(self, memo: dict) -> Slot:
        """A copied model starts with empty slots: memory belongs to an attachment, not to weights."""
        return Slot(self.names, self.dtype)


Forward = Callable[..., mx.array]


def carry(module: nn.Module, forward: Callable[[nn.Module, Forward, mx.array], mx.array]) -> None:
    """Re-classes `module` so that a call runs `forward(module, its own call, x)`."""
    own = type(module)

    def call(self: nn.Module, x: mx.array) -> mx.array:
        return forward(self, lambda x: own.__call__(self, x), x)

    module.__class__ = type(f"{own.__name__}WithMemory", (own,), {"__call__": call, "carries_memory": True})


def release(module: nn.Module) -> None:
    """Undoes `carry`."""
    if getattr(type(module), "carries_memory", False):
        module.__class__ = type(module).__mro__[1]


def find(owner: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    """The first submodule of `owner` that has one of these names; AnchorError if there is none."""
    for name in names:
        if isinstance(module := owner.get(name), nn.Module):
            return module
    raise AnchorError(
        f"{type(owner).__module__}.{type(owner).__name__} has no {what} ({' or '.join(names)})",
        "This architecture cannot carry this kind of memory; dense llama-like models can.",
    )


def linear(owner: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    """Like `find`, for a plain or quantised linear layer; a mixture of experts has neither."""
    module = find(owner, names, what)
    if not isinstance(module, nn.Linear | nn.QuantizedLinear):
        raise AnchorError(
            f"the {what} of {type(owner).__name__} is a {type(module).__name__}, not a linear layer",
            "Mixtures of experts cannot carry memories.",
        )
    return module


class Half:
    """One of the two projections that a fused linear layer computes: the first or second half of its outputs."""

    def __init__(self, fused: nn.Module, second: bool) -> None:
        self.fused, self.second = fused, second

    def __call__(self, x: mx.array) -> mx.array:
        return mx.split(self.fused(x), 2, axis=-1)[self.second]


def compute_dtype(linear: nn.Module | Half) -> mx.Dtype:
    """The type in which a linear layer, quantised or not, takes its input."""
    linear = linear.fused if isinstance(linear, Half) else linear
    if "scales" not in linear:
        return linear.weight.dtype
    # Scales of mxfp4 and its like are bytes; such models compute in bfloat16.
    return linear.scales.dtype if mx.issubdtype(linear.scales.dtype, mx.floating) else mx.bfloat16


def sizes(linear: nn.Module | Half) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, quantised or not."""
    if isinstance(linear, Half):
        inputs, outputs = sizes(linear.fused)
        return inputs, outputs // 2
    outputs, inputs = linear.weight.shape
    return (inputs * 32 // linear.bits if "scales" in linear else inputs), outputs


def rows(linear: nn.Module | Half, numbers: mx.array) -> mx.array:
    """Rows [n] of a linear layer's weight, quantised or not, in float32: [n, inputs]."""
    if isinstance(linear, Half):
        return rows(linear.fused, numbers + sizes(linear)[1] * linear.second)
    if "scales" not in linear:
        return linear.weight[numbers].astype(mx.float32)
    offsets = linear.biases[numbers] if linear.get("biases") is not None else None
    packed = (linear.weight[numbers], linear.scales[numbers], offsets, linear.group_size, linear.bits, linear.mode)
    return mx.dequantize(*packed).astype(mx.float32)
