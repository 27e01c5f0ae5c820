"""How far long work is, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total), in a unit that the caller knows: bytes, windows, examples


def unheard(done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


FractionDone = Callable[[float], None]  # how much of a piece of work is done, from 0 to 1


def unheard_fraction(done: float) -> None:
    """A `FractionDone` that shows nothing."""
