"""What commands that learn have in common: a work folder of their own, and stages that are shown and timed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.nn as nn

from mlx_hiermem.config import AnchorIdentity
from mlx_hiermem.errors import OutputError
from mlx_hiermem.learn.corpus.readers import WORK
from mlx_hiermem.learn.settings import AddSettings, LearnSettings
from mlx_hiermem.learn.study.teacher import Teacher, load_teacher
from mlx_hiermem.learn.telling import Listener
from mlx_hiermem.learn.work import Work, write_text

ANCHOR, BANK, LEARNING = "anchor", "bank", "learning"  # of a model
TRAINING, TIMES = "training", "times.json"  # of the work folder


def work_folder(model: pathlib.Path) -> pathlib.Path:
    """Where everything is until the model has it."""
    return model.absolute().with_name(model.name + WORK)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[Work]:
    """The work folder, for one command at a time. Raises OutputError where another one has it."""
    work = Work(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield work
    except BlockingIOError as error:
        raise OutputError(f"another process is at work in {folder}", "Wait for it to end.") from error
    finally:
        os.close(descriptor)


class Stages:
    """A command's work: `stage` by stage, each told to the listener."""

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

    def progress(self, unit: str) -> Callable[[int, int], None]:
        """Tells the listener (done, total)."""
        return lambda done, total: self.listener.advance(done, total, unit)

    def counter(self, unit: str) -> Callable[[str], None]:
        """Tells the listener how often it was called."""
        count = itertools.count(1)
        return lambda what: self.listener.advance(next(count), None, unit)


def find_teacher(
    settings: LearnSettings | AddSettings, model: nn.Module, tokenizer: Any, anchor: AnchorIdentity
) -> tuple[Callable[[], Teacher] | None, str]:
    """What loads the model that studies (None: nobody does), and what it is known by."""
    if not settings.self_study:
        return None, ""
    if settings.teacher:
        return functools.partial(load_teacher, settings.teacher), settings.teacher
    return functools.partial(Teacher, model, tokenizer), anchor.weights_digest
