"""What each thing in `mlx_hiermem.cpu` earns: an operation that a user waits for, with all of them and without one.

    python benchmarks/cpu_tricks.py                   # on Linux without a GPU; half an hour
    python benchmarks/cpu_tricks.py --only step       # one operation; the others' results stay

Each side is a process of its own, and the sides take turns. A part earns its place where the CPU time without it is
1.1 times or more. Parts that were dropped stay in the results until their operation is measured again.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from mlx_hiermem import cpu

SECONDS, FEWEST, MOST = 4.0, 3, 40  # of a side's turn, and how often it does the operation in it
LATE, PARAMETERS = "late", 32 * 3 * 576 * 10  # blocks of 24 and 8 units in the last ten layers of SmolLM2-135M
# Operation -> the parts that take part in it.
OPERATIONS = {
    "question": ("OpenBLAS", "malloc", "GELU", "attention"),
    "documents": ("OpenBLAS", "malloc", "GELU", "attention"),
    "swap": ("malloc",),
    "step": ("OpenBLAS", "malloc", "kept exponentials"),
}


def leave_out(part: str) -> None:
    """Before MLX is imported: `enable` without one of its parts."""
    if part == "OpenBLAS":
        cpu.open_blas = lambda: None
    if part == "malloc":
        cpu.keep_freed_memory = lambda: False
    cpu.enable()


def replace(part: str) -> None:
    """After MLX is imported: the plain way in place of ours."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_hiermem import embedder
    from mlx_hiermem.learn.train import step

    def attention(q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int]) -> mx.array:
        mask = (mx.arange(q.shape[2]) < mx.array(lengths)[:, None])[:, None, None, :]
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)

    plain: dict[str, list[tuple[Any, str, Any]]] = {
        "GELU": [(embedder, "gelu", nn.gelu)],
        "attention": [(embedder, "attention", attention)],
        "kept exponentials": [(step, "logsumexp", lambda logits: mx.logsumexp(logits, -1))],
    }
    for module, name, value in plain.get(part, []):
        getattr(module, name)  # it is still there
        setattr(module, name, value)


def embed(kind: str) -> Callable[[], Any]:
    import minilm

    from mlx_hiermem.embedder import Embedder

    embedder, texts = Embedder.load(), minilm.texts(kind, True)
    turn = iter(range(1 << 30))
    if kind == "documents":
        return lambda: embedder.embed(texts[:16])
    return lambda: embedder.embed([texts[next(turn) % len(texts)]])


def swap(folder: pathlib.Path) -> Callable[[], Any]:
    """To another path whose blocks are cached, from a float16 bank to a float32 anchor."""
    import banks

    from mlx_hiermem import load

    model = load(banks.demo_anchor(folder / "model"))
    paths, turn = ("0.1.2", "3.2.1", "1.1.1", "2.0.3"), iter(range(1 << 30))
    for path in paths:
        model.select(path, "")
    return lambda: model.select(paths[next(turn) % len(paths)], "")


def step(folder: pathlib.Path) -> Callable[[], Any]:
    """Of `hiermem learn`: 2 rows of 128 tokens, with kept states."""
    from train_speed import LEAF, Memory, documents

    from mlx_hiermem.apps.demo.tour import model_folder
    from mlx_hiermem.learn.train.dataset import TrainingSet, TrainingSetWriter

    anchor = model_folder() / "anchor"
    with TrainingSetWriter(folder / "set") as out:
        for row in documents(anchor, 2, 128, "text"):
            out.add(row, [LEAF])
    memory = Memory(anchor, folder / "work", TrainingSet.open(folder / "set"), LATE, PARAMETERS)
    return memory._step


def child(operation: str, part: str) -> None:
    """Prints the seconds of each time, by wall clock and CPU time."""
    leave_out(part)
    replace(part)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        made = {"swap": swap, "step": step}.get(operation)
        do = made(folder) if made else embed({"question": "questions"}.get(operation, operation))
        slow = part == "OpenBLAS"  # without it
        for _ in range(1 if slow else 2):
            do()
        found: dict[str, list[float]] = {"wall": [], "cpu": []}
        start = time.perf_counter()
        while len(found["wall"]) < FEWEST or (len(found["wall"]) < MOST and time.perf_counter() - start < SECONDS):
            wall, used = time.perf_counter(), time.process_time()
            do()
            found["wall"].append(time.perf_counter() - wall)
            found["cpu"].append(time.process_time() - used)
    print(json.dumps(found))


def measure(operation: str, runs: int) -> dict[str, Any]:
    """Part left out ("" for none) -> spreads of milliseconds, and of the ratio to all parts in the same round."""
    import common

    sides = ("", *OPERATIONS[operation])
    medians: dict[str, dict[str, list[float]]] = {side: {"wall": [], "cpu": []} for side in sides}
    for run in range(runs):
        for side in sides if run % 2 else reversed(sides):
            found = common.child(__file__, "--child", operation, side)
            for clock, values in found.items():
                medians[side][clock].append(statistics.median(values))
    return common.compared(medians, "")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:4])
    import common

    parser = common.options(__doc__, runs=7, quick=1)
    parser.add_argument("--only", choices=OPERATIONS, help="measure this operation alone")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    file = common.RESULTS / "cpu_tricks.json"
    result = json.loads(file.read_text(encoding="utf-8"))["operations"] if file.exists() else {}
    rows: list[list[str]] = []
    for operation in [asked.only] if asked.only else OPERATIONS:
        result[operation] = measure(operation, asked.runs)
        for part, row in result[operation].items():
            keys = (("wall_ms", 1), ("cpu_ms", 1), ("wall_ratio", 2), ("cpu_ratio", 2))
            rows.append([operation, part or "all of them", *(common.around(row[key], n) for key, n in keys)])
    common.save(__file__, {"operations": result}, asked, before)
    common.table(("operation", "without", "wall, ms", "CPU, ms", "wall ratio", "CPU ratio"), rows)


if __name__ == "__main__":
    main()
