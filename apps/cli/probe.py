"""Questions put to a model before and after its bank is changed."""

from __future__ import annotations

import pathlib

from mlx_hiermem.apps.cli.display import UNSAFE, progress_bar
from mlx_hiermem.evaluate.questions import Question


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
