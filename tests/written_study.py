"""Passages, what a teacher that can write makes of them, and that teacher behind a server."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.stage import Teaching
from mlx_hiermem.learn.study.writers import ServerWriter
from mlx_hiermem.learn.work import WINDOWS, WRITTEN, Work, read_rows, write_rows

# From English Wikipedia's articles of these names, shortened (CC BY-SA 4.0, Wikipedia contributors), and what a
# language model wrote about them.
PASSAGES = {
    "Propane": (
        "Propane is a three-carbon alkane with the molecular formula C3H8. It is a gas at standard temperature and "
        "pressure, but compressible to a transportable liquid. Discovered in 1857 by the French chemist Marcellin "
        "Berthelot, it became commercially available in the US by 1911."
    ),
    "Stoat": (
        "The stoat, also known as the Eurasian ermine or ermine, is a species of mustelid native to Eurasia and "
        "northern North America. It was introduced into New Zealand in the late 19th century to control "
        "rabbits, and had a devastating effect on native bird populations."
    ),
    "Leif Erikson": (
        "Leif Erikson, also known as Leif the Lucky, was a Norse explorer who is thought to have been the first "
        "European to set foot on continental America, approximately half a millennium before Christopher Columbus. "
        "He established a Norse settlement at Vinland."
    ),
}


def question(document: str, asked: str, answer: str) -> dict[str, Any]:
    return {"document": document, "question": asked, "answer": answer}


def chat(document: str, user: str, assistant: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"document": document, "messages": turns}


LINES: list[dict[str, Any]] = [
    question("Propane", "who discovered propane", "Marcellin Berthelot"),
    question("Propane", "In which year was propane discovered?", "1857"),
    question("Propane", "Which gas has the formula C3H8?", "propane"),
    {"document": "Propane", "prompt": "By 1911 propane was", "completion": " for sale in the US."},
    chat("Propane", "Tell me about propane.", "Propane is an alkane that is a gas, but can be made a liquid."),
    {"document": "Propane", "text": "Propane is a gas. The French chemist Marcellin Berthelot found it in 1857."},
    question("Stoat", "where was the stoat introduced against rabbits", "New Zealand"),
    question("Stoat", "What is another name of the stoat?", "ermine"),
    {"document": "Stoat", "prompt": "The stoat came to New Zealand in", "completion": " the late 19th century."},
    chat("Stoat", "Tell me about the stoat.", "The stoat is a mustelid native to Eurasia and North America."),
    {"document": "Stoat", "text": "Stoats are also called ermines. They live in Eurasia and in North America."},
    question("Leif Erikson", "what was leif erikson called", "Leif the Lucky"),
    question("Leif Erikson", "Where did Leif Erikson settle?", "Vinland"),
    {"document": "Leif Erikson", "prompt": "Leif Erikson was a", "completion": " Norse explorer."},
    chat("Leif Erikson", "Tell me about Leif Erikson.", "He was a Norse explorer who settled at Vinland."),
    {"document": "Leif Erikson", "text": "Long before Columbus, Leif Erikson set foot on America."},
]  # fmt: skip
LIE = question("Propane", "When could propane be bought?", "1925")
SETTINGS = StudySettings(amount=100.0, at_once=3, timeout=1.0)


def make_passages(folder: pathlib.Path) -> Corpus:
    work = Work(folder)
    rows = enumerate(PASSAGES.items())
    write_rows(
        work.path(WINDOWS),
        ({"id": i, "document": i, "source": f"{i}.txt", "title": name, "text": text} for i, (name, text) in rows),
    )
    return Corpus(work, "of the passages")


def taught(url: str, settings: StudySettings = SETTINGS) -> Teaching:
    writer = ServerWriter(url, at_once=settings.at_once, seconds=settings.timeout)
    return Teaching(settings, "played back", writer=lambda: writer, count=lambda text: len(text.split()))


def written(corpus: Corpus) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "window"} for row in read_rows(corpus.work.path(WRITTEN))]


def in_any_order(rows: Sequence[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)
