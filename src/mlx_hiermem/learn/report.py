"""What a run says of itself: to a listener, stage by stage, and in one line about each."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any, Protocol

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.train.log import TrainingProgress
from mlx_hiermem.learn.work import read_rows

NAMED = 3  # of the skipped documents; skipped.jsonl has all


class Listener(Protocol):
    """Shows how far a run is."""

    def begin(self, stage: str) -> None:
        """A stage begins, or is found done."""

    def advance(self, done: int, total: int | None, unit: str) -> None:
        """This much of the stage is done; the total is None where it is not known."""

    def end(self, line: str) -> None:
        """The stage is done, and this came out of it."""

    def training(self, progress: TrainingProgress) -> None:
        """How far the training is."""


class Silent:
    """A listener that shows nothing."""

    def begin(self, stage: str) -> None:
        pass

    def advance(self, done: int, total: int | None, unit: str) -> None:
        pass

    def end(self, line: str) -> None:
        pass

    def training(self, progress: TrainingProgress) -> None:
        pass


def corpus_line(corpus: Corpus, skipped: int) -> str:
    line = f"{corpus.documents:,} documents in {corpus.count:,} windows"
    if not skipped:
        return line
    some = ", ".join(f"{one.what} ({one.why})" for one in itertools.islice(corpus.skipped(), NAMED))
    return f"{line}; {skipped:,} skipped: {some}" + ", …" * (skipped > NAMED)


def study_line(file: pathlib.Path, counts: pathlib.Path) -> str:
    """`counts` says what came of a teacher's replies, where it wrote freely."""
    if not file.exists():
        return "none: texts are learnt as they stand"
    rows, questions, given = 0, 0, 0
    for row in read_rows(file):
        own = "given" in row
        rows, questions, given = rows + 1, questions + ("question" in row and not own), given + own
    line = f"{rows:,} prompts with answers"
    line += f", {questions:,} of them questions" if rows > given else ""
    line += f", {given:,} of them given" if given else ""
    return f"{line}; {_replies(json.loads(counts.read_text()))}" if counts.exists() else line


def _replies(counts: dict[str, int]) -> str:
    """What was not kept of what a teacher wrote."""
    parts = [f"of {counts['replies']:,} replies {counts['no use']:,} were of no use"]
    parts += [f"{counts['unanswered']:,} requests were not answered"] if counts["unanswered"] else []
    parts += [f"{counts['unsupported']:,} records had a number or name that their window has not"]
    parts += [f"{counts['repeated']:,} were repetitions"]
    return ", ".join(parts)


def tree_line(found: dict[str, Any], given: float | None) -> str:
    line = f"{found['depth']} levels of {found['branching']}, {found['leaves_a_window']:.2f} leaves a window"
    if found["agreement"] is not None:
        line += f"; {found['agreement']:.1%} of {found['questions']:,} kept questions reach a leaf of theirs"
    if found["reversed_agreement"] is not None:
        line += f", {found['reversed_agreement']:.1%} of {found['reversed_questions']:,} reversed ones"
    return line + (f"; {given:.1%} of the given ones" if given is not None else "")


def memory_line(memory: MemoryConfig) -> str:
    sizes, layers = ", ".join(map(str, memory.block_sizes)), len(memory.layers)
    return f"{memory.kind} of {sizes} units in {layers} layers, {memory.fetched_parameters / 1e6:.2f} M fetched"


def perplexity_line(perplexity: dict[str, float], of: str) -> str:
    figures = ", ".join(f"{name} {value:.2f}" for name, value in perplexity.items())
    return f"perplexity of {of}: {figures}"
