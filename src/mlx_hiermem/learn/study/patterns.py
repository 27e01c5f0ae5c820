"""patterns.toml: what a model is shown so that it goes on in the same way, and the words that are passed over."""

from __future__ import annotations

import functools
import pathlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_hiermem.files import file_digest

PATTERNS = pathlib.Path(__file__).with_name("patterns.toml")


@dataclass(frozen=True)
class Pattern:
    """Examples that a model goes on with: a line for each subject that is shown."""

    lines: tuple[str, ...]
    statement: bool  # whether the answer completes a line; otherwise a line is a question


@dataclass(frozen=True)
class Patterns:
    """All that patterns.toml says; the comments there say what each is for."""

    digest: str
    openers: re.Pattern[str]
    function_words: frozenset[str]
    asking_words: frozenset[str]
    other_words: str
    asked_for: str
    example: str
    shown: tuple[tuple[str, str], ...]  # (subject, what is asked for)
    shown_reversed: tuple[tuple[str, str, str], ...]  # (subject, what is said of it, value)
    forward: tuple[Pattern, ...]
    backward: tuple[Pattern, ...]
    own: Sequence[int]  # patterns, by number, in which the sentence's own words for what is asked for are tried
    synonym: Sequence[int]  # other words
    rare: Sequence[int]  # the own words of a sentence of which there are few alike


@functools.cache
def patterns() -> Patterns:
    """Reads the file, once."""
    data = tomllib.loads(PATTERNS.read_text(encoding="utf-8"))
    numbers = {
        use: [number for number, row in enumerate(data["pattern"]) if use in row["for"]]
        for use in ("own", "synonym", "rare")
    }
    return Patterns(
        file_digest(PATTERNS),
        re.compile("|".join(data["openers"].split()), re.IGNORECASE),
        frozenset(data["function_words"].split()),
        frozenset(data["asking_words"].split()),
        data["other_words"],
        data["asked_for"],
        data["example"],
        tuple((subject, what) for subject, what in data["shown"]),
        tuple((subject, what, value) for subject, what, value in data["shown_reversed"]),
        tuple(Pattern(tuple(row["lines"]), row["statement"]) for row in data["pattern"]),
        tuple(Pattern(tuple(row["lines"]), row["statement"]) for row in data["reversed_pattern"]),
        **numbers,
    )
