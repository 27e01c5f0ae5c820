"""Follow-ups that say “it”, as benchmarks/followups.py makes them of the exam's questions."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import followups


@pytest.mark.parametrize(
    ("question", "article", "first", "then"),
    [
        (
            "Which river does Turin stand on?",
            {"topic": "Geography"},
            "What is Turin?",
            "Which river does it stand on?",
        ),
        ("Turin's river is called what?", {"topic": "Geography"}, "What is Turin?", "Its river is called what?"),
        (
            "Where was Turin born?",
            {"topic": "People", "text": "She paints. Her …"},
            "Who is Turin?",
            "Where was she born?",
        ),
    ],
)
def test_a_pronoun_stands_for_the_subject(question: str, article: dict[str, str], first: str, then: str) -> None:
    made = followups.FollowUp.of({"doc": "Turin (city)", "question": question}, article)
    assert made is not None
    assert (made.first, made.then) == (first, then)
    assert followups.FollowUp.of({"doc": "Lisbon", "question": question}, article) is None
