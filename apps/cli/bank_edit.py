"""The commands of `hiermem bank` that change a bank: block, unblock, reach, remove, add, merge."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli.display import console, progress_bar, several, size
from mlx_hiermem.apps.cli.use import BANK, open_bank

if TYPE_CHECKING:
    import numpy as np

    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.bank.manifest import BankManifest
    from mlx_hiermem.bank.policy import BankPolicy
    from mlx_hiermem.config import Path
    from mlx_hiermem.evaluate.questions import Question

PATHS = typer.Argument(..., help="Nodes, such as 10 or 10.7. Each stands for all that is below it.")
RETAINED = (
    "{holders} may still hold something of it; only training without those texts would take that away. A program "
    "that has the bank open keeps the blocks it has read until it ends."
)


def block(
    model: pathlib.Path = BANK,
    paths: list[str] | None = typer.Argument(None, help="Nodes, such as 10 or 10.7, with all that is below."),
    on_blocked: str | None = typer.Option(
        None,
        help="sibling or parent: a text whose nearest node is blocked goes to the nearest open one, or stops.",
    ),
) -> None:
    """Close nodes to every question. The bytes stay; `unblock` opens them again.

    Example: `hiermem bank block my-model 10 2.7`
    """
    from mlx_hiermem.bank import edit
    from mlx_hiermem.tree import ON_BLOCKED

    if on_blocked not in (None, *ON_BLOCKED):
        raise typer.BadParameter("choose sibling or parent", param_hint="--on-blocked")
    if not paths and on_blocked is None:
        raise typer.BadParameter("name a node, or give --on-blocked", param_hint="PATHS")
    root = open_bank(model).root
    _print_policy(edit.block(root, _parse(paths or []), on_blocked))


def reach(
    model: pathlib.Path = BANK,
    distance: float | None = typer.Argument(
        None, min=0.0, help="Farthest distance; as `route` shows it for a leaf."
    ),
    off: bool = typer.Option(False, "--off", help="Every text gets the memory that is nearest to it."),
) -> None:
    """Show or set how far from what the bank knows a text may be and still get memory.

    Example: `hiermem bank reach my-model 1.2`
    """
    from mlx_hiermem.bank import edit

    if off and distance is not None:
        raise typer.BadParameter("give a distance or --off", param_hint="--off")
    bank = open_bank(model)
    policy = bank.policy
    if off or distance is not None:
        policy = edit.reach(bank.root, math.inf if distance is None else distance)
    if policy.reach == math.inf:
        console.print("reach    any text gets the memory nearest to it")
    else:
        console.print(f"reach    {policy.reach:.3f}: a text farther than that from its leaf gets no memory")


def unblock(model: pathlib.Path = BANK, paths: list[str] = PATHS) -> None:
    """Open nodes that were blocked, with all that is below them.

    Example: `hiermem bank unblock my-model 10`
    """
    from mlx_hiermem.bank import edit

    root = open_bank(model).root
    _print_policy(edit.unblock(root, _parse(paths)))


def remove(
    model: pathlib.Path = BANK,
    paths: list[str] = PATHS,
    probe: pathlib.Path | None = typer.Option(
        None, help="Questions to ask before and after: a JSON line each, with prompt and answer."
    ),
    max_tokens: int = typer.Option(16, "--max-tokens", "-n", min=1, help="Longest answer of the probe, in tokens."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask for confirmation."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Delete nodes for good: block files, rows of the table, and the centroids that lead to them.

    Example: `hiermem bank remove my-model 10.7 --probe questions.jsonl`
    """
    from mlx_hiermem.apps.cli import probe as probing
    from mlx_hiermem.bank import edit
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.bank.commit import interrupted
    from mlx_hiermem.evaluate.questions import read_questions

    bank, nodes = open_bank(model), _parse(paths)
    if interrupted(bank.root) is None:  # else repeating what was interrupted is fine
        bank.tree.check(nodes)
    questions = read_questions(probe) if probe else []
    going = [node for node in bank.manifest.blocks if any(top in node.prefixes() for top in nodes)]
    amount = size(sum(bank.manifest.blocks[node].bytes for node in going))
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Delete {several(len(going), 'block')}, {amount}, from {bank.root}?", abort=True)
    before = probing.ask(model, questions, max_tokens, "before")
    removed = edit.remove(bank.root, nodes)
    forgotten = _forget(model) if (model / "learning").is_dir() else 0
    after = probing.ask(model, questions, max_tokens, "after")
    left = MemoryBank.open(bank.root).manifest
    above = sorted({up for node in nodes for up in node.prefixes() if up in left.blocks})
    if as_json:
        rows = [
            {"prompt": q.prompt, "answer": q.answer, "before": b, "after": a}
            for q, b, a in zip(questions, before, after, strict=True)
        ]
        result = {
            "removed": [str(node) for node in removed.nodes],
            "bytes": removed.bytes,
            "may_retain": [*map(str, above), *["generic"] * bool(left.generic), "anchor"],
            "texts": forgotten,
            "probe": rows,
        }
        console.print_json(json.dumps(result, ensure_ascii=False))
        return
    if questions:
        _print_probe(questions, before, after)
    console.print(f"removed  {several(len(removed.nodes), 'block')}, {size(removed.bytes)}", markup=False)
    if forgotten:
        console.print(
            f"dropped  {several(forgotten, 'text')} from {model / 'learning'}", markup=False, soft_wrap=True
        )
    copies = f" The copy in {bank.remote.origin.repo} stays." if bank.remote else ""
    retained = RETAINED.format(holders=_holders(left, above))
    console.print(retained + copies, style="dim", markup=False)


