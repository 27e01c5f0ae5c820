"""What quantising memories costs and saves: the demo's elements bank in 8 bits, in 4, and mixed.

    python benchmarks/quantize_memory.py        the table in docs/performance.md; some minutes on two cores

For each setting: the bank's bytes, what a question fetches, the error of the weights, how many of the 118 atomic
numbers the fetched memory answers (in the paper's wording, as `hiermem demo --full` asks), the loss of the right
answer, which moves before a greedy answer does, and the perplexity of documents. `fetch` is the time to read a path
that is in no cache of ours (the page cache has it). Blocks are dequantised when a path is attached; `swap` is what
changing to a cached path takes. Both are medians over the leaves.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import common
import elements

from mlx_hiermem import load
from mlx_hiermem.apps.demo import tour
from mlx_hiermem.apps.demo.evaluate import Element, answers, questions
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.quantize import KEPT, design, quantize
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.model import MemoryModel

RESULTS = pathlib.Path(__file__).parent / "results" / "quantize_memory.json"
# Bits level by level, and the group size.
SETTINGS = (((KEPT,), 64), ((8,), 64), ((8, 4), 64), ((KEPT, 4), 64), ((4,), 32), ((4,), 64))
DOCUMENTS = 30  # whose perplexity is measured
SWAPS = 3  # rounds over the leaves; the first one reads


def measure(model: pathlib.Path, bits: tuple[int, ...], group: int, folder: pathlib.Path) -> dict[str, Any]:
    """One row of the table. `folder` becomes a model with the quantised bank and the same anchor."""
    row: dict[str, Any] = {"bits": bits, "group_size": group, "levels": []}
    folder.mkdir()
    (folder / "anchor").symlink_to(model / "anchor", target_is_directory=True)
    bank = MemoryBank.open(model / "bank")
    if set(bits) == {KEPT}:
        (folder / "bank").symlink_to(bank.root, target_is_directory=True)
    else:
        reports = quantize(bank, folder / "bank", design(bank.config, bits, group))
        row["levels"] = [report.to_json() for report in reports]
    loaded = load(folder)
    assert loaded.bank is not None
    row["bank_bytes"] = loaded.bank.manifest.totals()["bytes"]
    row["fetch_bytes"] = max(
        sum(loaded.bank.manifest.blocks[node].bytes for node in leaf.prefixes())
        for leaf in loaded.bank.tree.nodes(2)
    )
    row["largest_error"] = max((level["largest_error"] for level in row["levels"] if level["level"]), default=0.0)
    asked = questions()
    found = answers(loaded, [question.prompt for question in asked], "fetched")
    row["right"] = sum(got == question.number for got, question in zip(found, asked, strict=True))
    row["loss"] = loss(loaded, asked)
    row["perplexity"] = perplexity(loaded)
    row["fetch_ms"], row["swap_ms"] = fetch(loaded), swap(loaded)
    return row


def loss(model: MemoryModel, asked: list[Element]) -> float:
    """Mean over the questions of -ln p(the right number | the prompt), in nats."""
    total = 0.0
    for question, routed in zip(asked, model.router.route_batch([q.prompt for q in asked]), strict=True):
        model.select(str(routed.path), "")
        prompt, whole = model.tokens(question.prompt), model.tokens(f"{question.prompt} {question.number}")
        assert whole[: len(prompt)] == prompt
        total += nats(model, whole, len(prompt))
    return total / len(asked)


def nats(model: MemoryModel, tokens: list[int], known: int) -> float:
    """-ln p of the tokens after the known ones, with the memory that is attached."""
    import mlx.core as mx
    import mlx.nn as nn

    logits = model.anchor(mx.array([tokens[:-1]]))[0, known - 1 :]
    return float(nn.losses.cross_entropy(logits, mx.array(tokens[known:]), reduction="sum"))


def perplexity(model: MemoryModel) -> float:
    """Of documents that the bank was made of, each with the memory that its text fetches."""
    texts = [json.loads(line)["text"] for line in elements.DOCUMENTS.read_text(encoding="utf-8").splitlines()]
    total, count = 0.0, 0
    for text in texts[:: len(texts) // DOCUMENTS]:
        model.select("fetched", text)
        tokens = model.tokens(text)
        total, count = total + nats(model, tokens, 1), count + len(tokens) - 1
    return math.exp(total / count)


def fetch(model: MemoryModel) -> float:
    """Milliseconds of reading and joining a path of which nothing is cached."""
    assert model.bank is not None
    times = []
    for leaf in model.bank.tree.nodes(model.bank.config.depth) * SWAPS:
        cache = BlockCache(model.bank)
        start = time.perf_counter()
        cache.fetch(leaf)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def swap(model: MemoryModel) -> float:
    """Milliseconds of joining and attaching a path whose blocks are cached."""
    assert model.bank is not None
    times = []
    for turn in range(SWAPS):
        for leaf in model.bank.tree.nodes(model.bank.config.depth):
            selection = model.select(str(leaf), "")
            times += [selection.fetch_ms + selection.attach_ms] if turn else []
    return statistics.median(times)


def show(rows: list[dict[str, Any]]) -> None:
    """The table, as Markdown."""
    print(
        "| bits (groups) | bank | fetched | largest error | right of 118 | loss, nats | perplexity | fetch | swap |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        bits = ", ".join("float16" if b == KEPT else str(b) for b in row["bits"])
        name = f"{bits} ({row['group_size']})" if row["levels"] else bits
        sizes = f"{row['bank_bytes'] / 1e6:.2f} MB | {row['fetch_bytes'] / 1e6:.2f} MB"
        figures = f"{row['largest_error']:.1%} | {row['right']} | {row['loss']:.1e}"
        times = f"{row['fetch_ms']:.1f} ms | {row['swap_ms']:.1f} ms"
        print(f"| {name} | {sizes} | {figures} | {row['perplexity']:.3f} | {times} |")


def main() -> None:
    model, rows = tour.prepare(lambda line: print(line, file=sys.stderr)), []
    with tempfile.TemporaryDirectory() as folder:
        for number, (bits, group) in enumerate(SETTINGS):
            rows.append(measure(model, bits, group, pathlib.Path(folder, str(number))))
            print(f"{number + 1} of {len(SETTINGS)}: {bits} {rows[-1]['right']}", file=sys.stderr, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": common.machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
