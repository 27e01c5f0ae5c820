"""Several streams for work that a CPU does better on several cores: joining and casting a memory's tensors.

MLX runs each stream of a CPU on a thread of its own, and an operation on one core. A GPU needs no such help.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx

LANES = 3  # an FFN memory has three tensors

_of_thread = threading.local()  # MLX's streams belong to the thread that made them


def lane(number: int) -> AbstractContextManager[object]:
    """Within it operations go to this thread's stream of that number, counted round."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return nullcontext()
    if not hasattr(_of_thread, "streams"):
        _of_thread.streams = [mx.new_stream(mx.cpu) for _ in range(LANES)]
    return mx.stream(_of_thread.streams[number % LANES])