def add(
    model: pathlib.Path = BANK,
    what: list[str] = typer.Argument(..., help="Documents to learn, as `hiermem learn` takes them; or one block."),
    field: str = typer.Option("text", help="Documents: field of a .jsonl line that holds the text."),
    title: str = typer.Option("", help="Documents: field that holds the title."),
    any_language: bool = typer.Option(
        False, "--any-language", help="Documents: learn them if not in English, too."
    ),
    new_leaf: bool = typer.Option(False, "--new-leaf", help="Documents: give them a leaf of their own."),
    epochs: int = typer.Option(4, min=1, help="Documents: how often each text is learnt."),
    rate: float = typer.Option(6e-3, min=0.0, help="Documents: learning rate at its highest."),
    teacher: str = typer.Option("", help="Documents: who writes questions about them. Default: the anchor."),
    self_study: bool = typer.Option(
        True, "--self-study/--no-self-study", help="Documents: have questions written."
    ),
    prompts: pathlib.Path | None = typer.Option(
        None, help="Documents: prompts of your own to learn, as `hiermem learn` takes them."
    ),
    keep: bool = typer.Option(False, "--keep", help="Documents: keep the work folder MODEL.learn."),
    path: str = typer.Option(
        "", help="Block: the node it is for, such as 10.7. A new node's parent must be there."
    ),
    label: str | None = typer.Option(None, help="Block: what it is about."),
    documents: int | None = typer.Option(None, min=0, help="Block: how many documents it was made from."),
    source: list[str] | None = typer.Option(None, help="Block: where they are from; may be repeated."),
    centroid: pathlib.Path | None = typer.Option(None, help="Block: a new node's centroid, as a .npy file."),
    example: list[str] | None = typer.Option(None, help="Block: a text that belongs there; may be repeated."),
    replace: bool = typer.Option(False, "--replace", help="Block: take the place of the one that is there."),
) -> None:
    """Let the bank grow: by documents, which are learnt into their leaves, or by a block that is there already.

    Documents change the blocks of the leaves that they reach, and no byte of any other; these learn their old texts
    once more beside the new ones. Interrupted, the same command goes on.

    A block (a .safetensors file, with --path) is one that was removed, or trained elsewhere for the same anchor. A
    node that the tree lacks needs a place on the map: a centroid, or example texts to make one from. A file out of
    another bank brings its label and sources along. A plain block is quantised where the bank is.

    Example: `hiermem bank add my-model ./new-docs`

    Example: `hiermem bank add my-model gases.safetensors --path 10.7 --label Gases --example "What is neon?"`
    """
    of_block: dict[str, object] = {"--path": path, "--label": label, "--documents": documents, "--source": source}
    of_block |= {"--centroid": centroid, "--example": example, "--replace": replace}
    given = [name for name, value in of_block.items() if value not in ("", None, False, [])]
    file = pathlib.Path(what[0])
    is_block = len(what) == 1 and not file.is_dir() and (bool(path) or file.suffix == ".safetensors")
    if not is_block and given:
        raise typer.BadParameter("is for a block, a .safetensors file", param_hint=given[0])
    if is_block and not path:
        raise typer.BadParameter("say which node the block is for, such as 10.7", param_hint="--path")
    if not is_block:
        from mlx_hiermem.apps.cli.learn import add_documents
        from mlx_hiermem.learn.settings import AddSettings, CorpusSettings, TrainingSettings
        from mlx_hiermem.learn.study.prompts import read_prompts

        corpus = CorpusSettings(field, title, any_language=any_language)
        training = TrainingSettings(epochs=epochs, rate=rate)
        own = read_prompts(prompts) if prompts else ()
        settings = AddSettings(
            corpus,
            new_leaf=new_leaf,
            self_study=self_study,
            teacher=teacher,
            training=training,
            prompts=own,
            keep=keep,
        )
        add_documents(model, what, settings)
        return
    from mlx_hiermem.bank import edit

    if centroid and example:
        raise typer.BadParameter("give a file or example texts, not both", param_hint="--centroid")
    bank = open_bank(model)
    (node,) = _parse([path])
    place = _read_centroid(centroid) if centroid else _embed(bank, example) if example else None
    entry = edit.add(
        bank.root,
        file,
        node,
        centroid=place,
        label=label,
        documents=documents,
        sources=source or None,
        replacing=replace,
    )
    console.print(f"added    {node} {entry.label} · {size(entry.bytes)}", markup=False)


