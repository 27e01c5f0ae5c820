"""Which tasks there are: the paper's (tasks.toml), task files of the same form, question files, texts.

A task's file is read row by row: every row is checked before anything runs, and what is wrong is named by file and
line.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from mlx_hiermem.errors import TaskError
from mlx_hiermem.files import MALFORMED, parse_json, parse_toml, read_lines

KINDS = ("language_modeling", "multiple_choice", "schema", "generation", "questions", "perplexity")
GROUPS = ("", "common", "specific")
PAPER = pathlib.Path(__file__).with_name("tasks.toml")
Row = dict[str, Any]
T = TypeVar("T")
HINT = "Correct the file, or leave such rows out with --skip-bad."


@dataclass(frozen=True)
class Task:
    """What is asked, in LLM-Foundry's terms. `questions` are asked in each of their wordings, without examples."""

    name: str
    kind: str
    file: pathlib.Path
    shots: int = 0
    delimiter: str = " "  # before a continuation; its trailing space goes to the continuation
    group: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TaskError(f"task {self.name} has kind '{self.kind}'", f"Use {', '.join(KINDS)}.")
        if self.group not in GROUPS:
            raise TaskError(f"task {self.name} has group '{self.group}'", "Use common or specific.")
        if not isinstance(self.shots, int) or self.shots < 0:
            raise TaskError(f"task {self.name} has shots {self.shots!r}", "Give a number, 0 or more.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"file": self.file.name}


def read_tasks(file: pathlib.Path, data: pathlib.Path | None = None) -> dict[str, Task]:
    """The tasks of a TOML file by name; their files are beside it, or in `data`. Raises TaskError."""
    folder = file.parent if data is None else data
    try:
        tables = parse_toml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot read the task file {file}: {error}") from error
    known = {field.name for field in fields(Task)} - {"name"}
    found = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or not {"kind", "file"} <= table.keys() or table.keys() - known:
            raise TaskError(f"{file}: [{name}] needs kind and file, and may have {', '.join(sorted(known))}")
        if not isinstance(table["file"], str):
            raise TaskError(f"{file}: [{name}] has file {table['file']!r}", "Give a file's name.")
        found[name] = Task(name, **{**table, "file": folder / table["file"]})
    return found


def find_tasks(names: Sequence[str], data: pathlib.Path | None, shots: int | None = None) -> list[Task]:
    """The paper's tasks by name (their files are in `data`), or `all` of them that `data` has; or files:
    .toml of tasks, .jsonl of questions or of documents, .txt. `shots` replaces what the tasks say.

    Raises TaskError for a name that is none of them.
    """
    paper = read_tasks(PAPER, data or pathlib.Path())
    found: list[Task] = []
    for name in names:
        file = pathlib.Path(name)
        if name == "all" and data is not None:
            found += [task for task in paper.values() if task.file.is_file()]
        elif name in paper and data is not None:
            found.append(paper[name])
        elif name == "all" or name in paper:
            raise TaskError(f"{name} needs its file", "Say in which folder the files are: --data FOLDER.")
        elif file.suffix == ".toml":
            found += read_tasks(file).values()
        elif file.suffix in (".jsonl", ".txt"):
            found.append(Task(file.stem, "perplexity" if _is_text(file) else "questions", file))
        else:
            raise TaskError(f"there is no task {name}", f"Use a file, or one of {', '.join(paper)}.")
    if not found:
        raise TaskError("there is nothing to evaluate", "Name tasks, or a folder that has their files.")
    if missing := next((task for task in found if not task.file.is_file()), None):
        raise TaskError(f"task {missing.name}: there is no file {missing.file}")
    if twice := {task.name for task in found if [other.name for other in found].count(task.name) > 1}:
        raise TaskError(f"two tasks are called {min(twice)}", "Name one of them otherwise.")
    return [replace(task, shots=task.shots if shots is None else shots) for task in found]


def is_local(name: str) -> bool:
    """Whether `find_tasks` looks for it; any other name is one of lm-evaluation-harness."""
    return name == "all" or name in read_tasks(PAPER) or pathlib.Path(name).suffix in (".toml", ".jsonl", ".txt")


def _is_text(file: pathlib.Path) -> bool:
    """A text, or JSON lines of documents: {"text": …}, where questions have a prompt."""
    if file.suffix == ".txt" or not file.is_file():
        return True
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
    return '"prompt"' not in first and '"text"' in first


# Their files, row by row


def read_rows(
    file: pathlib.Path, parse: Callable[[int, Row], T], skip_bad: bool = False, hint: str = HINT
) -> tuple[list[T], list[str]]:
    """`parse` of each row and its line's number, and what is said of the bad ones: those it raises an error for.

    Raises TaskError for a file that cannot be read, and for bad rows unless they are to be skipped.
    """
    found, bad = list[T](), list[str]()
    for number, line in read_lines(file, TaskError):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("is no JSON object")
            found.append(parse(number, row))
        except MALFORMED as error:
            bad.append(f"line {number} {_reason(error)}")
    refuse(file, bad, skip_bad, hint)
    return found, bad


def refuse(file: pathlib.Path, bad: Sequence[str], skip_bad: bool = False, hint: str = HINT) -> None:
    """Raises TaskError that names bad rows, unless they are to be skipped."""
    if bad and not skip_bad:
        more = f"; and {len(bad) - 3} lines more" if len(bad) > 3 else ""
        raise TaskError(f"{file}: {'; '.join(bad[:3])}{more}", hint)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "is not JSON"
    return f"has no {error}" if isinstance(error, KeyError) else str(error)


def text_in(row: Row, name: str) -> str:
    """A field that must have a text. Raises KeyError or ValueError."""
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"has no text in '{name}'")
    return row[name]


def texts_in(row: Row, name: str, least: int = 0) -> list[str]:
    """A field that must have a list of texts. Raises KeyError or ValueError."""
    values = row[name]
    if not isinstance(values, list) or len(values) < least:
        raise ValueError(f"needs {least} or more texts in '{name}'")
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"has an empty text in '{name}'")
    return values
