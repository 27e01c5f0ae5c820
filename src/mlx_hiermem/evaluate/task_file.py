"""Task files row by row: every row is checked before anything runs, and what is wrong is named by file and line."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mlx_hiermem.errors import TaskError
from mlx_hiermem.files import MALFORMED, parse_json, read_lines

Row = dict[str, Any]
T = TypeVar("T")
HINT = "Correct the file, or leave such rows out with --skip-bad."


def read_rows(
    file: pathlib.Path, parse: Callable[[int, Row], T], skip_bad: bool = False, hint: str = HINT
) -> tuple[list[T], list[str]]:
    """`parse` of each row and its line's number, and what is said of the bad ones: those it raises an error for.

    Raises TaskError for a file that cannot be read, and for bad rows unless they are to be skipped.
    """
    found, bad = list[T](), list[str]()
    for number, line in read_lines(file, TaskError):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("is no JSON object")
            found.append(parse(number, row))
        except MALFORMED as error:
            bad.append(f"line {number} {_reason(error)}")
    refuse(file, bad, skip_bad, hint)
    return found, bad


def refuse(file: pathlib.Path, bad: Sequence[str], skip_bad: bool = False, hint: str = HINT) -> None:
    """Raises TaskError that names bad rows, unless they are to be skipped."""
    if bad and not skip_bad:
        more = f"; and {len(bad) - 3} lines more" if len(bad) > 3 else ""
        raise TaskError(f"{file}: {'; '.join(bad[:3])}{more}", hint)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "is not JSON"
    return f"has no {error}" if isinstance(error, KeyError) else str(error)


def text_in(row: Row, name: str) -> str:
    """A field that must have a text. Raises KeyError or ValueError."""
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"has no text in '{name}'")
    return row[name]


def texts_in(row: Row, name: str, least: int = 0) -> list[str]:
    """A field that must have a list of texts. Raises KeyError or ValueError."""
    values = row[name]
    if not isinstance(values, list) or len(values) < least:
        raise ValueError(f"needs {least} or more texts in '{name}'")
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"has an empty text in '{name}'")
    return values
