"""Files of results: a line that says what was run, then one for each example, appended as they are done.

A run that was broken off goes on: its file's name has a digest of all that the results depend on. How many examples
are asked is not among it, so more of them add to those that are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.errors import OutputError, TaskError
from mlx_hiermem.evaluate.statistics import Figure, Row, figure
from mlx_hiermem.files import parse_json
from mlx_hiermem.locks import locked

FORMAT, VERSION = "mlx-hiermem-eval", 1
MEMORIES = ("none", "generic", "fetched", "source", "fetched+source", "oracle", "blocked")  # see `routes`
FIFTHS = ("rarest fifth", "second fifth", "middle fifth", "fourth fifth", "commonest fifth")
PARTS = ("relation", "wording", "bucket")  # of a row, by which a task's questions are told apart
METRICS = {
    "language_modeling": ("accuracy", "perplexity"),
    "multiple_choice": ("accuracy", "acc", "acc_norm"),
    "schema": ("accuracy", "acc"),
    "generation": ("accuracy",),
    "questions": ("accuracy",),
    "perplexity": ("perplexity", "word_perplexity", "bits_per_byte"),
}


@dataclass(frozen=True)
class Run:
    """One task under one memory. `rows` are in the order of the task's sample, each with the example's id."""

    head: dict[str, Any]  # format, model, memory, task, examples (in the whole file), fingerprint
    rows: list[Row]

    @property
    def task(self) -> str:
        return str(self.head["task"]["name"])

    @property
    def memory(self) -> str:
        return str(self.head["memory"])

    @property
    def model(self) -> str:
        return str(self.head["model"])

    @property
    def key(self) -> tuple[str, str, str]:
        """What runs are told apart by."""
        return self.model, self.memory, self.task

    @property
    def metrics(self) -> tuple[str, ...]:
        """The first one counts in summaries."""
        return METRICS[self.head["task"]["kind"]]

    def parts(self) -> dict[str, list[Row]]:
        """All rows under the empty name; of questions also each relation's, canonical and paraphrased, and those of
        each frequency bucket in it."""
        found: dict[str, list[Row]] = {"": self.rows}
        for row in self.rows:
            if "wording" not in row:
                continue
            relation = row.get("relation", "")
            names = [f"{relation} {'canonical' if row['wording'] == 'canonical' else 'paraphrased'}".strip()]
            names += [f"{names[0]}, {row['bucket']}"] if "bucket" in row else []
            for name in names:
                found.setdefault(name, []).append(row)

        def place(name: str) -> tuple[str, int]:
            part, _, bucket = name.partition(", ")
            return part, FIFTHS.index(bucket) if bucket in FIFTHS else -1

        return {name: found[name] for name in sorted(found, key=place)}

    def figures(self) -> dict[str, dict[str, Figure]]:
        """Part -> metric -> figure; `routing` is the share of examples whose memory learnt their document."""
        table = {}
        for name, rows in self.parts().items():
            table[name] = {metric: figure(rows, metric) for metric in self.metrics}
            known = [row for row in rows if row.get("routing") is not None]
            if known and ", " not in name:  # no bucket
                table[name]["routing"] = figure(known, "routing")
        return table

    def cost(self) -> dict[str, float]:
        """Seconds, tokens computed, bytes of memory read from disk, over all sessions of the run."""
        return {name: sum(row["cost"][name] for row in self.rows) for name in ("seconds", "tokens", "bytes_read")}

    def to_json(self) -> dict[str, Any]:
        figures = {
            part: {metric: value.to_json() for metric, value in row.items()} for part, row in self.figures().items()
        }
        return self.head | {"n": len(self.rows), "cost": self.cost(), "figures": figures}


class ResultFile:
    """One run's file; `done` has the rows by the ids of their examples. This process alone has it until `close`."""

    def __init__(self, file: pathlib.Path, head: dict[str, Any]) -> None:
        """Raises OutputError where it cannot be written, or another process writes it."""
        self.file, self.head, self.done = file, head, dict[str, Row]()
        with contextlib.ExitStack() as stack:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                stack.enter_context(locked(file, "writing results to"))
                self._cut_torn_line()
                if not file.stat().st_size:
                    self._append([head])
                self.done = rows_in(file)
            except OSError as error:
                why = error.strerror or error
                raise OutputError(f"cannot write {file}: {why}", "Name another --out.") from error
            self._held = stack.pop_all()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes write it."""
        self._held.close()

    def add(self, rows: Sequence[Row]) -> None:
        """Raises OutputError where the disk is full; what was written before stays."""
        try:
            self._append(rows)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(
                f"cannot write {self.file}: {reason}", "Run the same command again: it goes on."
            ) from error
        self.done |= {row["id"]: row for row in rows}

    def _append(self, rows: Iterable[Row]) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            out.flush()
            os.fsync(out.fileno())

    def _cut_torn_line(self) -> None:
        """What a killed run was writing."""
        data = self.file.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(self.file, data.rfind(b"\n") + 1)


def rows_in(file: pathlib.Path) -> dict[str, Row]:
    """The rows by the ids of their examples. Raises TaskError as `read_runs`."""
    return {row["id"]: row for row in _read(file)[1:]}


def _read(file: pathlib.Path) -> list[dict[str, Any]]:
    """The head and the rows; a line that is being written does not count. Raises TaskError where the file is of
    another kind."""
    try:
        text = file.read_text(encoding="utf-8")
        rows = [parse_json(line) for line in text[: text.rfind("\n") + 1].split("\n")[:-1]]
        if (rows[0]["format"], rows[0]["version"]) != (FORMAT, VERSION):
            raise ValueError("it is of another version")
        _ = Run(rows[0], rows[1:]).key
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise TaskError(f"{file} is no file of results: {error}", "Remove it, or name another --out.") from error
    return rows


def read_runs(place: pathlib.Path) -> list[Run]:
    """The runs of a file of results, or of all in a folder, by memory and file name. Raises TaskError for none.

    Of several runs of a model, a memory and a task the newest: the bank was edited, or the task's file.
    """
    files = sorted(place.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns) if place.is_dir() else [place]
    read = ((file, Run(rows[0], list(rows[1:]))) for file, rows in zip(files, map(_read, files), strict=True))
    newest = {run.key: (file, run) for file, run in read}
    runs = [run for _, run in sorted(newest.values(), key=lambda one: one[0])]
    runs.sort(key=lambda run: MEMORIES.index(run.memory) if run.memory in MEMORIES else -1)
    if not runs:
        raise TaskError(f"there are no results in {place}", "Give what `hiermem eval` wrote, or a model.")
    return runs


def is_results(place: pathlib.Path) -> bool:
    """Whether this is a file or a folder of results, and no model."""
    return place.suffix == ".jsonl" or (place.is_dir() and any(place.glob("*.jsonl")))
