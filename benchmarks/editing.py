"""What removing a block leaves behind, and what a corrected fact changes: the elements' bank, 472 of its questions.

    python benchmarks/editing.py MODEL [--leaf 0.1] [--subject Molybdenum] [--answer 142]

Three copies of the bank. In one the leaf is removed and its questions go to the nearest other leaf; in one it is
closed and they stop above, so that only the block above answers; in one the leaf alone is trained on, with one
atomic number changed. Atomic numbers and symbols are asked for again in each, in two wordings; without memory only
those of the leaf. Writes benchmarks/results/editing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

import common  # noqa: F401  # before MLX, for which it picks the BLAS
import mlx.core as mx
import numpy as np
from elements import QUESTIONS

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import write_block
from mlx_hiermem.config import Path
from mlx_hiermem.evaluate.compare import columns, compare
from mlx_hiermem.evaluate.results import Run
from mlx_hiermem.evaluate.runner import Evaluation
from mlx_hiermem.evaluate.tasks import Task
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.model_folder import load

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "editing.json"
ASKED = map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines())
ROWS = [row for row in ASKED if row["relation"] != "element_of_number"]
SETTINGS = TrainingSettings(epochs=30, groups=1, group_tokens=512, rate=3e-3, generic=False)


def copy(model: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A model with a bank of its own; the anchor is linked."""
    out.mkdir()
    os.symlink((model / "anchor").resolve(), out / "anchor")
    shutil.copytree(model / "bank", out / "bank")
    return out


def ask(model: pathlib.Path, file: pathlib.Path, out: pathlib.Path, memory: str = "fetched") -> Run:
    evaluation = Evaluation.of(model, out)
    return evaluation.run(evaluation.prepare(Task("questions", "questions", file), (memory,)), memory)


def write(file: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    """A file of questions, each with one other wording."""
    shown = (row | {"heldout_prompts": row["heldout_prompts"][:1]} for row in rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in shown), encoding="utf-8")
    return file


def right(run: Run, ids: set[str]) -> str:
    rows = [row for row in run.rows if row["id"] in ids]
    return f"{sum(int(row['accuracy']) for row in rows)} of {len(rows)}"


def correct(model: pathlib.Path, leaf: Path, ids: set[str], subject: str, answer: str, work: pathlib.Path) -> None:
    """Trains the leaf's block alone: the corrected number in three wordings, its other questions as they are."""
    bank = MemoryBank.open(model / "bank")
    anchor, tokenizer, _ = load_anchor(model / "anchor", mx.float32)

    def start(node: Path) -> Tensors:
        block = bank.read(node)
        return {name: block.values(name) for name in bank.config.widths}

    def example(prompt: str, reply: str) -> TrainingExample:
        asked, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {reply}.")
        return TrainingExample(np.array(whole, np.int32), np.arange(len(whole)) >= len(asked))

    with TrainingSetWriter(work / "examples") as out:
        for row in (row for row in ROWS if row["id"] in ids):
            changed = row["subject"] == subject and row["relation"] == "atomic_number"
            prompts = [row["prompt"], *(row["heldout_prompts"][:2] if changed else ())]
            for prompt in prompts:
                out.add(example(prompt, answer if changed else row["answer"]), [leaf])
    trainer = Trainer(
        work / "training",
        anchor,
        bank.config,
        TrainingSet.open(work / "examples"),
        SETTINGS,
        start=start,
        learns=lambda node: node == leaf,
    )
    trainer.run()
    ((_, weights),) = trainer.blocks()
    arrays = {name: np.array(weights[name].astype(getattr(mx, bank.config.dtype))) for name in bank.config.widths}
    file = work / "block.safetensors"
    write_block(file, {name: (array.shape, array) for name, array in arrays.items()}, bank.config.dtype)
    edit.add(model / "bank", file, leaf, replacing=True)


def measure(model: pathlib.Path, leaf: Path, subject: str, answer: str, folder: pathlib.Path) -> dict[str, Any]:
    out, file = folder / "results", write(folder / "questions.jsonl", ROWS)
    before = ask(model, file, out)
    inside = {row["id"] for row in before.rows if row["path"] == str(leaf)}
    outside = {row["id"] for row in before.rows} - inside
    found: dict[str, Any] = {"leaf": str(leaf), "questions of the leaf": len(inside), "elsewhere": len(outside)}
    found["before"] = {"leaf": right(before, inside), "elsewhere": right(before, outside)}
    removed, closed, changed = (copy(model, folder / name) for name in ("removed", "closed", "changed"))
    edit.remove(removed / "bank", [leaf])
    edit.block(closed / "bank", [leaf], "parent")
    start = time.process_time()
    correct(changed, leaf, inside, subject, answer, folder)
    found["training, CPU seconds"] = round(time.process_time() - start, 1)
    runs = {name: ask(folder / name, file, out) for name in ("removed", "closed", "changed")}
    own = write(folder / "own.jsonl", [row for row in ROWS if row["id"] in inside])
    found["none"] = {"leaf": right(ask(model, own, out, "none"), inside)}
    for name, run in runs.items():
        (locality,) = compare(columns([("before", before), (name, run)])).locality
        found[name] = {
            "leaf": right(run, inside),
            "elsewhere": right(run, outside),
            "elsewhere, replies changed": sum(
                a["reply"] != b["reply"] for a, b in zip(before.rows, run.rows, strict=True) if a["id"] in outside
            ),
            "replies changed under the same memory": locality.changed_with_same_memory,
        }
    row = next(r for r in ROWS if r["subject"] == subject and r["relation"] == "atomic_number")
    found["corrected"] = {
        name: [load(of).generate(prompt, max_tokens=6).text for prompt in (row["prompt"], *row["heldout_prompts"])]
        for name, of in (("before", model), ("changed", changed))
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--leaf", default="0.1", type=Path.parse)
    parser.add_argument("--subject", default="Molybdenum")
    parser.add_argument("--answer", default="142")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.model, options.leaf, options.subject, options.answer, pathlib.Path(folder))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
