"""Whether a follow-up that says “it” is answered as well as a question that names its subject.

    python benchmarks/followups.py MODEL EXAM      # the first 240 rows that name their article; ten minutes

Each question is asked in a conversation of its own: alone, as it is; behind “What is …?”, with a pronoun for the
title; and behind the same, as it is. The pronoun of people is the one that their article uses most. Some of what
comes out is clumsy, as “the Italian city of it”. Writes results/followups.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
from dataclasses import dataclass

import common
from knowledge import Row, read_exam

from mlx_hiermem import load
from mlx_hiermem.evaluate.answers import mentions
from mlx_hiermem.evaluate.statistics import share_interval
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.session import Session

TOKENS = 48  # of a reply, at most
WAYS = {"alone": "alone", "pronoun": "behind “What is …?”, with a pronoun", "named": "the same, with its subject"}
OF = {"it": "its", "he": "his", "she": "her"}


@dataclass(frozen=True)
class FollowUp:
    """A question of the exam, and the two turns that ask the same."""

    row: Row
    first: str  # What is Turin?
    then: str  # … with “it” for Turin

    @classmethod
    def of(cls, row: Row, article: Row) -> FollowUp | None:
        """None where the question does not name its article."""
        name = re.sub(r"\s*\(.*\)", "", row["doc"])
        found = re.search(rf"\b(the )?{re.escape(name)}('s)?\b", row["question"], re.IGNORECASE)
        if found is None:
            return None
        word = pronoun(article)
        word = OF[word] if found.group(2) else word
        then = row["question"][: found.start()] + word + row["question"][found.end() :]
        return cls(
            row, f"{'Who' if article['topic'] == 'People' else 'What'} is {name}?", then[0].upper() + then[1:]
        )


def pronoun(article: Row) -> str:
    """What stands for an article's subject."""
    if article["topic"] != "People":
        return "it"
    words = re.findall(r"\w+", article["text"].lower())
    return max(("he", "she"), key=lambda word: words.count(word) + words.count(OF[word]))


def read_follow_ups(exam: pathlib.Path) -> list[FollowUp]:
    """Of the rows by which settings may be chosen. The articles lie beside the exam."""
    lines = (exam.parent / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    articles = {row["title"]: row for row in map(json.loads, lines)}
    found = (FollowUp.of(row, articles[row["doc"]]) for row in read_exam(exam, "0-240"))
    return [one for one in found if one]


def ask(model: MemoryModel, turns: list[str]) -> tuple[str, str]:
    """The last reply of a conversation, and the path that it was given on."""
    session, reply = Session(model, max_tokens=TOKENS), ""
    for turn in turns:
        reply = "".join(session.ask(turn))
    return reply, str(session.selection.path)


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("exam", type=pathlib.Path)
    asked, before = common.parsed(parser), os.getloadavg()[0]
    model, follow_ups = load(asked.model), read_follow_ups(asked.exam)
    rows = list[Row]()
    for one in follow_ups:
        own = one.row["question"]
        turns = {"alone": [own], "pronoun": [one.first, one.then], "named": [one.first, own]}
        replies = {way: ask(model, some) for way, some in turns.items()}
        names = (one.row["answer"], *one.row["aliases"])
        rows += [
            {
                "id": one.row["id"],
                "way": way,
                "asked": turns[way],
                "reply": reply,
                "lenient": mentions(reply, names),
                "same_path": path == replies["alone"][1],
            }
            for way, (reply, path) in replies.items()
        ]
    found = {way: summary([row for row in rows if row["way"] == way]) for way in WAYS}
    plain = argparse.Namespace(runs=asked.runs, quick=asked.quick)
    common.save(__file__, {"ways": found, "rows": rows}, plain, before)
    common.table(("", "lenient", "path as alone"), [_cells(WAYS[way], one) for way, one in found.items()])


def summary(rows: list[Row]) -> Row:
    """One way's rows in figures."""
    right = sum(row["lenient"] for row in rows)
    share = {"right": right, "of": len(rows), "interval": share_interval(right, len(rows))}
    return {"lenient": share, "same_path": sum(row["same_path"] for row in rows)}


def _cells(name: str, one: Row) -> list[str]:
    share = one["lenient"]
    low, high = share["interval"]
    return [
        name,
        f"{share['right'] / share['of']:.0%} ({low:.0%}–{high:.0%}) of {share['of']}",
        str(one["same_path"]),
    ]


if __name__ == "__main__":
    main()
