"""Stage `study`: a teacher writes about every window, freely where it can write, by patterns where it cannot.

    study(work, corpus, Teaching(settings, digest, load=lambda: teacher), ranks, listener)

The windows are studied some at a time, each time a file in `study.parts`, which ranks share. Within a file's work
each reply is kept as it comes, so a killed run asks for nothing twice.

    study.jsonl    {"window", "prompt", "question", "answer", "chat", "reversed"}: in the order of their windows
    written.jsonl  what was written freely, in the forms of `hiermem learn --prompts`, and each line's "window"
    studied.json   how that went: requests, replies of no use, records that the windows do not support
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mlx_hiermem.errors import TeacherError
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.free_study import TRIED, TURNS, FreeStudy, Trial, forms
from mlx_hiermem.learn.study.pattern_study import TOGETHER, in_patterns
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.study.prompts import prompt_of, rows_of, same_words
from mlx_hiermem.learn.study.teacher import Replies, Teacher
from mlx_hiermem.learn.study.writers import Writer
from mlx_hiermem.learn.tree.probes import with_subjects
from mlx_hiermem.learn.work import (
    STUDIED,
    STUDY,
    WRITTEN,
    Ranks,
    Row,
    Work,
    help_make_parts,
    make_parts,
    read_rows,
    with_rows,
    write_rows,
    write_text,
)
from mlx_hiermem.progress import FractionDone, Progress, unheard, unheard_fraction

PARTS = "study.parts"  # a folder in the work folder
WRITTEN_TOGETHER = 32  # windows that are written about freely at a time; ranks take turns by these
NOT_IN_DIGEST = ("at_once", "timeout")  # settings that change nothing of what is written


@dataclass(frozen=True)
class Teaching:
    """Who studies: `load` gives who writes by patterns, `writer` who may write freely; one of them may be missing.

    `identity` names the teacher in digests; `count` says how many tokens a text has.
    """

    settings: StudySettings
    identity: str
    load: Callable[[], Teacher] | None = None
    writer: Callable[[], Writer] | None = None
    count: Callable[[str], int] = len

    @property
    def made_of(self) -> Any:
        settings = {name: value for name, value in asdict(self.settings).items() if name not in NOT_IN_DIGEST}
        return [self.identity, settings, patterns().digest, forms().digest if self.writer else ""]


def study(
    work: Work,
    corpus: Corpus,
    teaching: Teaching | None,
    ranks: Ranks | None = None,
    progress: Progress = unheard,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Writes study.jsonl and returns the stage's digest; without teaching there is none.

    `progress` counts windows, and `say` is told an estimate before a long work begins. An interrupted stage goes on
    with the first thing that the teacher was not asked yet. Raises TeacherError where a server is of no use.
    """

    def clear() -> None:
        for name in (STUDY, WRITTEN, STUDIED):
            work.path(name).unlink(missing_ok=True)

    if teaching is None:
        return work.stage("study", None, [corpus.digest], clear)

    def make() -> None:
        clear()
        _Stage(work, corpus, teaching).make(ranks, progress, say)

    return work.stage("study", teaching.made_of, [corpus.digest], make)


def help_study(work: Work, corpus: Corpus, teaching: Teaching, wanted: Callable[[], bool]) -> None:
    """What another rank than the first does of it."""
    _Stage(work, corpus, teaching).help(wanted)


