"""What is done only because MLX runs on a CPU: on Linux, where there is no GPU.

    from mlx_hiermem import cpu
    cpu.enable()          # first, before anything imports MLX
    from mlx_hiermem import load

`enable` changes the whole process, so importing the package does not do it: the `hiermem` command and `make` call
it, and a program of your own may. Everything works without it, only slower. `vector` needs no call: it is used
where the embedder computes on a CPU.

What each part earns is in docs/decisions/2026-11-29-cpu-in-one-place.md.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable

NAMES = (
    f"/usr/lib/{platform.machine()}-linux-gnu/openblas-pthread/libblas.so.3",
    "libopenblas.so.0",
    "libopenblas.so",
)
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # <malloc.h> of the GNU C library
LARGEST = 1 << 30  # bytes; what is larger still comes from the system
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


def open_blas() -> str | None:
    """Opens OpenBLAS for MLX to find; returns its name, or None where there is none or MLX came first.

    MLX's wheel links the reference BLAS. Where OpenBLAS is opened with global symbols before MLX is loaded, the
    dynamic linker resolves MLX's cblas calls there: 2.8 -> 221 GFLOP/s on two AVX2 cores (float32, 1024 x 1024).
    """
    if "mlx.core" in sys.modules:
        return None
    for name in NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def keep_freed_memory() -> bool:
    """Has malloc keep what MLX frees; whether it understood. C libraries other than GNU's have no such options.

    MLX has a cache of buffers on GPUs only. On a CPU every large array comes from malloc, which takes it from the
    system page by page and returns it when it is freed: swapping a memory of 70 MB then takes 80 ms of CPU time, of
    which 45 are page faults, and 34 without. Thread arenas could not hold such arrays, so all threads share one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((ARENA_MAX, 1), (MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, LARGEST))
    return all(mallopt(name, value) == 1 for name, value in options)
