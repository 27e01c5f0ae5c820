"""The table of MIL operations: name -> a numpy function whose parameters are the operation's own.

A parameter's default is MIL's. A function raises ValueError or IndexError for what the operation does not allow;
the interpreter adds where it happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])
Casts = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Op:
    """`computes`: does arithmetic, so it gets float16 as float32, and its result is rounded afterwards to the type
    of its arguments, or to that which `casts` finds in them. The others take and give values as they are.
    """

    function: Callable[..., Any]
    computes: bool
    casts: Casts | None = None


OPS: dict[str, Op] = {}


def moves(*names: str) -> Callable[[Function], Function]:
    """Registers an operation that only moves values."""

    def register(function: Function) -> Function:
        OPS.update({name: Op(function, False) for name in names})
        return function

    return register


def computes(*names: str, casts: Casts | None = None) -> Callable[[Function], Function]:
    """Registers an operation that makes new values."""

    def register(function: Function) -> Function:
        OPS.update({name: Op(function, True, casts) for name in names})
        return function

    return register


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """MIL's axes, negative ones counted from the end; None means all. ValueError where there is no such axis."""
    if axes is None:
        return tuple(range(rank))
    found = tuple(int(axis) + rank * (axis < 0) for axis in np.atleast_1d(axes))
    if not all(0 <= axis < rank for axis in found) or len(set(found)) < len(found):
        raise ValueError(f"axes {np.atleast_1d(axes).tolist()} of a tensor of rank {rank}")
    return found


def axis_of(axis: Any, rank: int) -> int:
    return axes_of(axis, rank)[0]
