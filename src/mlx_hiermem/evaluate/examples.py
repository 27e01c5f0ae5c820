"""The examples of a task file: what is asked, what is scored, and the text that is routed.

Few-shot examples are drawn from the same file as LLM-Foundry v0.9 draws them, so that an example's prompt does not
depend on how many are asked. Of texts for perplexity an example is a document, routed as a whole, in windows of
which every token counts once.
"""

from __future__ import annotations

import pathlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_hiermem.errors import TaskError
from mlx_hiermem.evaluate.answers import normalise
from mlx_hiermem.evaluate.questions import Question, question_of
from mlx_hiermem.evaluate.tasks import Row, Task, read_rows, text_in, texts_in
from mlx_hiermem.files import read_text

SEED = 1234  # of few-shot examples: LLM-Foundry's
ROLLING_WINDOW = 1024  # tokens, or the model's context where that is less
ARTICLE = re.compile(r"(?m)^ ?= (?!=)[^\n]*[^=\n] = ?$")  # WikiText's title of an article: " = Robert Boulter = "


@dataclass(frozen=True)
class Example:
    """One thing to ask. `contexts` and `continuations` are paired; one context stands for several continuations."""

    id: str
    line: int
    route: str  # the text that chooses its memory: its own, never that of its few-shot examples
    shots: str = ""  # the few-shot examples before it
    contexts: tuple[str, ...] = ()
    continuations: tuple[str, ...] = ()  # none where a reply is generated
    gold: int = 0  # the right pair
    answers: tuple[str, ...] = ()  # the names of the right answer, the first one its own
    tags: dict[str, str] = field(default_factory=dict)  # by which results are broken down; doc is the source's id


@dataclass(frozen=True)
class TaskFile:
    """Examples, and the rows that were left out because they are none."""

    task: Task
    examples: list[Example]
    bad: list[str]


def read_examples(task: Task, skip_bad: bool = False) -> TaskFile:
    """Raises TaskError for a file that cannot be read, and for bad rows unless they are to be skipped."""
    if task.kind == "questions":
        questions, bad = read_rows(task.file, question_of, skip_bad)
        return TaskFile(task, [example for one in questions for example in _wordings(one)], bad)

    def checked(line: int, row: Row) -> tuple[int, Row]:
        _CHECKS[task.kind](row)
        return line, row

    rows, bad = read_rows(task.file, checked, skip_bad)
    if len(rows) <= task.shots:
        raise TaskError(f"{task.file} has {len(rows)} examples; task {task.name} shows {task.shots} before each")
    return TaskFile(task, list(_examples(task, rows)), bad)


