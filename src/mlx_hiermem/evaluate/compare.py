"""Two runs and more over the same examples: paired differences, what changed where, and a plot.

Pairing takes out what examples differ by, which is most of the error: a difference of a point between two runs may
be certain where either figure alone is uncertain by three.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hiermem.errors import MissingDependencyError, TaskError
from mlx_hiermem.evaluate.results import PARTS, Run
from mlx_hiermem.evaluate.statistics import PER, Difference, Figure, Row, Z, difference, figure

GROUPS = ("common", "specific")


@dataclass(frozen=True)
class Column:
    """A model under a memory: its runs by task."""

    label: str
    runs: dict[str, Run]


@dataclass(frozen=True)
class Paired:
    """One metric of one part of a task, in the baseline and in another column."""

    task: str
    part: str
    metric: str
    column: str
    first: Figure
    second: Figure
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {name: getattr(self, name).to_json() for name in ("first", "second", "difference")}


@dataclass(frozen=True)
class Locality:
    """Examples of a task by whether their memory is another one, and how many of each gave another result."""

    task: str
    column: str
    same_memory: int
    changed_with_same_memory: int
    other_memory: int
    changed_with_other_memory: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    baseline: str
    columns: list[str]
    paired: list[Paired]
    means: list[Paired]  # of the tasks of common and of specific knowledge, as far as they are there
    locality: list[Locality]

    def to_json(self) -> dict[str, Any]:
        lists = {name: [one.to_json() for one in getattr(self, name)] for name in ("paired", "means", "locality")}
        return {"baseline": self.baseline, "columns": self.columns, **lists}


def columns(runs: Iterable[tuple[str, Run]]) -> list[Column]:
    """(name of the model, run) in order -> a column for each model and memory. One model's are named by memory."""
    found: dict[tuple[str, str], dict[str, Run]] = {}
    for name, run in runs:
        found.setdefault((name, run.memory), {})[run.task] = run
    one = len({name for name, _ in found}) == 1
    return [Column(memory if one else f"{name}, {memory}", tasks) for (name, memory), tasks in found.items()]


def compare(found: Sequence[Column]) -> Comparison:
    """Each column with the first. Raises TaskError where there is nothing to pair."""
    if len(found) < 2:
        raise TaskError("a comparison needs two runs", "Give two models, or one with two memories.")
    base, *others = found
    paired, locality = list[Paired](), list[Locality]()
    for column in others:
        for task, run in column.runs.items():
            if task in base.runs:
                first, second = _matched(base.runs[task], run)
                paired += _pairs(first, second, column.label)
                locality.append(_locality(first, second, column.label))
    if not paired:
        raise TaskError(f"{base.label} has no task in common with the others")
    return Comparison(base.label, [c.label for c in found], paired, _means(paired, base), locality)


def _matched(first: Run, second: Run) -> tuple[Run, Run]:
    """Both with the examples that both have, in the same order."""
    if first.head["file_sha256"] != second.head["file_sha256"] or first.head["task"] != second.head["task"]:
        raise TaskError(f"task {first.task} had other examples or settings in {second.model} ({second.memory})")
    by_id = {row["id"]: row for row in second.rows}
    pairs = [(row, by_id[row["id"]]) for row in first.rows if row["id"] in by_id]
    if not pairs:
        raise TaskError(f"the runs of {first.task} have no example in common")
    # Earlier results may lack what kind of row each is: the other run has it.
    kinds = [{name: one[name] for one in pair for name in PARTS if name in one} for pair in pairs]
    rows = [[row | kind for row, kind in zip(own, kinds, strict=True)] for own in zip(*pairs, strict=True)]
    return Run(first.head, rows[0]), Run(second.head, rows[1])


