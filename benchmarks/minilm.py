"""Sentence embeddings a second: our MiniLM against sentence-transformers', on the same texts, cores and batch size.

    python benchmarks/minilm.py        # 118 texts of up to 256 tokens, and 118 questions; two minutes

The sides take turns in processes of their own, because PyTorch would find the BLAS that we load. Each embeds all
texts once to warm up, then once more. Both must give the same vectors.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

ELEMENTS = pathlib.Path(__file__).parents[1] / "tests" / "elements" / "elements.jsonl"
BATCH, CORES = 32, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def texts(kind: str, quick: bool) -> list[str]:
    rows = [json.loads(line) for line in ELEMENTS.read_text(encoding="utf-8").splitlines()]
    rows = rows[:BATCH] if quick else rows
    return [row["text"] if kind == "documents" else f"What is the atomic number of {row['name']}?" for row in rows]


def ours() -> Callable[[list[str]], np.ndarray]:
    from mlx_hiermem import cpu

    cpu.enable()
    from mlx_hiermem.embedder import Embedder

    embedder = Embedder.load()
    return lambda batch: embedder.embed(batch, BATCH)


def theirs() -> Callable[[list[str]], np.ndarray]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    from mlx_hiermem.assets import fetch

    torch.set_num_threads(CORES)
    folder = str(fetch("all-minilm-l6-v2"))
    encoder = modules.Transformer(folder, max_seq_length=256)
    pooling = modules.Pooling(384)
    model = SentenceTransformer(modules=[encoder, pooling, modules.Normalize()], device="cpu")
    return lambda batch: model.encode(batch, batch_size=BATCH, show_progress_bar=False)


def child(side: str, quick: bool) -> None:
    """Prints documents a second, by wall clock and CPU time, and a few sums of the vectors."""
    embed, found = (ours if side == "ours" else theirs)(), {}
    for kind in ("documents", "questions"):
        batch = texts(kind, quick)
        embed(batch)
        wall, cpu = time.perf_counter(), time.process_time()
        vectors = embed(batch)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        found[kind] = {"wall": wall, "cpu": cpu, "count": len(batch), "first": vectors[:8].tolist()}
    print(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], "--quick" in sys.argv)
    import common  # only now: it picks a BLAS, which PyTorch would find

    parser = common.options(__doc__, runs=9, quick=1)
    asked, before = common.parsed(parser), os.getloadavg()[0]
    runs: dict[str, list[dict]] = {"theirs": [], "ours": []}
    for run in range(asked.runs):
        for side in runs if run % 2 else reversed(runs):
            runs[side].append(common.child(__file__, "--child", side, *["--quick"] * asked.quick))
    result, rows = {}, []
    for kind in ("documents", "questions"):
        difference = np.abs(np.array(runs["ours"][0][kind]["first"]) - runs["theirs"][0][kind]["first"]).max()
        assert difference < 1e-4, difference
        count = runs["ours"][0][kind]["count"]
        times = {
            side: {clock: [run[kind][clock] for run in found] for clock in ("wall", "cpu")}
            for side, found in runs.items()
        }
        result[kind] = {"count": count, "difference": float(difference)}
        for clock in ("wall", "cpu"):
            speeds = {side: common.spread(count / seconds for seconds in times[side][clock]) for side in times}
            ratio = common.ratios(times["theirs"][clock], times["ours"][clock])
            result[kind][clock] = {**speeds, "speed_ratio": ratio}
            cells = [common.around(speeds[side], 1) for side in ("ours", "theirs")]
            rows.append([kind, clock, *cells, common.around(ratio)])
    common.save(__file__, {"batch": BATCH, "threads": CORES, **result}, asked, before)
    common.table(("texts", "by", "ours, a second", "sentence-transformers", "ratio"), rows)


if __name__ == "__main__":
    main()
