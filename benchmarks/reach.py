"""How many examples of tasks about other things are within a bank's reach, and so could be harmed by its memory.

    python benchmarks/reach.py MODEL DATA        # the paper's tasks in DATA, every example embedded: some minutes

An example beyond the reach gets no memory: it is answered as the anchor alone answers it. Of the questions that the
bank is for (tests/elements/elements_qa.jsonl) as many as possible should be within. Writes results/reach.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from common import RESULTS, machine
from elements import QUESTIONS

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.evaluate.examples import read_documents, read_examples
from mlx_hiermem.evaluate.tasks import Task, find_tasks
from mlx_hiermem.router import Router


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    options = parser.parse_args()
    bank = MemoryBank.open(options.model / "bank")
    router, rows = Router.of_bank(bank), {}
    tasks = [
        *find_tasks(["all"], options.data),
        Task("elements", "questions", QUESTIONS),
    ]
    for task in tasks:
        perplexity = task.kind == "perplexity"
        examples = read_documents(task.file, True) if perplexity else read_examples(task, True).examples
        routed = router.route_batch([example.route for example in examples])
        rows[task.name] = {"examples": len(routed), "within": sum(not one.far for one in routed)}
        print(task.name, rows[task.name], flush=True)
    result = {"machine": machine(), "reach": bank.policy.reach, "tasks": rows}
    (RESULTS / "reach.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