def _pairs(first: Run, second: Run, label: str) -> list[Paired]:
    of_second = second.parts()
    return [
        Paired(
            first.task,
            part,
            metric,
            label,
            figure(rows, metric),
            figure(of_second[part], metric),
            difference(rows, of_second[part], metric),
        )
        for part, rows in first.parts().items()
        for metric in first.metrics
    ]


def _locality(first: Run, second: Run, label: str) -> Locality:
    counts = {True: [0, 0], False: [0, 0]}
    for a, b in zip(first.rows, second.rows, strict=True):
        same = a["memory"] == b["memory"]
        counts[same][0] += 1
        counts[same][1] += _said(a) != _said(b)
    return Locality(first.task, label, *counts[True], *counts[False])


def _said(row: Row) -> Any:
    """What a model gave as its result: a reply, or scores to a thousandth of a nat."""
    if "scores" in row:
        return [round(nll, 3) for nll, _ in row["scores"]]
    return row["reply"] if "reply" in row else round(row["nll"], 3)


def _means(paired: Sequence[Paired], base: Column) -> list[Paired]:
    """The mean over a group's tasks of their first metric, the paper's common and specific knowledge."""
    found = []
    for label in dict.fromkeys(one.column for one in paired):
        for group in GROUPS:
            tasks = [name for name, run in base.runs.items() if run.head["task"]["group"] == group]
            members = [p for p in paired if p.column == label and p.task in tasks and not p.part]
            members = [p for p in members if p.metric == "accuracy"]
            if len(members) > 1:
                found.append(_mean(group, members))
    return found


def _mean(group: str, members: Sequence[Paired]) -> Paired:
    count, n = len(members), sum(one.difference.n for one in members)

    def mean(figures: Sequence[Figure]) -> Figure:
        error = math.sqrt(sum((one.error or 0.0) ** 2 for one in figures)) / count
        return Figure(sum(one.value for one in figures) / count, error, n)

    value = sum(one.difference.value for one in members) / count
    widths = [(one.difference.high - one.difference.low) / 2 / Z for one in members]
    half = Z * math.sqrt(sum(width**2 for width in widths)) / count
    change = Difference(value, value - half, value + half, n)
    first, second = mean([one.first for one in members]), mean([one.second for one in members])
    return Paired(
        f"{group} knowledge", f"mean of {count} tasks", "accuracy", members[0].column, first, second, change
    )


def draw(comparison: Comparison, image: pathlib.Path) -> list[pathlib.Path]:
    """Differences with their 95 % intervals, as PNG and SVG beside each other; returns the files.

    Raises MissingDependencyError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingDependencyError("a plot needs matplotlib", "pip install 'mlx-hiermem[plots]'") from error
    shown = [one for one in [*comparison.means, *comparison.paired] if one.metric in ("accuracy", "perplexity")]
    rows = list(dict.fromkeys((one.task, one.part) for one in shown))
    canvas = Canvas(figsize=(8, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    others = comparison.columns[1:]
    for number, label in enumerate(others):
        mine = [one for one in shown if one.column == label]
        heights = [rows.index((one.task, one.part)) + 0.5 * (number + 0.5) / len(others) - 0.25 for one in mine]
        values = [100 * one.difference.value for one in mine]
        ends = [[100 * abs(end(one) - one.difference.value) for one in mine] for end in (_low, _high)]
        axes.errorbar(values, heights, xerr=ends, fmt="o", ms=4, lw=1.2, capsize=2, label=label)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_yticks(range(len(rows)), [f"{task} {part}".strip() for task, part in rows], fontsize="small")
    axes.invert_yaxis()
    unit = "points of accuracy" + ("; per cent of perplexity" if any(one.metric in PER for one in shown) else "")
    axes.set_xlabel(f"minus {comparison.baseline}: {unit}; bars are 95 % intervals", fontsize="small")
    axes.legend(fontsize="small", frameon=False)
    files = [image.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        canvas.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _low(one: Paired) -> float:
    return one.difference.low


def _high(one: Paired) -> float:
    return one.difference.high
