"""What a bank harms: the paper's tasks of common knowledge, and questions about what the bank does not know.

    python benchmarks/harm.py MODEL DATA [--limit 300] [--tasks lambada_openai boolq winograd wordnet countries]
    python benchmarks/harm.py MODEL DATA --everywhere

DATA has `evals/`, `qa/` and `corpus/`: the paper's tasks, wordnet_isa_qa.jsonl and countries.jsonl. A text beyond
the bank's reach gets no memory and cannot be harmed; with `--everywhere` every text gets one, which shows what the
reach protects from. Questions of wordnet and countries are asked as plain text; with ` in chat` behind the name in
chat, a third as many, where a reply is right if it has an accepted answer anywhere.

Intervals of differences are Bonett and Price's for paired shares, which do not shrink to nothing where nothing
changed: of 275 examples they are then within a point. Results are kept in `MODEL.harm/`, and a stopped run goes on.
Writes results/harm.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import common
from knowledge import Exam, Kept, Row
from learn_corpora import of_countries

from mlx_hiermem.evaluate.runner import Evaluation
from mlx_hiermem.evaluate.statistics import Z
from mlx_hiermem.evaluate.tasks import Task, find_tasks
from mlx_hiermem.model import MemoryModel

COMMON = ("lambada_openai", "boolq", "winograd")  # those of the paper's six that DATA has
OTHERS = ("wordnet", "countries")
DEFAULT = (*COMMON, *OTHERS, *(f"{name} in chat" for name in OTHERS))
IN_CHAT = 3  # times fewer questions: a reply is written to its end
BOUND = 0.01  # a bank harms nothing where the whole interval is within a point


@dataclass(frozen=True)
class Harm:
    """Right answers without memory and with it, of the same n examples."""

    task: str
    n: int
    reached: int  # examples that got memory
    before: int
    after: int
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return paired_interval(self.gained, self.lost, self.n)

    def to_json(self) -> Row:
        low, high = self.interval
        return vars(self) | {"difference": self.difference, "interval": [low, high], "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        return within(*self.interval)


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Bonett and Price's 95 % interval (2012) of the difference of two shares of the same n."""
    more, fewer = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle = more - fewer
    half = Z * math.sqrt((more + fewer - middle**2) / (n + 2))
    return middle - half, middle + half


def within(low: float, high: float) -> str:
    """Whether nothing is harmed, or helped, by more than the bound."""
    if low >= -BOUND and high <= BOUND:
        return "yes"
    return "no" if high < -BOUND or low > BOUND else "unclear"


def mean_of(found: Sequence[Harm]) -> Row:
    """The mean difference of several tasks, each of which counts the same."""
    widths = [(one.interval[1] - one.interval[0]) / 2 for one in found]
    value = sum(one.difference for one in found) / len(found)
    half = math.sqrt(sum(width**2 for width in widths)) / len(found)
    low, high = value - half, value + half
    return {"difference": value, "interval": [low, high], "tasks": len(found), "verdict": within(low, high)}


def compared(task: str, without: Sequence[bool], having: Sequence[bool], reached: int) -> Harm:
    """Of the same examples in the same order."""
    pairs = list(zip(without, having, strict=True))
    gained, lost = (sum(1 for a, b in pairs if (a, b) == pair) for pair in ((False, True), (True, False)))
    return Harm(task, len(pairs), reached, sum(without), sum(having), gained, lost)


# Questions about other things


def other_questions(data: pathlib.Path, name: str) -> list[Row]:
    """All questions of a corpus that the bank has not learnt, in one wording, and as somebody asks in a chat."""
    if name == "wordnet":
        rows = _rows(data / "qa" / "wordnet_isa_qa.jsonl")
    else:
        rows = of_countries(_rows(data / "corpus" / "countries.jsonl"))
    return [
        {key: row[key] for key in ("id", "doc", "prompt", "answer", "aliases")}
        | {"question": unframed(row["heldout_prompts"][0])}
        for row in rows
    ]


def unframed(prompt: str) -> str:
    """The question in `Question: … Answer:`."""
    return re.sub(r"^Question: |\nAnswer:.*$", "", prompt, flags=re.DOTALL)


def drawn(rows: Sequence[Row], limit: int) -> list[Row]:
    """So many of them; more of them add to fewer."""
    order = list(rows)
    random.Random(0).shuffle(order)
    return order[:limit]


