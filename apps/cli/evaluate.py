"""`hiermem eval`: what a memory is worth, and what it costs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, notes, progress_bar, several, size, waiting
from mlx_hiermem.errors import MissingDependencyError, TaskError
from mlx_hiermem.files import parse_json

if TYPE_CHECKING:
    from mlx_hiermem.evaluate.compare import Column, Comparison, Paired
    from mlx_hiermem.evaluate.results import Run
    from mlx_hiermem.evaluate.runner import Evaluation
    from mlx_hiermem.evaluate.statistics import Figure


def evaluate(
    first_words: list[str] = typer.Argument(
        None, metavar="MODEL...", help="Models; with --compare several, also folders of results."
    ),
    model: str = models.MODEL,
    tasks: list[str] = typer.Option(
        None, "--tasks", help="Tasks, names with commas between or files; may be given several times. Default: all."
    ),
    data: pathlib.Path | None = typer.Option(None, help="Folder with the files of the paper's tasks."),
    memory: list[str] = typer.Option(
        None,
        help="none, generic, fetched, source, fetched+source, oracle or blocked; may be given several times. "
        "Default: none and fetched; of "
        "several models fetched.",
    ),
    limit: int | None = typer.Option(None, min=1, help="Most examples of each task; they are drawn at random."),
    shots: int | None = typer.Option(None, min=0, help="Few-shot examples, instead of what each task has."),
    out: pathlib.Path | None = typer.Option(None, help="Folder of results. Default: MODEL.eval, in this folder."),
    compare: bool = typer.Option(False, "--compare", help="Compare several models, or results, with the first."),
    plot: pathlib.Path | None = typer.Option(None, help="Draw the differences: FILE.png and FILE.svg."),
    frequencies: pathlib.Path | None = typer.Option(
        None, help="JSON {subject: how frequent}: question files are broken down by fifths of it."
    ),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out rows that are no examples, and name them."),
    truncate: bool = typer.Option(False, "--truncate", help="Cut contexts that are too long, on the left."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of tables."),
) -> None:
    """Test a model with and without its memory: the paper's tasks, questions of your own, perplexity of a text.

    Goes on where it was broken off. Any other task's name is one of lm-evaluation-harness.

    Example: `hiermem eval my-model --tasks questions.jsonl --memory none --memory fetched`
    """
    from mlx_hiermem.evaluate.compare import columns, draw
    from mlx_hiermem.evaluate.compare import compare as compare_columns
    from mlx_hiermem.evaluate.results import is_results, read_runs

    if model and first_words:
        raise typer.BadParameter("goes without other models", param_hint="--model")
    places = list(first_words or [model or models.preferred()])
    if len(places) > 1 and not compare:
        raise typer.BadParameter("several are for --compare", param_hint="MODEL")
    if len(places) > 1 and out:
        raise typer.BadParameter("several models have a folder each", param_hint="--out")
    names = [name for text in tasks or ["all"] for name in _split(text)]
    memories = memory or (["fetched"] if compare and len(places) > 1 else [])
    wanted = _Wanted(names, data, memories, limit, shots, frequencies, skip_bad, truncate, not as_json)
    runs: list[tuple[str, Run]] = []
    harness: dict[str, Any] = {}
    for place in places:
        path = pathlib.Path(place)
        if compare and is_results(path):
            found = [run for run in read_runs(path) if not memory or run.memory in memory]
        else:
            found, of_harness = _evaluate(place, wanted, out or pathlib.Path(f"{path.name}.eval"))
            models.remember(place)
            harness |= {f"{path.name}, {name}": each for name, each in of_harness.items()}
        alike = [pathlib.Path(other).name for other in places].count(path.name) > 1
        runs += [(place if alike else path.name.removesuffix(".eval"), run) for run in found]
    table = columns(runs)
    comparison = compare_columns(table) if len(table) > 1 else None
    drawn = draw(comparison, plot) if comparison and plot else []
    if as_json:
        result: dict[str, Any] = {"runs": [run.to_json() for _, run in runs], "harness": harness}
        result["comparison"] = comparison.to_json() if comparison else None
        console.print_json(json.dumps(result, ensure_ascii=False))
        return
    _show(table)
    _show_harness(harness)
    if comparison:
        _show_comparison(comparison)
    _show_costs([run for _, run in runs])
    for file in drawn:
        console.print(f"written  {file}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Wanted:
    """What is to be asked of a model."""

    tasks: list[str]
    data: pathlib.Path | None
    memories: list[str]
    limit: int | None
    shots: int | None
    frequencies: pathlib.Path | None
    skip_bad: bool
    truncate: bool
    show: bool  # progress


def _split(text: str) -> list[str]:
    """Names with commas between; a file may have one in its name."""
    return [text] if pathlib.Path(text).is_file() else [name.strip() for name in text.split(",") if name.strip()]


def _evaluate(place: str, wanted: _Wanted, out: pathlib.Path) -> tuple[list[Run], dict[str, Any]]:
    """The runs of one model, and what lm-evaluation-harness found, by memory."""
    from mlx_hiermem.evaluate.runner import Evaluation
    from mlx_hiermem.evaluate.tasks import find_tasks, is_local

    local = [name for name in wanted.tasks if is_local(name)]
    others = [name for name in wanted.tasks if not is_local(name)]
    tasks = find_tasks(local, wanted.data, wanted.shots) if local else []
    frequencies = _read_frequencies(wanted.frequencies)
    with waiting("loading"):
        evaluation = Evaluation.of(place, out)
    memories = wanted.memories or (["none", "fetched"] if evaluation.model.bank else ["none"])
    prepared = []
    for task in tasks:
        with waiting(f"reading {task.name}"):
            one = evaluation.prepare(task, memories, wanted.limit, wanted.skip_bad, wanted.truncate, frequencies)
        for line in one.bad:
            notes.print(f"left out: {task.file}: {line}", style="yellow", markup=False, soft_wrap=True)
        if one.cut:
            notes.print(f"{task.name}: {several(one.cut, 'context')} cut on the left", style="yellow")
        prepared.append(one)
    harness = _run_harness(evaluation, others, memories, wanted) if others else {}
    runs = []
    for one in prepared:
        for memory in memories:
            with progress_bar(f"{one.task.name}, {memory}", unit="examples", show=wanted.show) as progress:
                runs.append(evaluation.run(one, memory, progress))
    return runs, harness


def _run_harness(
    evaluation: Evaluation, names: Sequence[str], memories: Sequence[str], wanted: _Wanted
) -> dict[str, Any]:
    """Metrics by memory and task."""
    try:
        from mlx_hiermem.evaluate.harness import run_harness
    except ImportError as error:
        raise MissingDependencyError(
            f"{', '.join(names)} would be tasks of lm-evaluation-harness, which is not installed",
            "pip install 'mlx-hiermem[eval]'",
        ) from error
    found = {}
    for memory in memories:
        evaluation.out.mkdir(parents=True, exist_ok=True)
        answered = evaluation.out / f"harness.{memory}.{evaluation.digest(memory)[:12]}"
        result = run_harness(evaluation.model, memory, names, wanted.limit, wanted.shots, answered)
        found[memory] = result["results"]
    return found


def _read_frequencies(file: pathlib.Path | None) -> dict[str, float]:
    if file is None:
        return {}
    try:
        return {str(name): float(value) for name, value in parse_json(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TaskError(
            f"cannot read frequencies in {file}: {error}", "Give one JSON object of numbers."
        ) from error


def _figure(figure: Figure, metric: str) -> str:
    """`34.1 ±2.0`: per cent where it is a share, with its standard error."""
    from mlx_hiermem.evaluate.statistics import PER

    scale, digits = (1, 2) if metric in PER else (100, 1)
    error = "" if figure.error is None else f" ±{scale * figure.error:.{digits}f}"
    value = f"{scale * figure.value:.{digits}f}{error}"
    return value if len(value) < 20 else f"{figure.value:.2g}"


def _name(task: str, part: str) -> str:
    return f"{task}: {part}" if part else task


def _show(table: list[Column]) -> None:
    """A row for each task, part and metric, a column for each model and memory."""
    from rich.table import Table

    if not table:
        return
    shown = Table("task", "metric", box=None, header_style="dim")
    for name in ("n", *(column.label for column in table)):
        shown.add_column(name, justify="right", no_wrap=True)
    figures = [{task: run.figures() for task, run in column.runs.items()} for column in table]
    for task in dict.fromkeys(name for column in table for name in column.runs):
        parts = [of[task] for of in figures if task in of]
        for part, metric in dict.fromkeys((part, m) for each in parts for part, row in each.items() for m in row):
            cells = [of.get(task, {}).get(part, {}).get(metric) for of in figures]
            counts = sorted({cell.n for cell in cells if cell})
            texts = [_figure(cell, metric) if cell else "" for cell in cells]
            shown.add_row(_name(task, part), metric, "–".join(map(str, counts)), *texts)
    console.print(shown)


def _show_harness(harness: dict[str, Any]) -> None:
    from rich.table import Table

    if not harness:
        return
    shown = Table("lm-evaluation-harness", "metric", box=None, header_style="dim")
    for name in harness:
        shown.add_column(name, justify="right")
    rows = dict.fromkeys((task, key) for found in harness.values() for task, each in found.items() for key in each)
    for task, key in rows:
        metric, _, kind = key.partition(",")
        values = [found[task].get(key) for found in harness.values()]
        if metric.endswith("_stderr") or not all(isinstance(value, float) for value in values):
            continue
        errors = [found[task].get(f"{metric}_stderr,{kind}") for found in harness.values()]
        cells = [
            f"{v:.4f}" + (f" ±{e:.4f}" if isinstance(e, float) else "") for v, e in zip(values, errors, strict=True)
        ]
        shown.add_row(task, metric, *cells)
    console.print()
    console.print(shown)


def _show_comparison(comparison: Comparison) -> None:
    from rich.table import Table

    for label in comparison.columns[1:]:
        shown = Table(f"{label} minus {comparison.baseline}", box=None, header_style="dim")
        for name in ("", "95 % interval", "gained", "lost", "p"):
            shown.add_column(name, justify="right", no_wrap=True)
        for one in [*comparison.means, *comparison.paired]:
            if one.column == label and one.metric in ("accuracy", "perplexity"):
                metric = "" if one.metric == "accuracy" else f" ({one.metric})"
                shown.add_row(_name(one.task, one.part) + metric, *_difference(one))
        console.print()
        console.print(shown)
    console.print("paired; accuracy in points, perplexity in per cent of the first", style="dim")
    for each in comparison.locality:
        if not each.same_memory:
            continue
        elsewhere = f"{each.changed_with_same_memory} of {each.same_memory} where it is the same"
        changed = f"{each.changed_with_other_memory} of {each.other_memory} results changed where memory did"
        console.print(f"{each.task}, {each.column}: {changed}, {elsewhere}", style="dim", markup=False)


def _difference(one: Paired) -> list[str]:
    change = one.difference
    interval = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
    if change.gained is None:
        return [f"{100 * change.value:+.1f}", interval, "", "", ""]
    return [f"{100 * change.value:+.1f}", interval, str(change.gained), str(change.lost), f"{change.p:.3f}"]


def _show_costs(runs: Sequence[Run]) -> None:
    from rich.table import Table

    shown = Table("cost", "memory", box=None, header_style="dim")
    for name in ("seconds", "an example", "tokens", "memory read"):
        shown.add_column(name, justify="right")
    for run in runs:
        cost = run.cost()
        each = f"{1000 * cost['seconds'] / len(run.rows):.0f} ms"
        row = (f"{cost['seconds']:.0f}", each, f"{cost['tokens']:.0f}", size(cost["bytes_read"]))
        shown.add_row(run.task, run.memory, *row)
    console.print()
    console.print(shown)
