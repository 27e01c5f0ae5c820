"""Memory against retrieval: the same questions with fetched memory, with the best document in the prompt, and bare.

    python benchmarks/rag.py        # the demo's model; 118 questions of 8 tokens each, some minutes

Retrieval is vanilla: the document whose MiniLM embedding is nearest to the question's goes in front of it. Both
ways embed the question once. Time to the first token includes that, the fetch and the prefill. A dense model of as
many parameters as anchor and memory together is the row `widened` of benchmarks/decode.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import common
import numpy as np
from elements import DOCUMENTS

from mlx_hiermem import load
from mlx_hiermem.apps.demo import tour
from mlx_hiermem.apps.demo.evaluate import questions
from mlx_hiermem.model import MemoryModel

TOKENS = 8  # of an answer


class Retrieval:
    """The documents and their embeddings."""

    def __init__(self, model: MemoryModel) -> None:
        rows = [json.loads(line) for line in DOCUMENTS.read_text(encoding="utf-8").splitlines()]
        self.model, self.documents = model, [row["text"] for row in rows]
        self.vectors = model.router.embedder.embed(self.documents)

    def prompt(self, question: str) -> str:
        best = int((self.vectors @ self.model.router.embedder.embed([question])[0]).argmax())
        return f"{self.documents[best]}\n\n{question}"


def answer(model: MemoryModel, make: Callable[[str], str], question: str, memory: str) -> tuple[str, float, float]:
    """The answer, and seconds to the first token and to the end."""
    start, text, first = time.perf_counter(), "", 0.0
    for piece in model.stream(make(question), memory=memory, max_tokens=TOKENS):
        first = first or time.perf_counter() - start
        text += piece
    return text, first, time.perf_counter() - start


def main() -> None:
    asked, before = common.parsed(common.options(__doc__, runs=118, quick=4)), os.getloadavg()[0]
    model = load(tour.prepare(lambda line: print(line, file=sys.stderr)))
    retrieval, found = Retrieval(model), {}
    chosen = questions()[:: max(1, 118 // asked.runs)][: asked.runs]
    sides: dict[str, tuple[Callable[[str], str], str]] = {
        "none": (str, "none"),
        "memory": (str, "fetched"),
        "RAG": (retrieval.prompt, "none"),
    }
    times: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    right, tokens = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0)
    for number, question in enumerate((chosen[0], *chosen)):
        for side, (make, memory) in sides.items():
            cpu = time.process_time()
            text, first, whole = answer(model, make, question.prompt, memory)
            if number:  # the first one warms up
                times[side].append((first, whole, time.process_time() - cpu))
                right[side] += text.replace(".", " ").split()[:1] == [str(question.number)]
                tokens[side] += model.response.prompt_tokens if model.response else 0
    rows = []
    for side, values in times.items():
        first, whole, cpu = (list(column) for column in zip(*values, strict=True))
        base = [list(column) for column in zip(*times["memory"], strict=True)]
        found[side] = {
            "right": right[side],
            "prompt_tokens": tokens[side] / len(values),
            "first_ms": common.spread(1e3 * s for s in first),
            "answers_per_second": len(values) / float(np.sum(whole)),
            "first_ratio": common.ratios(first, base[0]),
            "cpu_ratio": common.ratios(cpu, base[2]),
        }
        row = found[side]
        cells = [
            f"{row['right']} of {len(values)}",
            f"{row['prompt_tokens']:.0f}",
            common.around(row["first_ms"], 0),
        ]
        cells += [
            f"{row['answers_per_second']:.2f}",
            common.around(row["first_ratio"]),
            common.around(row["cpu_ratio"]),
        ]
        rows.append([side, *cells])
    common.save(__file__, {"questions": len(chosen), "tokens": TOKENS, "sides": found}, asked, before)
    common.table(("", "right", "prompt", "first token, ms", "answers/s", "to memory's", "CPU time"), rows)


if __name__ == "__main__":
    main()
