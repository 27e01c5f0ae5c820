"""The lines of the work folder's files, as Python sees them. Texts with a path in files are a `Path` here."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_hiermem.config import Path


@dataclass(frozen=True)
class Document:
    """One document as a reader gives it. `source` says where it was: a file, or a file and a line."""

    source: str
    title: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """What was not learnt, and why, in words for the user."""

    what: str
    why: str


@dataclass(frozen=True)
class Window:
    """A piece of a document that is learnt as a whole: full sentences, up to a number of tokens.

    `id` counts the windows of a corpus from 0, `document` its documents. `place` says where in the file it begins,
    `page 3` or `line 12`, where that is known.
    """

    id: int
    document: int
    source: str
    title: str
    text: str
    place: str = ""


@dataclass(frozen=True)
class Placed:
    """The leaves in which a window is learnt. The first is its own: labels and sizes count it there."""

    window: int
    leaves: tuple[Path, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt that the user gives, and what is to follow it.

    `document` is a title or a source. A `chat` is learnt in the anchor's chat template; a `framed` prompt is put as
    a question. One without a prompt is a text to learn as it stands.
    """

    document: str
    prompt: str
    answer: str
    chat: bool = False
    framed: bool = False
