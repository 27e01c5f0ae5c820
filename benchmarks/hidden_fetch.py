"""Time to the first token where a question's blocks are not in memory yet, and how much of it a draft hides.

    python benchmarks/hidden_fetch.py        # SmolLM2-135M with R = 336 in 30 layers, 35 MB a path; some minutes

Questions of at least 128 tokens, each routed, fetched, attached, prefilled and answered with one token. Warm: their
blocks are cached. Cold: their files are on the disk only. Drafted: so too, but the question without its last two
words was given to `Session.draft`, and its files were read ahead before the rest came, as while one types.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any

import banks
import common
from elements import DOCUMENTS

from mlx_hiermem import load
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.session import Session

TOKENS = 128  # of a question, at least


def questions(model: MemoryModel) -> list[str]:
    """Texts about the elements, as long as they have to be."""
    found = []
    for line in DOCUMENTS.read_text(encoding="utf-8").splitlines():
        words = json.loads(line)["text"].split()
        count = next((n for n in range(60, len(words)) if len(model.tokens(" ".join(words[:n]))) >= TOKENS), 0)
        if count:
            found.append("Is this right? " + " ".join(words[:count]))
    return found


class Asker:
    """Asks question after question, each in a new session, with its blocks in a certain state."""

    def __init__(self, model: MemoryModel, state: str) -> None:
        self.model, self.state = model, state
        self.waited: list[float] = []  # for the files to be read ahead
        self.prompts: list[int] = []
        self.session, self.text = Session(model, max_tokens=1), ""

    def prepare(self, text: str) -> None:
        model, self.text = self.model, text
        assert model.bank
        self.session = Session(model, max_tokens=1)
        path = self.session.route(text).topic.path
        model.cache = BlockCache(model.bank)
        model.select("none", "")  # lets go of the memory before
        if self.state == "warm":
            model.cache.fetch(path)
            return
        common.drop(model.bank.root / block_name(node) for node in path.prefixes())
        if self.state == "drafted":
            start = time.perf_counter()
            self.session.draft(text.rsplit(" ", 2)[0])
            if self.session._ahead:
                self.session._ahead.result()
            self.waited.append(1e3 * (time.perf_counter() - start))

    def ask(self) -> None:
        next(self.session.ask(self.text))
        self.prompts.append(self.session.prefilled)


def measure(model: MemoryModel, runs: int) -> dict[str, Any]:
    texts = questions(model)
    askers = {state: Asker(model, state) for state in ("warm", "cold", "drafted")}
    times: dict[str, dict[str, list[float]]] = {state: {"wall": [], "cpu": []} for state in askers}
    for run in range(runs + 1):
        order = list(askers) if run % 2 else list(askers)[::-1]
        for state in order:  # the same question for all three
            askers[state].prepare(texts[run % len(texts)])
            wall, cpu = time.perf_counter(), time.process_time()
            askers[state].ask()
            if run:
                times[state]["wall"].append(time.perf_counter() - wall)
                times[state]["cpu"].append(time.process_time() - cpu)
    waited = common.spread(askers["drafted"].waited)
    tokens = common.spread(map(float, askers["warm"].prompts))
    return {"prompt_tokens": tokens, "draft_ms": waited, **common.compared(times, "warm")}


def main() -> None:
    parser = common.options(__doc__, runs=21, quick=2)
    parser.add_argument("--folder", type=pathlib.Path, help="where to write; default: a temporary folder")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    with banks.scratch(asked.folder, 5e8) as folder:
        model = load(banks.demo_anchor(folder / "model"))
        os.sync()
        assert model.bank
        found = measure(model, asked.runs) | {"bytes": 2 * model.bank.config.fetched_parameters}
    common.save(__file__, found, asked, before)
    rows = [
        [state, *(common.around(found[state][key], 0 if "ms" in key else 2) for key in ("wall_ms", "wall_ratio"))]
        for state in ("warm", "cold", "drafted")
    ]
    common.table(("blocks", "first token, ms", "ratio"), rows)


if __name__ == "__main__":
    main()
