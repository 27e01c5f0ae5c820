"""Questions put to a model before and after its bank is changed."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

from mlx_hiermem.apps.cli.display import UNSAFE, progress_bar
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.evaluate.answers import begins_with


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()

    def is_right(self, reply: str) -> bool:
        """Whether the reply begins with the answer, or with another name for it."""
        return begins_with(reply, (self.answer, *self.aliases))


def read(file: pathlib.Path) -> list[Question]:
    """A JSON object a line, with prompt and answer; aliases too where there are some, anything else is passed over.

    Raises HierMemError naming the line that is not so.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise HierMemError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HierMemError(f"cannot read {file}: it is not UTF-8 text") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            questions.append(
                Question(str(row["prompt"]), str(row["answer"]), tuple(map(str, row.get("aliases", ()))))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HierMemError(
                f"line {number} of {file} is no question", 'A line is {"prompt": "…", "answer": "…"}.'
            ) from error
    if not questions:
        raise HierMemError(f"{file} has no questions")
    return questions


def ask(model: pathlib.Path, questions: list[Question], max_tokens: int, when: str) -> list[str]:
    """Greedy replies, each on one line, with the memory that each question is routed to."""
    if not questions:
        return []
    from mlx_hiermem.model import load

    loaded, replies = load(model), []
    with progress_bar(f"asking {when}", unit="questions") as progress:
        for question in questions:
            reply = loaded.generate(question.prompt, max_tokens=max_tokens).text.translate(UNSAFE)
            replies.append(" ".join(reply.split()))
            if progress:
                progress(len(replies), len(questions))
    return replies
