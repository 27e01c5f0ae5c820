"""`hiermem` in this process, as a test calls it."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mlx_hiermem.apps.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command has printed, and its exit status."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def runner(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *group: str, columns: int = 200
) -> Run:
    """Runs commands (of a group, such as `bank`) on a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(columns))

    def call(*arguments: str | pathlib.Path) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["hiermem", *group, *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capfd.readouterr())

    return call
