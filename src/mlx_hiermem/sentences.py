"""A text's sentences, and the words of English that say nothing by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

# A sentence ends with its mark, closing quotes and brackets included, before something that can begin one: a small
# letter can where the mark follows a word too long for an abbreviation. It also ends with a blank line, and scripts
# without spaces end theirs with a mark of their own.
BETWEEN = re.compile(
    r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-z])|(?<=[^\W\d_]{5}[.!?])\s+|(?<=[。！？])|\n\s*\n"
)

PLAIN = """
a i
am an as at be by do go he if in is it me my no of on or so to up us we
about above after again all also although among and another any are because been before being below between both
but can could did does down during each either few first for from had has have her him his how however into its
itself just made many may more most much must near neither never not now off often one only other others our out
over own same she should since some such than that the their them then there these they this those through too
two under until upon use used very was were what when where which while who whose why will with within without
would years yet you your
"""
PLAIN_WORDS = frozenset(PLAIN.split())  # function words, in small letters


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space between them dropped and made single within them."""
    return [sentence for _, sentence in placed(text)]


def placed(text: str) -> Iterator[tuple[int, str]]:
    """(where in the text it begins, sentence)."""
    start = 0
    for end in (*(mark.end() for mark in BETWEEN.finditer(text)), len(text)):
        piece = text[start:end]  # what closes the sentence belongs to it
        if sentence := " ".join(piece.split()):
            yield start + len(piece) - len(piece.lstrip()), sentence
        start = end
