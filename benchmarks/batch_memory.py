"""Throughput of one decode step for many sequences with different memories, against one sequence at a time.

    python benchmarks/batch_memory.py                # the elements' model, 8 requests on 4 paths, 2 minutes

Both sides answer the same questions greedily under the same memories, routed beforehand, and take turns; every
token of the batch must be the token that the sequence gets alone. Medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import time

import common
from elements.model import model_folder

from mlx_hiermem import load
from mlx_hiermem.batch import MemoryBatch
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling

RESULTS = pathlib.Path(__file__).parent / "results" / "batch_memory.json"
SUBJECTS = ("neon", "iron", "gold", "uranium", "helium", "zinc", "silver", "thorium")
Replies = list[list[int]]


def prompts(model: MemoryModel, count: int, paths: int) -> list[tuple[list[int], str]]:
    """(tokens, path) of `count` questions, spread evenly over so many of the bank's leaves."""
    assert model.bank
    leaves = model.bank.tree.nodes(model.bank.tree.depth)
    chosen = [leaves[number * len(leaves) // paths] for number in range(paths)]
    questions = [f"What is the atomic number of {SUBJECTS[number % len(SUBJECTS)]}?" for number in range(count)]
    asked = [model.chat_tokens([{"role": "user", "content": question}]) for question in questions]
    return [(tokens, str(chosen[number % paths])) for number, tokens in enumerate(asked)]


def one_at_a_time(model: MemoryModel, requests: list[tuple[list[int], str]], tokens: int) -> tuple[Replies, float]:
    start, replies = time.perf_counter(), []
    for prompt, path in requests:
        model.select(path, "")
        replies.append([response.token for response in model.responses(prompt, Sampling(tokens))])
    return replies, time.perf_counter() - start


def together(model: MemoryModel, requests: list[tuple[list[int], str]], tokens: int) -> tuple[Replies, float]:
    start = time.perf_counter()
    batch, replies = MemoryBatch(model, len(requests), prefix_cache_bytes=0), dict[int, list[int]]()
    for prompt, path in requests:
        uid, _ = batch.add(prompt, batch.model.choose(path, []), Sampling(max_tokens=tokens))
        replies[uid] = []
    while batch:
        for token in batch.step():
            replies[token.uid].append(token.token)
    return list(replies.values()), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=model_folder(), help="default: the elements'")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--paths", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="longest reply")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    model = load(options.model)
    requests = prompts(model, options.requests, options.paths)
    rows = []
    for run in range(options.runs + 1):
        load_before = os.getloadavg()[0]
        alone, alone_seconds = one_at_a_time(model, requests, options.tokens)
        batched, batch_seconds = together(model, requests, options.tokens)
        if not run:
            continue  # blocks come from the disk, and memory is not warm yet
        row = {
            "alone_seconds": alone_seconds,
            "batch_seconds": batch_seconds,
            "tokens": sum(map(len, alone)),
            "equal_replies": sum(a == b for a, b in zip(alone, batched, strict=True)),
            "load_before": load_before,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    ratio = statistics.median(row["alone_seconds"] / row["batch_seconds"] for row in rows)
    result = {
        "machine": common.machine(),
        "requests": options.requests,
        "paths": options.paths,
        "runs": rows,
        "throughput_ratio": ratio,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{options.requests} requests on {options.paths} paths: {ratio:.2f} times the throughput of one at a time"
    )


if __name__ == "__main__":
    main()
