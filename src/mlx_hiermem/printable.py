"""Texts of others: made safe for a terminal, which what a model, a bank or a file says must not control.

An ESC sequence in a label could clear the screen, set the window's title or answer a question in the user's place.
"""

from __future__ import annotations

from mlx_hiermem.errors import ArgumentError

# Control characters but tab and newline; half a surrogate pair, which no terminal can be sent.
UNSAFE: dict[int, str | None] = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")})
UNSAFE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def printable(text: str) -> str:
    """The text without control characters; tabs and newlines stay, half a surrogate pair becomes a sign."""
    return text if text.isprintable() else text.translate(UNSAFE)


def require_unicode(text: str) -> None:
    """Raises ArgumentError for half a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"the text is not valid Unicode (at {error.start + 1})", "Correct it.") from error
