"""What is done only because MLX runs on a CPU: on Linux, where there is no GPU.

    from mlx_hiermem import cpu
    cpu.enable()          # first, before anything imports MLX
    from mlx_hiermem import load

`enable` changes the whole process, so importing the package does not do it: the `hiermem` command and `make` call
it, and a program of your own may. Everything works without it, only slower. The other modules here need no call:
they are used where a model computes on a CPU.

What each of them earns is in docs/decisions/2026-11-29-cpu-in-one-place.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mlx_hiermem.cpu.blas import open_blas
from mlx_hiermem.cpu.malloc import keep_freed_memory

MISSING = (
    "MLX computes on the CPU without OpenBLAS, about ten times slower than with it; "
    "install Debian's package libopenblas0-pthread, or your system's OpenBLAS"
)

_blas: str | None = None
_say: Callable[[str], None] | None = None


def enable(say: Callable[[str], None] | None = None) -> str | None:
    """Gives MLX a fast BLAS, and has malloc keep what MLX frees; returns the BLAS, or None where there is none.

    To be called before MLX is imported; a second call changes nothing. Outside Linux it does nothing. `say` is
    called with one line, once, if later a model is loaded that computes on the CPU without a fast BLAS.
    """
    global _blas, _say
    _say = say or _say
    if sys.platform.startswith("linux"):
        _blas = _blas or open_blas()
        keep_freed_memory()
    return _blas


def report_slow_blas() -> None:
    """Called where a model or an embedder is loaded: says once if it will compute without a fast BLAS."""
    global _say
    if _say is None or _blas is not None or not sys.platform.startswith("linux"):
        return
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        say, _say = _say, None
        say(MISSING)