def _rows(file: pathlib.Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# Asking


@contextlib.contextmanager
def without_reach(model: MemoryModel, wanted: bool = True) -> Iterator[None]:
    """Every text gets memory, however far it is from all that the bank knows."""
    policy = model.router.policy
    if wanted:
        model.router.policy = replace(policy, reach=math.inf, passage_reach=math.inf)
    try:
        yield
    finally:
        model.router.policy = policy


class Asker:
    """Asks without memory and with it."""

    def __init__(self, model: pathlib.Path, data: pathlib.Path, limit: int, everywhere: bool) -> None:
        self.data, self.limit, self.everywhere = data, limit, everywhere
        self.out = model.with_name(f"{model.name}.harm")
        self.out.mkdir(exist_ok=True)
        self.evaluation = Evaluation.of(model, self.out)
        if everywhere:  # other results than those that the reach has decided
            identity = self.evaluation.identity
            self.evaluation.identity = {**identity, "bank": f"{identity['bank']} everywhere"}

    def ask(self, name: str) -> Harm:
        with without_reach(self.evaluation.model, self.everywhere):
            if name.endswith(" in chat"):
                return self._in_chat(name)
            return self._as_task(name)

    def _as_task(self, name: str) -> Harm:
        if name in OTHERS:
            file = self.out / "questions" / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            rows = [{key: row[key] for key in row if key != "question"} for row in other_questions(self.data, name)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            task = Task(name, "questions", file)
        else:
            (task,) = find_tasks([name], self.data / "evals")
        prepared = self.evaluation.prepare(task, ("none", "fetched"), self.limit, truncate=True)
        none, fetched = (self.evaluation.run(prepared, memory).rows for memory in ("none", "fetched"))
        right = [[row["accuracy"] > 0 for row in rows] for rows in (none, fetched)]
        return compared(name, *right, reached=sum(row["memory"] != "none" for row in fetched))

    def _in_chat(self, name: str) -> Harm:
        corpus, model = name.partition(" ")[0], self.evaluation.model
        rows = drawn(other_questions(self.data, corpus), max(1, self.limit // IN_CHAT))
        reached = [row for row in rows if model.choose("fetched", row["question"]).path]

        def asked(memory: str, some: list[Row]) -> Kept:
            kept = self.out / f"{corpus}.{self.evaluation.digest(memory)[:12]}.kept"
            return Exam(model).ask_all(some, [memory], kept)

        none = asked("none", rows)
        having = {one: row for (_, one), row in none.items()}  # what gets no memory is answered as before
        fetched = asked("fetched", reached)  # it may have kept others, of another reach
        having |= {row["id"]: fetched["fetched", row["id"]] for row in reached}
        ids = [row["id"] for row in rows]
        right = [none["none", one]["lenient"] for one in ids], [having[one]["lenient"] for one in ids]
        return compared(name, *right, reached=len(reached))


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--limit", type=int, default=300, help="examples of each task, drawn at random")
    parser.add_argument("--tasks", nargs="+", default=DEFAULT, help="also the paper's others, by name")
    parser.add_argument("--everywhere", action="store_true", help="give memory to every text, beyond the reach too")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    asker, found = Asker(asked.model, asked.data, asked.limit, asked.everywhere), list[Harm]()
    for name in asked.tasks:
        found.append(asker.ask(name))
        print(*_cells(found[-1]), sep="  ", flush=True)
    groups = {"common knowledge": COMMON, "other corpora": OTHERS}
    means = {
        f"mean of {name}": mean_of(own)
        for name, tasks in groups.items()
        if (own := [one for one in found if one.task in tasks])
    }
    result: dict[str, Any] = {"limit": asked.limit, "tasks": [one.to_json() for one in found], "means": means}
    name = f"{pathlib.Path(__file__).stem}_everywhere" if asked.everywhere else __file__
    common.save(name, result, asked, before)
    rows = [_cells(one) for one in found]
    rows += [[name, "", "", "", "", _points(mean), mean["verdict"]] for name, mean in means.items()]
    common.table(("", "n", "with memory", "none", "fetched", "difference", "within ± 1"), rows)


def _cells(one: Harm) -> list[str]:
    shares = (f"{count / one.n:.1%}" for count in (one.reached, one.before, one.after))
    return [one.task, str(one.n), *shares, _points(one.to_json()), one.verdict]


def _points(one: Row) -> str:
    low, high = one["interval"]
    return f"{100 * one['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main()
