"""Gives MLX a fast matrix multiplication on Linux CPUs, where its wheel links the reference BLAS.

If OpenBLAS is installed (Debian: libopenblas0-pthread), opening it with global symbols before MLX is loaded
makes the dynamic linker resolve MLX's cblas calls there: 2.8 -> 221 GFLOP/s on two AVX2 cores (float32,
1024 x 1024). Nothing else changes. On macOS MLX uses Metal and Accelerate, and has no need of this.
"""

from __future__ import annotations

import ctypes
import platform
import sys

NAMES = (
    f"/usr/lib/{platform.machine()}-linux-gnu/openblas-pthread/libblas.so.3",
    "libopenblas.so.0",
    "libopenblas.so",
)


def open_blas() -> str | None:
    """Opens OpenBLAS for MLX to find; returns its name, or None where there is none or MLX came first."""
    if "mlx.core" in sys.modules:
        return None
    for name in NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None
