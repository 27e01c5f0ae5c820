"""Operations on each element: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.convert.coreml.ops.registry import computes, moves

UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": np.abs, "ceil": np.ceil, "cos": np.cos, "exp": np.exp, "exp2": np.exp2, "floor": np.floor,
    "round": np.round, "sign": np.sign, "sin": np.sin, "sqrt": np.sqrt, "square": np.square, "tanh": np.tanh,
}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "floor_div": np.floor_divide,
    "mod": np.mod, "pow": np.power, "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "equal": np.equal, "not_equal": np.not_equal, "less": np.less, "less_equal": np.less_equal,
    "greater": np.greater, "greater_equal": np.greater_equal, "logical_and": np.logical_and,
    "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip
CASTS = {
    "fp16": "float16", "fp32": "float32", "int32": "int32", "int16": "int16", "int8": "int8", "uint16": "uint16",
    "uint8": "uint8", "bool": "bool",
}  # fmt: skip


def _register() -> None:
    """numpy's functions under MIL's parameter names."""
    for name, unary in UNARY.items():
        computes(name)(lambda x, f=unary: f(x))
    for name, binary in BINARY.items():
        computes(name)(lambda x, y, f=binary: f(x, y))
    for name, comparison in COMPARISONS.items():
        moves(name)(lambda x, y, f=comparison: f(x, y))
    moves("logical_not")(lambda x: np.logical_not(x))
    moves("identity")(lambda x: x)


_register()


@computes("cast", casts=lambda arguments: CASTS[arguments["dtype"]])
def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """Towards zero from floats to integers; numpy's rounding to float16 is left to the interpreter."""
    return x.astype(np.float32 if dtype == "fp16" else CASTS[dtype])


@computes("inverse")
def inverse(x: np.ndarray, epsilon: float = 1e-4) -> np.ndarray:
    return 1 / (x + epsilon)


@computes("rsqrt")
def rsqrt(x: np.ndarray, epsilon: float = 1e-12) -> np.ndarray:
    return 1 / np.sqrt(x + epsilon)


@computes("log")
def log(x: np.ndarray, epsilon: float = 1e-45) -> np.ndarray:
    return np.log(x + np.float32(epsilon))


@computes("clip")
def clip(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return np.minimum(np.maximum(x, alpha), beta)


@computes("erf")
def error_function(x: np.ndarray) -> np.ndarray:
    return np.array(mx.erf(mx.array(x)))  # numpy has none, and math.erf takes a call for each element


@computes("sigmoid")
def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # the same function; exp(-x) would overflow


@computes("silu")
def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


@computes("relu")
def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@computes("softplus")
def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, np.float32(0))


@computes("gelu")
def gelu(x: np.ndarray, mode: str = "EXACT") -> np.ndarray:
    if mode == "EXACT":
        return 0.5 * x * (1 + error_function(x / np.float32(math.sqrt(2))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    raise ValueError(f"unknown mode {mode}")


@moves("select")
def select(cond: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(cond, a, b)
