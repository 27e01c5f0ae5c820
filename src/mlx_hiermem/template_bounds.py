"""A chat template is a program of the model's; this bounds how long it may run, and how large a text it may make.

Jinja's sandbox bounds a single loop, neither loops within loops nor texts. What a template compiles to is Python
in a file of the name `<template>`: its lines are counted here as they run, on any thread, and what its variables
hold is looked at; and so is, before they run, what Jinja's own functions are given that make a large text in one
step. Where a debugger or a tool for coverage counts lines already, nothing is bounded.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from mlx_hiermem.errors import ChatTemplateError

LONGEST = 10.0  # seconds of this thread's own
LARGEST = 1 << 23  # characters of a text, and elements of a list
OFTEN = 1000  # lines between two looks at the clock
MANY = 16  # elements of a list that are looked at with each line; a longer one is looked at every so many lines
TEMPLATE = "<template>"
OPERATORS = frozenset(("+", "*", "**", "%"))  # that can make something large of little
DIGITS = 64  # binary ones, of a number that others are multiplied to
FACTOR = 32  # a text in which each letter is replaced is rarely so much longer
WIDE = re.compile(r"[*]|\d{7}")  # in a format


@contextlib.contextmanager
def bounded(longest: float = LONGEST, largest: int = LARGEST) -> Iterator[None]:
    """Raises ChatTemplateError in a template that runs for longer within the block, or makes a larger text."""
    if sys.gettrace() is not None:
        yield
        return
    _watch_operators()
    watch = _Watch(longest, largest)
    sys.settrace(watch.on_call)
    try:
        yield
    except _StoppedError as stopped:
        raise ChatTemplateError(f"the anchor's chat template {stopped}") from None
    finally:
        sys.settrace(None)


def _watch_operators() -> None:
    """Has Jinja call a function of its own for these operators, and not work them out when it compiles."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    ImmutableSandboxedEnvironment.intercepted_binops = OPERATORS


class _StoppedError(BaseException):
    """Says why. Jinja, when it compiles, goes on after any `Exception`."""


class _Watch:
    """Looks at a template as it runs."""

    def __init__(self, longest: float, largest: int) -> None:
        self.longest, self.largest, self.ends = longest, largest, time.thread_time() + longest
        self.lines = self.written = 0
        from jinja2.utils import Namespace

        self.namespace = Namespace

    def on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._count()
        file = frame.f_code.co_filename
        if file == TEMPLATE:
            return self.on_line
        if "jinja2" in file and frame.f_code.co_name in ONE_STEP:
            self._check_step(frame.f_code.co_name, frame.f_locals)
        return None

    def on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._count()
        if event == "return" and isinstance(argument, str):  # what a generator gives out comes this way too
            self.written += len(argument)
            if self.written > self.largest:
                raise self._too_large()
        elif event == "line":
            self._check_variables(frame.f_locals.values())
        return self.on_line

    def _check_variables(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, list | tuple) and len(value) > MANY and self.lines % MANY:
                continue  # not each time
            if isinstance(value, self.namespace):
                self._check_variables(value._Namespace__attrs.values())
            elif _size(value) > self.largest:
                raise self._too_large()

    def _count(self) -> None:
        self.lines += 1
        if self.lines % OFTEN == 0 and time.thread_time() > self.ends:
            raise _StoppedError(f"does not end within {self.longest:g} s")

    def _check_step(self, name: str, given: dict[str, Any]) -> None:
        """Looks at what one of Jinja's functions is given."""
        match name:
            case "call_binop":
                wrong = self._is_large(given["operator"], given["left"], given["right"])
            case "str_join" | "markup_join":
                wrong = _size(given["seq"]) > self.largest
            case "call":
                text = getattr(given.get("_SandboxedEnvironment__obj"), "__self__", None)
                wrong = isinstance(text, str) and self._are_large([text, *given["args"], *given["kwargs"].values()])
            case "wrapper":  # of str.format
                wrong = bool(WIDE.search(given.get("f_self", "")))
            case "do_format":
                wrong = bool(WIDE.search(str(given["value"])))
            case _:
                wrong = self._are_large(list(given.values()))
        if wrong:
            raise self._too_large()

    def _is_large(self, operator: str, left: Any, right: Any) -> bool:
        """What an operator makes of two values."""
        if operator == "%":
            return isinstance(left, str) and bool(WIDE.search(left))
        if isinstance(left, int) and isinstance(right, int):
            digits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            return operator != "+" and digits > DIGITS
        if operator == "+":
            return _size(left) + _size(right) > self.largest
        times = [abs(one) if isinstance(one, int) else _size(one) for one in (left, right)]
        return times[0] * times[1] > self.largest

    def _are_large(self, values: list[Any]) -> bool:
        """Whether a text may come of these that is too large: a number may be its width, two texts its factors."""
        if any(isinstance(value, int) and value > self.largest for value in values):
            return True
        sizes = sorted(map(_size, values), reverse=True)
        return len(sizes) > 1 and sizes[0] * sizes[1] > FACTOR * self.largest

    def _too_large(self) -> _StoppedError:
        return _StoppedError(f"makes a text of more than {self.largest} characters")


# Of Jinja's functions those that make one text of others, or of a width.
ONE_STEP = frozenset(
    (
        *("call", "call_binop", "wrapper", "str_join", "markup_join", "do_center", "do_indent", "do_format"),
        *("do_wordwrap", "do_replace", "do_batch", "sync_do_slice", "sync_do_join", "do_join", "do_tojson"),
        "generate_lorem_ipsum",
    )
)


def _size(value: Any) -> int:
    """Characters of a text, or elements of a list and the characters of the texts in it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return len(value) + sum(len(one) for one in value if isinstance(one, str))
    return 0
