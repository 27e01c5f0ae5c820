"""Question files, read in one way by `eval`, by `bank remove --probe`, by `learn --questions` and by the demo.

A JSON object a line, with an answer or with a document. What a command has no use for is passed over.

    {"prompt": "The symbol of gold is", "answer": "Au", "aliases": ["gold's Au"], "heldout_prompts": ["…"],
     "id": "…", "relation": "symbol", "subject": "gold", "doc": "the source's id"}
    {"question": "Which symbol has gold?", "document": "its title, or its file"}
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass, field

from mlx_hiermem.errors import TaskError
from mlx_hiermem.evaluate.answers import begins_with
from mlx_hiermem.evaluate.tasks import Row, read_rows, text_in, texts_in

FORM = 'A line is {"prompt": "…", "answer": "…"}.'
DOCUMENT_FORM = 'A line is {"question": "…", "document": "its title, or its file"}.'
TAGS = ("relation", "subject", "doc")


@dataclass(frozen=True)
class Question:
    """One question. `answer` is empty where only its `document` is given, and the other way round."""

    line: int
    id: str
    prompt: str
    answer: str = ""
    aliases: tuple[str, ...] = ()  # other names of the answer
    heldout_prompts: tuple[str, ...] = ()  # other wordings of the prompt
    document: str = ""  # which document says the answer, by title or file
    tags: dict[str, str] = field(default_factory=dict)  # by which results are broken down

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the right answer, the first one its own."""
        return tuple(dict.fromkeys((self.answer, *self.aliases)))

    def is_right(self, reply: str) -> bool:
        """Whether the reply begins with a name of the answer."""
        return begins_with(reply, self.names)


def question_of(line: int, row: Row) -> Question:
    """One row as a question with its answer. Raises KeyError or ValueError where it is none."""
    row = Row(aliases=[], heldout_prompts=[]) | row
    if isinstance(row.get("answer"), int | float):  # "answer": 79
        row["answer"] = json.dumps(row["answer"])
    return Question(
        line,
        str(row.get("id", line)),
        text_in(row, _either(row, "prompt", "question")),
        text_in(row, "answer"),
        tuple(texts_in(row, "aliases")),
        tuple(texts_in(row, "heldout_prompts")),
        tags={name: str(row[name]) for name in TAGS if name in row},
    )


def question_about(line: int, row: Row) -> Question:
    """One row as a question with its document. Raises KeyError or ValueError where it is none."""
    prompt, document = _either(row, "question", "prompt"), _either(row, "document", "title")
    return Question(line, str(row.get("id", line)), text_in(row, prompt), document=text_in(row, document))


def _either(row: Row, name: str, other: str) -> str:
    return other if other in row and not row.get(name) else name


def read_questions(file: pathlib.Path, documents: bool = False) -> list[Question]:
    """All questions of a file, with their answers or else with their documents.

    Raises TaskError where it cannot be read, has a line that is no such question, or has none.
    """
    parse, hint = (question_about, DOCUMENT_FORM) if documents else (question_of, FORM)
    found, _ = read_rows(file, parse, hint=hint)
    if not found:
        raise TaskError(f"{file} has no questions", hint)
    return found
