"""The recipe of the elements bank: facts about 118 elements into a memory for a frozen SmolLM2-135M.

    python -m mlx_hiermem.apps.demo.recipe --out build/elements

Steps: write every fact in many wordings, embed the prompts, build the cluster tree, run the
anchor's lower layers once per text, train the blocks, write a memory checkpoint for
`hiermem convert`, and ask questions in wordings that were never trained on. An interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save

from mlx_hiermem import assets
from mlx_hiermem.anchor import identify
from mlx_hiermem.apps.demo import clustering, measure
from mlx_hiermem.apps.demo.anchor import Anchor, load_anchor
from mlx_hiermem.apps.demo.clustering import Floats, Tree
from mlx_hiermem.apps.demo.train import Bank, Settings, run_trunk, train
from mlx_hiermem.apps.demo.train import Progress as TrainingState
from mlx_hiermem.apps.demo.wordings import Element, Wording, element_wordings, training_texts
from mlx_hiermem.embedder import Embedder

HERE = Path(__file__).parent
ANCHOR_NAME = "SmolLM2-135M-Instruct"
REACH = 1.15  # what is asked about elements is nearer to its leaf, what is asked about anything else farther
LICENCE = "MIT (facts from mendeleev 1.3.0); see NOTICE.md of the elements demo"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def element_tree(wordings: list[Wording], vectors: Floats, elements: list[Element], settings: Settings) -> Tree:
    """The tree over prompts that name their element; prompts with a number only follow it as they fall."""
    row_of = {e["id"]: i for i, e in enumerate(elements)}
    named = [i for i, w in enumerate(wordings) if w.subject in row_of]
    element = np.array([row_of[wordings[i].subject] for i in named])
    return clustering.build_tree(
        vectors[named], element, settings.branching, len(settings.block_sizes), settings.seed
    )


def describe(tree: Tree, wordings: list[Wording], vectors: Floats, elements: list[Element]) -> dict[str, Any]:
    """Labels, document counts and sources of every node, for the checkpoint's config."""
    members = clustering.node_members(tree)
    subject = np.array([w.subject for w in wordings])
    means = np.stack([vectors[subject == e["id"]].mean(0) for e in elements])
    return {
        "labels": clustering.node_labels(members, elements, means),
        "documents": {node: len(inside) for node, inside in members.items()},
        "sources": {node: [elements[i]["id"] for i in inside] for node, inside in members.items()},
    }


def write_checkpoint(path: Path, bank: Bank, tree: Tree, config: dict[str, Any]) -> None:
    """The documented memory checkpoint in float16, its config inside and beside it."""
    tensors = {name: t.detach().half() for name, t in bank.tensors.items()}
    for part in ("w1", "w2", "w3"):
        tensors[f"memory.generic.{part}"] = tensors[f"memory.generic.{part}"][0].contiguous()
    for number, level in enumerate(tree.centroids, 1):
        tensors[f"tree.level{number}.centroids"] = torch.tensor(level)
        tensors[f"tree.level{number}.present"] = torch.ones(level.shape[:2], dtype=torch.bool)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{name} is not finite in float16")
    beside = path.with_suffix(".tmp")
    beside.write_bytes(save(tensors, metadata={"config": json.dumps(config)}))
    beside.replace(path)
    path.with_suffix(".json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def accuracy_table(
    anchor: Anchor, bank: Bank, tree: Tree, rows: list[dict[str, Any]], embedder: Embedder
) -> dict[str, dict[str, float]]:
    """Fetched memory on every kind of question; none and generic, the controls, on the paper's prompt."""
    asked = measure.questions(anchor, rows)
    prompts = [question for question in asked if question.kind == "atomic_number: prompt"]
    routes = sorted({q.route for q in asked})
    leaf = dict(zip(routes, tree.route(embedder.embed(routes)).tolist(), strict=True))
    generic, first = bank.settings.leaves, bank.settings.first_layer
    return {
        "fetched": measure.accuracy(anchor, asked, lambda texts: bank.fetch([leaf[t] for t in texts]), first),
        "generic": measure.accuracy(anchor, prompts, lambda texts: bank.fetch([generic]), first),
        "none": measure.accuracy(anchor, prompts, lambda texts: None, first),
    }


def show_accuracy(console: Console, table: dict[str, dict[str, float]]) -> None:
    shown = Table(title="right answers, per cent")
    shown.add_column("asked as")
    for way in table:
        shown.add_column(way, justify="right")
    for kind in table["fetched"]:
        shown.add_row(kind, *(f"{column[kind]:.1f}" if kind in column else "" for column in table.values()))
    console.print(shown)


def progress_bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def cook(out: Path, anchor_folder: Path, settings: Settings, console: Console) -> dict[str, Any]:
    """Everything from facts to a measured checkpoint; returns the report that is also written beside it."""
    torch.manual_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    elements = read_rows(HERE / "elements.jsonl")
    wordings = [w for e in elements for w in element_wordings(e)]
    made_of = identify(anchor_folder).weights_digest + "\n".join(training_texts(elements))
    console.print(f"embedding {len(wordings)} prompts")
    embedder = Embedder.load()
    vectors = embedder.embed([w.prompt for w in wordings])
    tree = element_tree(wordings, vectors, elements, settings)
    where = clustering.leaves_of_subjects(wordings, tree.route(vectors))
    anchor = load_anchor(anchor_folder)
    layers = list(range(settings.first_layer, anchor.layers))
    bank = Bank(settings, len(layers), anchor.hidden)
    with progress_bar(console) as bar:
        trunk = bar.add_task("lower layers", total=len(wordings), note="")
        texts, prefix = run_trunk(anchor, wordings, settings.first_layer, lambda n: bar.advance(trunk, n))
        learning = bar.add_task("learning", total=None, note="")

        def tick(state: TrainingState) -> None:
            note = f"loss {state.loss:.3f}, answer tokens right {state.right:.1%}"
            bar.update(learning, completed=state.step, total=state.steps, note=note)

        state = train(anchor, bank, texts, prefix, where, out / "partial.pt", _digest(made_of), tick)
    config = {
        "kind": "ffn",
        "branching": settings.branching,
        "block_sizes": list(settings.block_sizes),
        "layers": layers,
        "hidden": anchor.hidden,
        "anchor": ANCHOR_NAME,
        "licence": LICENCE,
        "recipe": {"name": "elements", "wordings": len(wordings), **asdict(settings)},
        **describe(tree, wordings, vectors, elements),
    }
    write_checkpoint(out / "elements.safetensors", bank, tree, config)
    table = accuracy_table(anchor, bank, tree, read_rows(HERE / "elements_qa.jsonl"), embedder)
    show_accuracy(console, table)
    report = {"accuracy": table, "training_seconds": state.wall, "training_cpu_seconds": state.cpu}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    from mlx_hiermem.bank import edit
    from mlx_hiermem.convert.pipeline import convert

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("build/elements"))
    out: Path = parser.parse_args().out
    console = Console()
    wall, cpu = time.perf_counter(), time.process_time()
    weights, model = assets.fetch("smollm2-135m-instruct-gguf", console.print), out / "model"
    if not (model / "anchor").exists():
        console.print("converting SmolLM2 to an MLX anchor")
        convert(str(weights), model, overwrite=True)
    cook(out, model / "anchor", Settings(), console)
    convert(str(weights), model, memory=out / "elements.safetensors", overwrite=True)
    edit.reach(model / "bank", REACH)
    console.print(f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU time")
    console.print(f"Talk to it: hiermem chat {model}")


if __name__ == "__main__":
    main()
