"""How training goes: a line now and then in a log that survives a kill, figures for a progress bar, a plot."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.errors import MissingDependencyError


@dataclass(frozen=True)
class Progress:
    """Where a rank's training is. `doing` is `hidden states` (of one job), `learning` or `measured`."""

    doing: str
    job: str
    tokens: int  # learnt in all this rank's jobs, those of earlier runs included
    total: int
    tokens_per_second: float  # since this run started
    loss: float | None = None  # mean of the latest steps
    losses: dict[str, float] | None = None  # of the job's held-out texts, by memory, where they were measured

    @property
    def seconds_left(self) -> float | None:
        """None while the speed is not known."""
        return (self.total - self.tokens) / self.tokens_per_second if self.tokens_per_second else None


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
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def merge_logs(files: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """One log of several, in the order given."""
    beside = out.with_name(out.name + ".partial")
    with beside.open("w", encoding="utf-8") as stream:
        for file in files:
            stream.writelines(json.dumps(row) + "\n" for row in read_log(file))
    os.replace(beside, out)


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