def _check_gold(row: Row, choices: Sequence[str]) -> None:
    gold = row["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ValueError(f"has gold {gold!r}, there are {len(choices)} choices")


def _check_language_modeling(row: Row) -> None:
    text_in(row, "context"), text_in(row, "continuation")


def _check_multiple_choice(row: Row) -> None:
    text_in(row, "query")
    _check_gold(row, texts_in(row, "choices", 2))


def _check_schema(row: Row) -> None:
    text_in(row, "continuation")
    _check_gold(row, texts_in(row, "context_options", 2))


def _check_generation(row: Row) -> None:
    text_in(row, "context")
    for name in [text_in(row, "answer"), *texts_in(row, "aliases", 0)]:
        if not normalise(name):
            raise ValueError(f"has an alias that is empty once normalised: '{name}'")


_CHECKS: dict[str, Callable[[Row], None]] = {
    "language_modeling": _check_language_modeling,
    "multiple_choice": _check_multiple_choice,
    "schema": _check_schema,
    "generation": _check_generation,
}


def _examples(task: Task, rows: list[tuple[int, Row]]) -> Iterator[Example]:
    make = {
        "language_modeling": _language_modeling,
        "multiple_choice": _multiple_choice,
        "schema": _schema,
        "generation": _generation,
    }[task.kind]
    rng = random.Random(SEED)
    for index, (line, row) in enumerate(rows):
        drawn = _draw(len(rows), task.shots, index, rng)
        yield make(task, line, row, "\n".join(_shown(task, rows[other][1]) for other in drawn))


def _draw(count: int, shots: int, index: int, rng: random.Random) -> set[int]:
    """LLM-Foundry's `get_fewshot_sample_idxs`: never the example itself. It iterates over the set as it is."""
    drawn = set(rng.sample(range(count), min(count - 1, shots)))
    if index in drawn:
        drawn.remove(index)
        other = rng.choice(range(count))
        while other in drawn or other == index:
            other = rng.choice(range(count))
        drawn.add(other)
    return drawn


def _language_modeling(task: Task, line: int, row: Row, shots: str) -> Example:
    context = row["context"].strip()
    return Example(
        str(line), line, context, shots, (_prompt(task, context, shots),), (row["continuation"].strip(),)
    )


def _multiple_choice(task: Task, line: int, row: Row, shots: str) -> Example:
    query, choices = row["query"].strip(), tuple(row["choices"])
    prompts = (_prompt(task, query, shots),) * len(choices)
    return Example(str(line), line, query, shots, prompts, choices, row["gold"])


def _schema(task: Task, line: int, row: Row, shots: str) -> Example:
    """Routed by what all choices have in common: the words with which the contexts begin, and the continuation."""
    contexts, continuation = row["context_options"], row["continuation"].strip()
    words = [text.split() for text in contexts]
    route = " ".join([*words[0][: shared_beginning(words)], continuation])
    prompts = tuple(f"\n{text}{task.delimiter.rstrip()}" for text in contexts) if shots else tuple(contexts)
    return Example(str(line), line, route, shots, prompts, (continuation,) * len(contexts), row["gold"])


def _generation(task: Task, line: int, row: Row, shots: str) -> Example:
    context = row["context"].strip()
    answers = tuple(dict.fromkeys([row["answer"].strip(), *row["aliases"]]))
    return Example(str(line), line, context, shots, (_prompt(task, context, shots),), answers=answers)


def shared_beginning(sequences: Sequence[Sequence[Any]]) -> int:
    """How many items all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def _prompt(task: Task, context: str, shots: str) -> str:
    """Ends without space: the continuation brings it."""
    return f"{chr(10) if shots else ''}{context}{task.delimiter}".rstrip()


def _shown(task: Task, row: Row) -> str:
    """A row as one of the few-shot examples of another one, with its answer."""
    if task.kind == "multiple_choice":
        return f"{row['query'].strip()}{task.delimiter}{row['choices'][row['gold']]}"
    if task.kind == "schema":
        return f"{row['context_options'][row['gold']]}{task.delimiter}{row['continuation'].strip()}"
    answer = row["continuation" if task.kind == "language_modeling" else "answer"]
    return f"{row['context'].strip()}{task.delimiter}{answer.strip()}"


def _wordings(question: Question) -> Iterator[Example]:
    """The prompt and each held-out wording, routed by itself."""
    for number, prompt in enumerate((question.prompt, *question.heldout_prompts)):
        wording = f"paraphrase {number}" if number else "canonical"
        ident = f"{question.id}#{number}" if number else question.id
        tags = question.tags | {"wording": wording}
        yield Example(ident, question.line, prompt, "", (prompt,), answers=question.names, tags=tags)


# Texts for perplexity


def read_documents(file: pathlib.Path, skip_bad: bool = False) -> list[Example]:
    """WikiText's articles, a JSON line's `text`, or else the file as one document. Raises TaskError."""
    if file.suffix == ".jsonl":
        found, _ = read_rows(file, _document, skip_bad)
    else:
        found = list(_articles(read_text(file, TaskError)))
    if not found:
        raise TaskError(f"{file} has no text")
    return [Example(ident, line, part.strip(), continuations=(part,)) for ident, line, part in found]


def _document(line: int, row: Row) -> tuple[str, int, str]:
    """(id, line, text) of a JSON line."""
    return str(row.get("id", line)), line, text_in(row, "text")


def _articles(text: str) -> Iterator[tuple[str, int, str]]:
    """(title, line, text) of each article; a file without titles is one document."""
    starts = [match.start() for match in ARTICLE.finditer(text)] or [0]
    if text[: starts[0]].strip():
        starts.insert(0, 0)
    line, before = 1, 0
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True), 1):
        line, before = line + text.count("\n", before, start), start
        part = text[start:end]
        if part.strip():
            title = part.lstrip().split("\n", 1)[0].strip(" =")[:60]
            yield f"{number} {title}", line, part


def rolling_windows(tokens: Sequence[int], first: int, size: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs of `size` inputs each that predict every token once, the first behind `first`.

    A last window that predicts fewer has the more context, as lm-evaluation-harness has it.
    """
    found = []
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        context = list(tokens[max(0, end - 1 - size) : start]) or [first]
        found.append((context, list(tokens[start:end])))
    return found
