"""What a KV cache costs: computed again, read from a file, or kept in 8 and 4 bits.

    python benchmarks/kv_cache.py                    # the demo's model, 4 096 tokens; some minutes
    python benchmarks/kv_cache.py --tokens 1024      # a shorter prompt
    python benchmarks/kv_cache.py --model FOLDER     # another model with a bank

The prompt is the demo's documents, with a memory of its bank attached. Its cache is written to a file and read
again as mlx-lm does it. Copies of it in 8 and 4 bits go on beside it: the bytes, the time of a token, and for the
text that follows how far the next token's probabilities are from those with the exact cache.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import banks
import common
import mlx.core as mx
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlx_hiermem import load
from mlx_hiermem.apps.demo.tour import model_folder
from mlx_hiermem.model import MemoryModel

DOCUMENTS = pathlib.Path(__file__).parents[1] / "apps" / "demo" / "vital" / "documents.jsonl"
TOKENS, QUICK_TOKENS = 4096, 256  # of the prompt
CHUNK = 512  # are computed at once
FOLLOWING = 64  # tokens of text behind the prompt, for which probabilities are compared
STEPS = 8  # tokens of a turn
GROUP = 64
BITS = (8, 4)

Cache = list[Any]


def texts(model: MemoryModel, count: int) -> list[int]:
    """So many tokens of the documents, which are repeated where they are too short."""
    documents = [json.loads(line)["text"] for line in DOCUMENTS.read_text(encoding="utf-8").splitlines()]
    tokens = model.tokens("\n".join(documents))
    return (tokens * (count // len(tokens) + 1))[:count]


def prefill(model: MemoryModel, tokens: list[int]) -> Cache:
    cache = make_prompt_cache(model.anchor)
    for start in range(0, len(tokens), CHUNK):
        model.anchor(mx.array([tokens[start : start + CHUNK]]), cache=cache)
        mx.eval([entry.state for entry in cache])
    return cache


def step(model: MemoryModel, cache: Cache, first: int) -> None:
    """A few tokens behind the prompt, which are taken off the cache again."""
    token = mx.array([[first]])
    for _ in range(STEPS):
        token = model.anchor(token, cache=cache)[:, -1:].argmax(-1)
        mx.eval(token)
    trim_prompt_cache(cache, STEPS)


def logprobs(model: MemoryModel, cache: Cache, following: list[int]) -> mx.array:
    """[tokens, V] of what comes after each token of the text that follows."""
    logits = model.anchor(mx.array([following]), cache=cache)[0].astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    trim_prompt_cache(cache, len(following))
    return found


def compared_with(exact: mx.array, other: mx.array) -> dict[str, float]:
    """Mean Kullback-Leibler divergence in nats, and how often the likeliest token is the same."""
    divergence = (mx.exp(exact) * (exact - other)).sum(-1).mean()
    same = (exact.argmax(-1) == other.argmax(-1)).astype(mx.float32).mean()
    return {"divergence": float(divergence), "same_token": float(same)}


def files(model: MemoryModel, tokens: list[int], cache: Cache, file: pathlib.Path, runs: int) -> dict[str, Any]:
    """Computing the cache against writing it and reading it."""

    def read() -> None:
        mx.eval([entry.state for entry in load_prompt_cache(str(file))])

    sides: dict[str, Callable[[], Any]] = {
        "compute": lambda: prefill(model, tokens),
        "write": lambda: save_prompt_cache(str(file), cache),
        "read": read,
    }
    save_prompt_cache(str(file), cache)
    times = common.turns(sides, runs)
    return {"file_bytes": file.stat().st_size, "times": common.compared(times, "compute")}


def bits(model: MemoryModel, cache: Cache, following: list[int], runs: int) -> dict[str, Any]:
    """Each cache's bytes, time of a token and difference from the exact one."""
    caches = {"as computed": cache}
    for count in BITS:
        caches[f"{count} bits"] = [entry.to_quantized(GROUP, count) for entry in copy.deepcopy(cache)]
    for entries in caches.values():
        mx.eval([entry.state for entry in entries])
    exact = logprobs(model, cache, following)
    sides = {name: (lambda own=own: step(model, own, following[0])) for name, own in caches.items()}
    times = common.compared(common.turns(sides, runs), "as computed")
    return {
        name: {
            "bytes": sum(entry.nbytes for entry in own),
            **compared_with(exact, logprobs(model, own, following)),
            "times": times[name],
        }
        for name, own in caches.items()
    }


def report(result: dict[str, Any]) -> None:
    written, exact = result["file"], result["caches"]["as computed"]
    rows = [
        [name, common.around(side["wall_ms"], 0), common.around(side["cpu_ms"], 0)]
        for name, side in written["times"].items()
    ]
    print(f"{result['tokens']} tokens, {written['file_bytes'] / 1e6:.1f} MB in a file\n")
    common.table(("the cache", "ms", "CPU ms"), rows)
    print()
    rows = [
        [
            name,
            f"{own['bytes'] / 1e6:.1f} MB",
            f"{own['bytes'] / exact['bytes']:.2f}",
            common.around(own["times"]["wall_ratio"]),
            common.around(own["times"]["cpu_ratio"]),
            f"{own['divergence']:.5f}",
            f"{own['same_token']:.1%}",
        ]
        for name, own in result["caches"].items()
    ]
    common.table(("cache", "bytes", "ratio", "time of a token", "by CPU time", "nats", "same token"), rows)


def main() -> None:
    parser = common.options(__doc__, runs=3, quick=1)
    parser.add_argument("--tokens", type=int, help=f"of the prompt; default {TOKENS}, quick {QUICK_TOKENS}")
    parser.add_argument("--model", type=pathlib.Path, help="a model folder; default: the demo's")
    parser.add_argument("--folder", type=pathlib.Path, help="where to write; default: a temporary folder")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    count = asked.tokens or (QUICK_TOKENS if asked.quick else TOKENS)
    model = load(asked.model or model_folder())
    assert model.bank
    path = model.bank.tree.nodes(model.bank.tree.depth)[0]
    model.select(path, "")
    both = texts(model, count + FOLLOWING)
    tokens, following = both[:count], both[count:]
    with banks.scratch(asked.folder, 2e9) as folder:
        cache = prefill(model, tokens)
        written = files(model, tokens, cache, folder / "cache.safetensors", asked.runs)
        caches = bits(model, cache, following, asked.runs)
    result = {"tokens": count, "path": str(path), "group": GROUP, "file": written, "caches": caches}
    common.save(__file__, result, asked, before)
    report(result)


if __name__ == "__main__":
    main()
