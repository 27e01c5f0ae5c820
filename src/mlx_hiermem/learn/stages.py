"""What learning a model and adding to one have in common: stages that are told and timed, and the first two."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
from tokenizers import Tokenizer

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.learn.corpus.corpus import Corpus, read_corpus
from mlx_hiermem.learn.ranks import Ranks
from mlx_hiermem.learn.settings import AddSettings, LearnSettings, Prompt, StudySettings
from mlx_hiermem.learn.status import STATUS, Listener, Recorder
from mlx_hiermem.learn.study.prompts import about_windows, give
from mlx_hiermem.learn.study.stage import Teaching, study
from mlx_hiermem.learn.study.teacher import Teacher, load_teacher
from mlx_hiermem.learn.study.writers import ModelWriter, ServerWriter
from mlx_hiermem.learn.work import STUDIED, TIMES, Work, read_rows, write_text
from mlx_hiermem.progress import Progress
from mlx_hiermem.tokenizer import encode_text

NAMED = 3  # of the skipped documents; skipped.jsonl has all


class StagedRun:
    """A command that learns: its stages are told to a listener, and timed."""

    def __init__(self, work: Work, listener: Listener, ranks: Ranks | None = None) -> None:
        self.work, self.ranks = work, ranks
        self.listener = listener if ranks and ranks.rank else Recorder(listener, work.path(STATUS))  # one writes it

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
        self,
        sources: Sequence[str],
        tokenizer: Tokenizer,
        settings: LearnSettings | AddSettings,
        only: Collection[str] | None = None,
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
                only,
            )
            skipped = sum(1 for _ in corpus.skipped())
            self.listener.end(corpus_line(corpus, skipped))
        return corpus, skipped

    def study(self, corpus: Corpus, prompts: tuple[Prompt, ...], teaching: Teaching | None) -> None:
        """Stages `study` and `prompts`."""
        with self.stage("study"):
            given = about_windows(corpus, prompts)  # may be wrong, so before anything that takes long
            studied = study(self.work, corpus, teaching, self.ranks, self.progress("windows"), self._say)
            give(self.work, given, studied)
            self.listener.end(study_line(corpus.studied, self.work.path(STUDIED)))

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


# What came of a stage, in one line


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
