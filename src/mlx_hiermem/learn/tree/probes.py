"""What somebody may type who wants a window: by these texts the tree is shaped, and windows are put into leaves.

A question that reaches another leaf than the one its answer was learnt in gets no answer. The embedder mixes what a
text is about with how it is put, so a window is not only embedded whole, but in the shapes in which it may be asked
for: each sentence with its title; the beginnings of these, as a prompt is a beginning; the title; the questions of
self-study where there are any; and all of it once more in the frame that questions are put in. A title is used if
the document names it: most file names are none. docs/learning.md has the measurements ("Routing agreement").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from mlx_hiermem.learn.corpus.windows import sentences
from mlx_hiermem.learn.records import Window

BEGINNINGS = (0.4, 0.7)  # of a sentence's words
FRAME = "Question: {}\nAnswer:"


def with_subjects(windows: Iterable[Window]) -> Iterator[tuple[Window, str]]:
    """Each window and what it is about: its title, or "" where no window of its document names that."""
    for _, group in itertools.groupby(windows, key=lambda window: window.document):
        document = list(group)
        named = any(names(window.text, part) for window in document for part in window.title.split(": "))
        for window in document:
            yield window, window.title if named else ""


def probes(text: str, subject: str, questions: Sequence[str] = ()) -> list[str]:
    """The probes of one window, without repetitions; `questions` are those of self-study."""
    return framed(list(dict.fromkeys((*statements(text, subject), *questions))))


def framed(texts: list[str]) -> list[str]:
    """Texts as they stand, and once more in the frame of questions."""
    return texts + [FRAME.format(text) for text in texts]


def statements(text: str, subject: str) -> Iterator[str]:
    """The window's own words: whole, its sentences, and their beginnings as far as they name the subject."""
    yield about(text, subject)
    if subject:
        yield subject
    for sentence in sentences(text):
        yield f"{subject}. {sentence}" if subject else sentence
        words = about(sentence, subject).split()
        for share in BEGINNINGS:
            beginning = " ".join(words[: max(1, round(share * len(words)))])
            if not subject or names(beginning, subject):
                yield beginning


def about(text: str, subject: str) -> str:
    """The text, with its subject before it unless it names it itself."""
    return text if not subject or names(text, subject) else f"{subject}. {text}"


def names(text: str, title: str) -> bool:
    """Whether a text contains a title as whole words."""
    return bool(title) and re.search(rf"(?<!\w){re.escape(title)}(?!\w)", text, re.IGNORECASE) is not None
