"""The stages of a run of learning: told to a listener, timed, and kept in `status.json` for whoever watches it.

    status = read_status(pathlib.Path("my-model"))    # {"state": "running", "stage": "training", ...}

The status is written at a calm pace, and never stops a run: what cannot be written is left out. The first two
stages, `corpus` and `study`, are here too: learning a model and adding to one have them in common.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import mlx.nn as nn
from tokenizers import Tokenizer

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import OutputError
from mlx_hiermem.files import write_json
from mlx_hiermem.learn.corpus.corpus import Corpus, read_corpus
from mlx_hiermem.learn.settings import AddSettings, LearnSettings, PromptPair, StudySettings
from mlx_hiermem.learn.study.prompts import about_windows, give
from mlx_hiermem.learn.study.stage import Teaching, study
from mlx_hiermem.learn.study.teacher import Teacher, load_teacher
from mlx_hiermem.learn.study.writers import ModelWriter, ServerWriter
from mlx_hiermem.learn.work import STUDIED, TIMES, Ranks, Work, read_rows, work_folder, write_text
from mlx_hiermem.progress import Progress
from mlx_hiermem.tokenizer import encode_text

if TYPE_CHECKING:
    from mlx_hiermem.learn.train.monitor import TrainingProgress

STATUS = "status.json"
REPORT = "learning/report.json"  # of a model folder that is done
PACE = 2.0  # seconds between two writings
POINTS = 400  # of the loss that are kept; beyond that every second one goes
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


class Recorder:
    """Passes on what a run tells its listener, and keeps it in `file`."""

    def __init__(self, listener: Listener, file: pathlib.Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._listener, self._file, self._clock, self._written = listener, file, clock, 0.0
        self._since: tuple[float, int] | None = None  # when the stage's work began, and what was done of it then
        self._status: dict[str, Any] = {"pid": os.getpid(), "stages": [], "stage": "", "loss": [], "measured": []}

    def begin(self, stage: str) -> None:
        self._listener.begin(stage)
        self._since = None
        self._keep(stage=stage, done=0, total=None, unit="", doing="", seconds_left=None, at_once=True)

    def advance(self, done: int, total: int | None, unit: str) -> None:
        self._listener.advance(done, total, unit)
        self._keep(done=done, total=total, unit=unit, seconds_left=self._left(done, total))

    def end(self, line: str) -> None:
        self._listener.end(line)
        self._status["stages"].append({"stage": self._status["stage"], "line": line})
        self._keep(at_once=True)

    def training(self, progress: TrainingProgress) -> None:
        self._listener.training(progress)
        if progress.losses:
            losses = {name: round(loss, 4) for name, loss in progress.losses.items() if math.isfinite(loss)}
            row = {"tokens": progress.tokens, "job": progress.job, "losses": losses}
            self._status["measured"] = [*self._status["measured"], row][-POINTS:]
        if progress.doing == "learning" and progress.loss is not None and math.isfinite(progress.loss):
            self._note_loss(progress.tokens, progress.loss)
        if progress.doing in ("learning", "hidden states"):
            self._keep(
                done=progress.tokens,
                total=progress.total,
                unit="tokens",
                doing=f"{progress.doing} of subtree {progress.job}" if progress.doing != "learning" else "",
                seconds_left=progress.seconds_left,
            )

    def _note_loss(self, tokens: int, loss: float) -> None:
        points = self._status["loss"]
        points.append([tokens, round(loss, 4)])
        if len(points) > POINTS:
            self._status["loss"] = points[1::2]

    def _left(self, done: int, total: int | None) -> float | None:
        """Seconds, if the stage goes on as it has."""
        now = self._clock()
        since, before = self._since = self._since or (now, done)
        return (now - since) / (done - before) * (total - done) if total and done > before else None

    def _keep(self, at_once: bool = False, **changed: Any) -> None:
        self._status |= changed
        if not at_once and self._clock() - self._written < PACE:
            return
        with contextlib.suppress(OutputError, OSError):
            write_json(self._file, self._status | {"updated": time.time()}, indent=None)
        self._written = self._clock()


def forget_status(folder: pathlib.Path) -> None:
    """A run has ended well: what is kept of its work folder is no run any more."""
    with contextlib.suppress(OSError):
        (folder / STATUS).unlink(missing_ok=True)


def read_status(model: pathlib.Path, alive: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """How far the learning of a model folder is. `state` is `running`, `stopped`, `done`, or `nothing` where there
    is none. Whether a run's process is there can be told for this machine only."""
    found = _read(work_folder(model) / STATUS)
    if found is not None:
        return found | {"state": "running" if (alive or _alive)(int(found.get("pid", 0))) else "stopped"}
    report = _read(model / REPORT)
    return {"state": "nothing"} if report is None else {"state": "done", "report": report}


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # somebody else's
    return process > 0


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

    def study(self, corpus: Corpus, prompts: tuple[PromptPair, ...], teaching: Teaching | None) -> None:
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
