"""What somebody may type who wants a window: by these texts the tree is shaped, and windows are put into leaves.

A question that reaches another leaf than the one its answer was learnt in gets no answer. The embedder mixes what a
text is about with how it is put, so a window is not only embedded whole, but in the shapes in which it may be asked
for: each sentence with its title, the beginnings of these (a prompt is a beginning), its title alone, and the
questions of self-study where there are any. docs/learning.md has the measurements ("Routing agreement").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mlx_hiermem.learn import Window
from mlx_hiermem.learn.windows import sentences

BEGINNINGS = (0.4, 0.7)  # of a sentence's words


def probes(window: Window, questions: Sequence[str] = ()) -> list[str]:
    """The probes of one window, without repetitions; `questions` are those of self-study."""
    return list(dict.fromkeys(_probes(window, questions)))


def _probes(window: Window, questions: Sequence[str]) -> Iterator[str]:
    yield whole(window)
    if window.title:
        yield window.title
    for sentence in sentences(window.text):
        yield titled(sentence, window.title)
        words = titled(sentence, window.title, always=False).split()
        for share in BEGINNINGS:
            beginning = " ".join(words[: max(1, round(share * len(words)))])
            if not window.title or names(beginning, window.title):
                yield beginning
    yield from questions


def whole(window: Window) -> str:
    return titled(window.text, window.title, always=False)


def titled(text: str, title: str, always: bool = True) -> str:
    """The text with its title before it; unless `always`, only where the text does not name it itself."""
    if not title or (not always and names(text, title)):
        return text
    return f"{title}. {text}"


def names(text: str, title: str) -> bool:
    """Whether a text contains a title as whole words."""
    return re.search(rf"(?<!\w){re.escape(title)}(?!\w)", text, re.IGNORECASE) is not None
