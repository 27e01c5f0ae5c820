"""How training goes: figures for a progress bar, a line now and then in a log that survives a kill, a plot."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.errors import MissingDependencyError
from mlx_hiermem.files import write_json_lines


@dataclass(frozen=True)
class TrainingProgress:
    """Where a rank's training is. `doing` is `hidden states` (of one job), `learning`, `measured` or `known`."""

    doing: str
    job: str
    tokens: int  # learnt in all this rank's jobs, those of earlier runs included
    total: int
    tokens_per_second: float  # since this run started
    loss: float | None = None  # mean of the latest steps
    losses: dict[str, float] | None = None  # of the job's held-out texts, by memory, where they were measured
    known: tuple[float, float] | None = None  # parts of the job's texts: known, and said right by greedy decoding

    @property
    def seconds_left(self) -> float | None:
        """None while the speed is not known."""
        return (self.total - self.tokens) / self.tokens_per_second if self.tokens_per_second else None


Listener = Callable[[TrainingProgress], None]


class ProgressMeter:
    """Adds up what a rank's jobs report, and tells it as `TrainingProgress`."""

    def __init__(self, listener: Listener, total: int) -> None:
        """`total`: tokens of all the rank's jobs, over all epochs."""
        self._listener, self._total, self._tokens, self._job, self._loss = listener, total, 0, "", 0.0
        self._learnt, self._seconds, self._last = 0, 0.0, time.perf_counter()
        self._rested = dict[str, int]()

    def begin(self, job: str, tokens: int) -> None:
        """A job starts, which has these tokens behind it."""
        self._job, self._loss, self._last = job, 0.0, time.perf_counter()
        self._tokens += tokens

    def rested(self, tokens: int) -> None:
        """So many tokens of the present job were known, and not learnt again: they count as no work."""
        self._total += self._rested.get(self._job, 0) - tokens
        self._rested[self._job] = tokens

    def measured(self, losses: dict[str, float]) -> None:
        """Mean losses on held-out texts, by memory."""
        self._last = time.perf_counter()
        self._listener(TrainingProgress("measured", self._job, self._tokens, self._total, 0.0, losses=losses))

    def known(self, known: float, said: float) -> None:
        """Of the job's texts these parts are known, and said right."""
        self._last = time.perf_counter()
        now = TrainingProgress("known", self._job, self._tokens, self._total, 0.0, known=(known, said))
        self._listener(now)

    def states(self, done: int, total: int) -> None:
        """Of the job's tokens `done` have their hidden states."""
        self._last = time.perf_counter()
        self._listener(TrainingProgress("hidden states", self._job, done, total, 0.0))

    def learnt(self, tokens: int, loss: float) -> None:
        """A step has learnt these tokens, at this mean loss."""
        now = time.perf_counter()
        self._learnt, self._seconds, self._last = self._learnt + tokens, self._seconds + now - self._last, now
        self._tokens += tokens
        self._loss = 0.9 * self._loss + 0.1 * loss if self._loss else loss
        speed = self._learnt / self._seconds
        self._listener(TrainingProgress("learning", self._job, self._tokens, self._total, speed, self._loss))


class Log:
    """One JSON object a line. `size` goes into a commit, and what a killed run wrote after it is cut off."""

    def __init__(self, file: pathlib.Path, size: int) -> None:
        self.file, self.size = file, size
        with file.open("ab") as out:
            out.truncate(size)

    def add(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode()
        with self.file.open("ab") as out:
            out.write(line)
        self.size += len(line)


def read_log(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of a log; none where there is no file."""
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def merge_logs(files: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """One log of several, in the order given. Raises OutputError where it cannot be written."""
    write_json_lines(out, (row for file in files for row in read_log(file)))


def plot(log: pathlib.Path, image: pathlib.Path) -> None:
    """Loss over tokens as PNG: a line a job, and a point for each measurement on held-out texts.

    Raises MissingDependencyError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a plot needs matplotlib", "pip install 'mlx-hiermem[plots]'") from error
    rows = list(read_log(log))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, job in enumerate(dict.fromkeys(row["job"] for row in rows)):
        steps = [row for row in rows if row["job"] == job and "loss" in row]
        held = [row for row in rows if row["job"] == job and "heldout" in row]
        colour = f"C{number % 10}"
        axes.plot([row["tokens"] for row in steps], [row["loss"] for row in steps], colour, lw=0.8, label=f"{job}")
        for name in ("none", "generic", "fetched"):
            points = [(row["tokens"], *row["heldout"][name]) for row in held if name in row["heldout"]]
            style = {"none": "x", "generic": "s", "fetched": "o"}[name]
            axes.plot([t for t, _, _ in points], [nll / n for _, nll, n in points], style, color=colour, ms=4)
    axes.set(
        xlabel="tokens of the job", ylabel="loss (nats a token); x none, ■ generic, ● fetched on held-out texts"
    )
    axes.legend(title="subtree", fontsize="small", ncols=2)
    figure.savefig(image, dpi=120, format="png")