class _Stage:
    """The work of one stage. Every rank has one, made of the same things."""

    def __init__(self, work: Work, corpus: Corpus, teaching: Teaching) -> None:
        self.work, self.corpus, self.teaching = work, corpus, teaching
        self.mark = hashlib.sha256(json.dumps([corpus.digest, *teaching.made_of]).encode()).hexdigest()[:16]
        self.folder = work.path(PARTS)

    @cached_property
    def teacher(self) -> Teacher:
        assert self.teaching.load is not None
        return self.teaching.load()

    @cached_property
    def writing(self) -> FreeStudy:
        assert self.teaching.writer is not None
        return FreeStudy(self.teaching.writer(), self.teaching.count, self.teaching.settings)

    @cached_property
    def trial(self) -> Trial | None:
        """How the writer did on a few windows, which is found out once; None where there is no writer."""
        if self.teaching.writer is None:
            return None
        file = self._trial_file
        if not file.exists():
            numbers = dict.fromkeys(self.corpus.count * i // TRIED for i in range(TRIED))
            found = self.writing.trial(list(self.corpus.read(numbers)), Replies(file.with_suffix(".replies")))
            if not (found.able or self.teaching.load):
                file.with_suffix(".replies").unlink(missing_ok=True)  # a larger model may stand there then
                return found  # which stops this run; the next one asks again
            write_text(file, json.dumps(found.to_json()) + "\n")
        return self._read_trial()

    @property
    def _trial_file(self) -> pathlib.Path:
        return self.folder / f"{self.mark}-trial.json"

    def _read_trial(self) -> Trial:
        return Trial(**json.loads(self._trial_file.read_text(encoding="utf-8")))

    @property
    def free(self) -> bool:
        """Whether the teacher writes freely. Raises TeacherError where it cannot, and can do nothing else."""
        if self.trial is None or self.trial.able:
            return self.trial is not None
        if self.teaching.load is None and not self.trial.replies:
            raise TeacherError(
                f"the teacher answered none of the first requests: {self.trial.fault}",
                "Correct that, or take another one.",
            )
        if self.teaching.load is None:
            raise TeacherError(
                f"the teacher cannot write what is asked for: {self.trial.useful:.0%} of {self.trial.replies} "
                f"replies were of use, and {self.trial.kept:.0%} of what these say stands in the documents",
                "Take a larger model, or leave it out: the anchor studies then.",
            )
        return False

    def make(self, ranks: Ranks | None, progress: Progress, say: Callable[[str], None]) -> None:
        """All of it, with the help of other ranks."""
        self.folder.mkdir(exist_ok=True)
        free, done, total = self.free, 0, self.corpus.count
        if free:
            say(self._estimate())

        def there(part: _Part) -> None:
            nonlocal done
            done += len(part.windows)
            progress(done, total)

        def write(part: _Part, file: pathlib.Path) -> None:
            self._write(part, file, lambda fraction: progress(done + int(fraction * len(part.windows)), total))

        with ranks.sharing("study") if ranks else contextlib.nullcontext():
            files = make_parts(self._file, lambda: self._parts(free), write, there)
        if free:
            self._put_together(files)
        else:
            write_rows(self.work.path(STUDY), (row for file in files for row in read_rows(file)))
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    def help(self, wanted: Callable[[], bool]) -> None:
        """Some of it, for the first rank, which has made its trial.

        Nothing where this rank's teacher has no trial: the work may be done before this rank has come to it,
        and a rank that was started with another teacher cannot help.
        """
        free = False
        if self.teaching.writer is not None:
            try:
                free = self._read_trial().able
            except FileNotFoundError:
                return

        def write(part: _Part, file: pathlib.Path) -> None:
            self._write(part, file, unheard_fraction)

        help_make_parts(self._file, lambda: self._parts(free), write, wanted)

    def _file(self, number: int) -> pathlib.Path:
        return self.folder / f"{self.mark}-{number}.jsonl"

    def _parts(self, free: bool) -> Iterator[_Part]:
        pairs = with_subjects(self.corpus.windows())
        for number in itertools.count():
            if not (some := list(itertools.islice(pairs, WRITTEN_TOGETHER if free else TOGETHER))):
                return
            yield _Part(number, some, free)

    def _write(self, part: _Part, file: pathlib.Path, tell: FractionDone) -> None:
        """The file of some windows that are studied together."""
        if not part.free:
            in_patterns(part.windows, self.teacher, self.teaching.settings, part.number, file, tell)
            return
        kept = Replies(file.with_suffix(".replies"), self._trial_file.with_suffix(".replies"))
        write_rows(file, self.writing.records([window for window, _ in part.windows], kept, tell))
        kept.file.unlink(missing_ok=True)

    def _put_together(self, files: Iterable[pathlib.Path]) -> None:
        """written.jsonl of all parts, and what is learnt of it."""
        counts = Counter[str]()
        rows = (row for file in files for row in read_rows(file))
        write_rows(self.work.path(WRITTEN), _said_once(rows, self.corpus.windows(), counts))
        pairs = with_rows(
            with_subjects(self.corpus.windows()), self.work.path(WRITTEN), lambda pair: int(pair[0].id)
        )
        mark = "" if self.teaching.settings.measured else "learnt"
        learnt = (
            row
            for (window, subject), own in pairs
            for record in own
            for row in rows_of(prompt_of(record), window.id, subject, mark)
        )
        write_rows(self.work.path(STUDY), learnt)
        write_text(self.work.path(STUDIED), json.dumps(counts) + "\n")

    def _estimate(self) -> str:
        """How much is to be written and read, and how long that takes if it goes on like the first windows."""
        trial, windows = self.trial, self.corpus.count
        assert trial is not None
        own = sum(self.teaching.count(window.text) for window in self.corpus.windows())
        tokens = self.teaching.settings.amount * own
        turns = min(tokens / max(trial.tokens * windows, 1.0), TURNS)  # through all forms, for a window
        return (
            f"about {tokens:,.0f} tokens to write for {own:,} tokens in {windows:,} windows, "
            f"{turns * trial.asked * windows:,.0f} to read, {_time(turns * trial.seconds * windows)}"
        )


@dataclass(frozen=True)
class _Part:
    """Windows that are studied together, each with its subject."""

    number: int
    windows: list[tuple[Window, str]]
    free: bool


def _said_once(rows: Iterable[Row], windows: Iterable[Window], counts: Counter[str]) -> Iterator[Row]:
    """Each document's records once: of windows that say the same, the one that has most of its words has it.

    Sums up the counts of the parts.
    """

    def records() -> Iterator[Row]:
        for row in rows:
            if "counts" in row:
                counts.update(row["counts"])
            else:
                yield row

    by_window = itertools.groupby(records(), key=lambda row: int(row["window"]))
    following = next(by_window, None)
    for _, document in itertools.groupby(windows, key=lambda window: window.document):
        best = dict[str, tuple[int, Row]]()  # by what is said: how many words are the window's, and the record
        for window in document:
            if following is None or following[0] != window.id:
                continue
            words = set(same_words(window.text).split())
            for row in following[1]:
                try:
                    one = prompt_of(row)
                except ValueError:  # in parts of an earlier version: a statement without its rest
                    counts["records"] -= 1
                    continue
                common = len(words & set(same_words(f"{one.prompt} {one.answer}").split()))
                said = same_words(one.prompt or one.answer)
                counts.update({"repeated": said in best, "records": -(said in best)})
                if said not in best or common > best[said][0]:
                    best[said] = common, row
            following = next(by_window, None)
        yield from sorted((row for _, row in best.values()), key=lambda row: int(row["window"]))


def _time(seconds: float) -> str:
    long = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"about {long}" if seconds > 90 else "about a minute"
