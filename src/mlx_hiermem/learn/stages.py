"""What learning a model and adding to one have in common: stages that are told and timed, and the first two."""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.nn as nn
from tokenizers import Tokenizer

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.learn.corpus.corpus import Corpus, read_corpus
from mlx_hiermem.learn.settings import AddSettings, LearnSettings, StudySettings
from mlx_hiermem.learn.study.prompts import about_windows, give
from mlx_hiermem.learn.study.study import study
from mlx_hiermem.learn.study.teacher import Teacher, load_teacher
from mlx_hiermem.learn.train.monitor import TrainingProgress
from mlx_hiermem.learn.work import TIMES, Work, read_rows, write_text
from mlx_hiermem.progress import Progress

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


class StagedRun:
    """A command that learns: its stages are told to a listener, and timed."""

    def __init__(self, work: Work, listener: Listener, first: bool = True) -> None:
        """`first`: whether this is the rank that notes the times."""
        self.work, self.listener, self._first = work, listener, first

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tells of a stage, and adds up its seconds."""
        self.listener.begin(name)
        start = time.perf_counter()
        yield
        if self._first:
            times = self.times
            times[name] = round(times.get(name, 0.0) + time.perf_counter() - start, 1)
            with self.work.writing():
                write_text(self.work.path(TIMES), json.dumps(times) + "\n")

    @property
    def times(self) -> dict[str, float]:
        """Seconds of each stage so far, those of interrupted runs included."""
        file = self.work.path(TIMES)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def progress(self, unit: str) -> Progress:
        """Tells the listener how far a stage is."""
        return lambda done, total: self.listener.advance(done, total, unit)

    def read(
        self, sources: Sequence[str], tokenizer: Tokenizer, settings: LearnSettings | AddSettings
    ) -> tuple[Corpus, int]:
        """Stage `corpus`; returns it and the number of documents that were skipped."""
        with self.stage("corpus"):
            count = itertools.count(1)
            corpus = read_corpus(
                self.work,
                sources,
                tokenizer,
                settings.corpus,
                lambda source: self.listener.advance(next(count), None, "documents"),
            )
            skipped = sum(1 for _ in corpus.skipped())
            self.listener.end(corpus_line(corpus, skipped))
        return corpus, skipped

    def study(
        self,
        corpus: Corpus,
        settings: LearnSettings | AddSettings,
        asked: StudySettings,
        anchor: tuple[nn.Module, Any],
        digest: str,
    ) -> None:
        """Stages `study` and `prompts`. `anchor` (model, tokenizer) is the teacher where no other is named; its
        weights have the `digest`."""
        with self.stage("study"):
            prompts = about_windows(corpus, settings.prompts)  # may be wrong, so before anything that takes long
            teacher: Callable[[], Teacher] = partial(Teacher, *anchor)
            if settings.teacher:
                teacher, digest = partial(load_teacher, settings.teacher), settings.teacher
            studied = study(
                self.work,
                corpus,
                teacher if settings.self_study else None,
                digest,
                asked,
                self.progress("windows"),
            )
            give(self.work, prompts, studied)
            self.listener.end(study_line(corpus.studied))


# What came of a stage, in one line


def corpus_line(corpus: Corpus, skipped: int) -> str:
    line = f"{corpus.documents:,} documents in {corpus.count:,} windows"
    if not skipped:
        return line
    some = ", ".join(f"{one.what} ({one.why})" for one in itertools.islice(corpus.skipped(), NAMED))
    return f"{line}; {skipped:,} skipped: {some}" + ", …" * (skipped > NAMED)


def study_line(file: pathlib.Path) -> str:
    if not file.exists():
        return "none: texts are learnt as they stand"
    rows, questions, given = 0, 0, 0
    for row in read_rows(file):
        own = "given" in row
        rows, questions, given = rows + 1, questions + ("question" in row and not own), given + own
    line = f"{rows:,} prompts with answers"
    line += f", {questions:,} of them questions" if rows > given else ""
    return line + (f", {given:,} of them given" if given else "")


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
