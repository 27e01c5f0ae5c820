"""What learning a model and adding to one have in common: stages that are told and timed, and the first two."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
from tokenizers import Tokenizer

from mlx_hiermem.learn import report
from mlx_hiermem.learn.corpus.corpus import Corpus, read_corpus
from mlx_hiermem.learn.settings import AddSettings, LearnSettings, StudySettings
from mlx_hiermem.learn.study.prompts import about_windows, give
from mlx_hiermem.learn.study.study import study
from mlx_hiermem.learn.study.teacher import Teacher, load_teacher
from mlx_hiermem.learn.work import TIMES, Work, write_text
from mlx_hiermem.progress import Progress


class StagedRun:
    """A command that learns: its stages are told to a listener, and timed."""

    def __init__(self, work: Work, listener: report.Listener, first: bool = True) -> None:
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
            self.listener.end(report.corpus_line(corpus, skipped))
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
            self.listener.end(report.study_line(corpus.studied))
