"""`mx.compile` where it works: on a CPU it calls the C++ compiler, which not every machine has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled if it can be; results agree to rounding."""
    works = mx.default_device().type == mx.DeviceType.gpu or shutil.which("g++") is not None
    return mx.compile(function) if works else function
