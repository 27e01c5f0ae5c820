"""What learning a model and adding to one have in common: stages that are told and timed, and the first two."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
from tokenizers import Tokenizer

from mlx_hiermem.learn import report
from mlx_hiermem.learn.corpus.corpus import Corpus, read_corpus
from mlx_hiermem.learn.records import Prompt
from mlx_hiermem.learn.settings import AddSettings, LearnSettings, StudySettings
from mlx_hiermem.learn.study.prompts import about_windows, give
from mlx_hiermem.learn.study.stage import Teaching, study
from mlx_hiermem.learn.study.teacher import Teacher, load_teacher
from mlx_hiermem.learn.study.writers import ModelWriter, ServerWriter
from mlx_hiermem.learn.work import STUDIED, TIMES, Ranks, Work, write_text
from mlx_hiermem.progress import Progress
from mlx_hiermem.tokenizer import encode_text


class StagedRun:
    """A command that learns: its stages are told to a listener, and timed."""

    def __init__(self, work: Work, listener: report.Listener, ranks: Ranks | None = None) -> None:
        self.work, self.listener, self.ranks = work, listener, ranks

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tells of a stage, and adds up its seconds."""
        self.listener.begin(name)
        start = time.perf_counter()
        yield
        if not (self.ranks and self.ranks.rank):  # one notes the times
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

    def study(self, corpus: Corpus, prompts: tuple[Prompt, ...], teaching: Teaching | None) -> None:
        """Stages `study` and `prompts`."""
        with self.stage("study"):
            given = about_windows(corpus, prompts)  # may be wrong, so before anything that takes long
            studied = study(self.work, corpus, teaching, self.ranks, self.progress("windows"), self._say)
            give(self.work, given, studied)
            self.listener.end(report.study_line(corpus.studied, self.work.path(STUDIED)))

    def _say(self, line: str) -> None:
        """A line within a stage, which goes on."""
        self.listener.end(line)
        self.listener.begin("study")


def teaching_of(
    settings: LearnSettings | AddSettings, asked: StudySettings, anchor: tuple[nn.Module, Any], digest: str
) -> Teaching | None:
    """Who studies: `anchor` (model, tokenizer), whose weights have the `digest`, where nobody else is named."""
    if not settings.self_study:
        return None
    model, tokenizer = anchor

    def count(text: str) -> int:
        return len(encode_text(tokenizer, text, special=False))

    if settings.teacher_url:
        url, name = settings.teacher_url, settings.teacher_model
        server = partial(ServerWriter, url, name, asked.at_once, asked.timeout)
        return Teaching(asked, f"server {name or url}", None, server, count)
    if settings.teacher:
        load = functools.cache(partial(load_teacher, settings.teacher))
        return Teaching(asked, settings.teacher, load, lambda: ModelWriter(load()), count)
    return Teaching(asked, digest, partial(Teacher, model, tokenizer))
