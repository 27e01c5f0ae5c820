"""A chat template is a program of the model's; this bounds how long it may run.

Jinja's sandbox bounds a single loop, not loops within loops. What a template compiles to is Python in a file of the
name `<template>`: its lines are counted here as they run, on any thread. Where a debugger or a tool for
coverage counts lines already, nothing is bounded.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mlx_hiermem.errors import ChatTemplateError

LONGEST = 10.0  # seconds of this thread's own
OFTEN = 1000  # lines between two looks at the clock


@contextlib.contextmanager
def bounded(longest: float = LONGEST) -> Iterator[None]:
    """Raises ChatTemplateError in a template that runs for longer within the block."""
    ends, lines = time.thread_time() + longest, 0

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines % OFTEN == 0 and time.thread_time() > ends:
            raise ChatTemplateError(f"the anchor's chat template does not end within {longest:g} s")
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename == "<template>" else None

    if sys.gettrace() is not None:
        yield
        return
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(None)
