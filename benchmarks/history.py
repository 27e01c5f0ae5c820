"""Whether what was said before drags an answer down: questions alone, and behind two exchanges on other things.

    python benchmarks/history.py MODEL EXAM      # the first 240 rows; some five minutes after knowledge.py's

Each question has the memory that it gets alone. Before it stand the questions of two other rows, either with what
the model itself replied, right or wrong, or with answers to yet other questions, which are all wrong. Replies are
kept beside the model, as knowledge.py keeps them; a stopped run goes on. Writes results/history.json.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

import common
from knowledge import TOGETHER, TOKENS, Exam, Kept, Row, kept_of, read_exam, read_kept, summary

from mlx_hiermem import load
from mlx_hiermem.config import Path
from mlx_hiermem.memory_choice import MemoryChoice

BEFORE = (80, 160)  # rows further on, the questions that stand before one
ELSEWHERE = 37  # rows further on, whose answer is wrong
WAYS = {"own": "behind two exchanges", "wrong": "the same with wrong answers"}


def conversation(rows: Sequence[Row], number: int, way: str, alone: Kept) -> list[dict[str, str]]:
    """The messages that end with a row's question."""
    messages = []
    for away in BEFORE:
        place = (number + away) % len(rows)
        row, other = rows[place], rows[(place + ELSEWHERE) % len(rows)]
        said = other["answer"] if way == "wrong" else alone["fetched", row["id"]]["reply"]
        messages += [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": rows[number]["question"]}]


def ask(exam: Exam, rows: Sequence[Row], way: str, alone: Kept, kept: pathlib.Path) -> Kept:
    """The replies to all rows, which are kept as they come."""
    have = read_kept(kept)
    missing = [number for number, row in enumerate(rows) if (way, row["id"]) not in have]
    with kept.open("a", encoding="utf-8") as out:
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            paths = [alone["fetched", rows[number]["id"]]["path"] for number in some]
            replies = exam.model.batch(
                [conversation(rows, number, way, alone) for number in some],
                memory=[Path.parse(path) if path else MemoryChoice.NONE for path in paths],
                max_tokens=TOKENS,
            )
            for number, reply in zip(some, replies, strict=True):
                found = exam.graded(rows[number], way, reply)
                have[way, rows[number]["id"]] = found
                out.write(json.dumps(found, ensure_ascii=False) + "\n")
            out.flush()
    return have


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("exam", type=pathlib.Path)
    parser.add_argument("--rows", default="0-240", help="first-end; default 0-240, by which settings may be chosen")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    rows, exam = read_exam(asked.exam, asked.rows), Exam(load(asked.model))
    alone = exam.ask_all(rows, ["fetched"], kept_of(asked.model))
    found = {"alone": summary([alone["fetched", row["id"]] for row in rows])}
    kept = asked.model.with_name(f"{asked.model.name}.history.jsonl")
    for way, name in WAYS.items():
        have = ask(exam, rows, way, alone, kept)
        found[name] = summary([have[way, row["id"]] for row in rows])
    common.save(__file__, {"rows": asked.rows, "ways": found}, asked, before)
    cells = [[name, *(f"{one[key]['share']:.1%}" for key in ("lenient", "strict"))] for name, one in found.items()]
    common.table(("", "lenient", "strict"), cells)


if __name__ == "__main__":
    main()