def merge(
    first: pathlib.Path = typer.Argument(..., help="A model folder, or a bank's folder."),
    second: pathlib.Path = typer.Argument(..., help="Another, of the same anchor and tree."),
    out: pathlib.Path = typer.Argument(..., help="The bank's folder to make."),
    prefer: str = typer.Option("", help="first or second: whose blocks count where both have one."),
    resume: bool = typer.Option(False, "--resume", help="Go on after an interruption."),
) -> None:
    """Make one bank of two that were trained for the same anchor, on different parts of the same tree.

    Example: `hiermem bank merge model-a model-b merged-bank`
    """
    from mlx_hiermem.bank import merge as merging

    if prefer not in ("", "first", "second"):
        raise typer.BadParameter("choose first or second", param_hint="--prefer")
    banks = open_bank(first), open_bank(second)
    with progress_bar("merging") as progress:
        merged = merging.merge(*banks, out, prefer, resume, progress)
    totals = merged.manifest.totals()
    console.print(
        f"written  {out}: {several(totals['blocks'], 'block')}, {size(totals['bytes'])}",
        markup=False,
        soft_wrap=True,
    )
    console.print("To use it, make it the bank/ beside that anchor.", style="dim")


def _forget(model: pathlib.Path) -> int:
    """Drops the texts that `hiermem learn` has kept of removed leaves."""
    from mlx_hiermem.learn.publish import forget

    return forget(model)


def _holders(left: BankManifest, above: Sequence[Path]) -> str:
    """What has seen the texts of a removed block: the blocks above it were trained on them too."""
    names = ", ".join(map(str, above[:8])) + ", …" * (len(above) > 8)
    named = ", whose rows still name its sources," * any(left.blocks[node].sources for node in above)
    holders = [*[f"the blocks above ({names}){named}"] * bool(above), *["the generic block"] * bool(left.generic)]
    text = f"{', '.join(holders)} and the anchor".replace(",,", ",") if holders else "the anchor"
    return text[0].upper() + text[1:]


def _parse(paths: list[str]) -> list[Path]:
    from mlx_hiermem.config import Path

    return [Path.parse(path) for path in paths]


def _print_policy(policy: BankPolicy) -> None:
    nodes = ", ".join(map(str, sorted(policy.blocked))) or "nothing"
    goes = {"sibling": "go to the nearest open sibling", "parent": "stop at the parent"}
    console.print(f"blocked  {nodes}", markup=False)
    if policy.blocked:
        console.print(f"Their texts {goes[policy.on_blocked]}.", style="dim")


def _print_probe(questions: list[Question], before: list[str], after: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    def cell(question: Question, answer: str) -> Text:
        right = question.is_right(answer)
        return Text.assemble(("✓ ", "green") if right else ("✗ ", "red"), answer)

    table = Table("question", "is", "before", "after", box=None, header_style="dim")
    for question, was, now in zip(questions, before, after, strict=True):
        table.add_row(Text(question.prompt), Text(question.answer), cell(question, was), cell(question, now))
    console.print(table)
    right = [sum(q.is_right(a) for q, a in zip(questions, replies, strict=True)) for replies in (before, after)]
    console.print(f"right    {right[0]} of {len(questions)} before, {right[1]} after", markup=False)


def _read_centroid(file: pathlib.Path) -> np.ndarray:
    import numpy as np

    from mlx_hiermem.errors import BankError

    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BankError(
            f"{file} holds no centroid", "Save one vector with numpy.save, or give --example."
        ) from error


def _embed(bank: MemoryBank, texts: list[str]) -> np.ndarray:
    """The mean of the texts' embeddings: what k-means makes of a cluster's documents."""
    from mlx_hiermem.router import load_embedder

    return load_embedder(bank.manifest.embedder).embed(texts).mean(0)
