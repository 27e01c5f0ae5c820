"""`hiermem bank remove`, and the questions that it puts to the model before and after."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.bank_policy import NODES, nodes_named, parse_paths
from mlx_hiermem.apps.cli.display import console, progress_bar, several, size
from mlx_hiermem.printable import printable

if TYPE_CHECKING:
    from mlx_hiermem.bank.manifest import BankManifest
    from mlx_hiermem.config import Path
    from mlx_hiermem.evaluate.questions import Question

RETAINED = (
    "{holders} may still hold something of it; only training without those texts would take that away. A chat or "
    "server that has the bank open lets go of it before its next question. Revisions that were pushed to the hub "
    "stay there; delete them there."
)


def remove(
    words: list[str] = typer.Argument(..., metavar="[MODEL] PATHS...", help=NODES),
    model: str = models.MODEL,
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
    from mlx_hiermem.bank import edit
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.bank.commit import LEARNING, interrupted
    from mlx_hiermem.evaluate.questions import read_questions

    name, paths = nodes_named(words, model)
    asks = not yes and sys.stdin.isatty()
    if not (asks or yes or model or name in words):
        raise typer.BadParameter("name the model, or give --yes: nobody can be asked here", param_hint="--model")
    folder = models.folder_of(name)
    begun = _begun(folder)
    bank, nodes = models.open_bank(name), [node for node in parse_paths(paths) if node not in begun]
    if interrupted(bank.root) is None:  # else repeating what was interrupted is fine
        bank.tree.check(nodes)
    questions = read_questions(probe) if probe else []
    going = [node for node in bank.manifest.blocks if any(top in node.prefixes() for top in nodes)]
    amount = size(sum(bank.manifest.blocks[node].bytes for node in going))
    if asks:
        typer.confirm(f"Delete {several(len(going), 'block')}, {amount}, from {bank.root}?", abort=True)
    before = _ask(folder, questions, max_tokens, "before")
    removed = edit.remove(bank.root, nodes) if nodes else edit.Removed((), 0)
    forgotten = _forget(bank.root)
    after = _ask(folder, questions, max_tokens, "after")
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
            f"dropped  {several(forgotten, 'text')} from {bank.root.parent / LEARNING}",
            markup=False,
            soft_wrap=True,
        )
    copies = f" The copy in {bank.remote.origin.repo} stays." if bank.remote else ""
    retained = RETAINED.format(holders=_holders(left, above))
    console.print(retained + copies, style="dim", markup=False)


def _ask(model: pathlib.Path, questions: list[Question], max_tokens: int, when: str) -> list[str]:
    """Greedy replies, each on one line, with the memory that each question is routed to."""
    if not questions:
        return []
    from mlx_hiermem.model_folder import load

    loaded, replies = load(model), []
    with progress_bar(f"asking {when}", unit="questions") as progress:
        for question in questions:
            reply = printable(loaded.generate(question.prompt, max_tokens=max_tokens).text)
            replies.append(" ".join(reply.split()))
            if progress:
                progress(len(replies), len(questions))
    return replies


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


def _begun(folder: pathlib.Path) -> list[Path]:
    """The nodes that a removal took before it was killed; `open_bank` completes it."""
    from mlx_hiermem.bank.commit import FORGET
    from mlx_hiermem.errors import HierMemError
    from mlx_hiermem.files import read_json

    try:
        return parse_paths(read_json(models.bank_folder(folder) / FORGET))
    except (HierMemError, TypeError, AttributeError):
        return []


def _forget(root: pathlib.Path) -> int:
    """Drops the texts that `hiermem learn` has kept of leaves removed from the bank `root`."""
    from mlx_hiermem.bank.commit import FORGET

    if not (root / FORGET).exists():
        return 0
    from mlx_hiermem.learn.publish import forget

    return forget(root)


def _holders(left: BankManifest, above: Sequence[Path]) -> str:
    """What has seen the texts of a removed block: the blocks above it were trained on them too."""
    names = ", ".join(map(str, above[:8])) + ", …" * (len(above) > 8)
    named = ", whose rows still name its sources," * any(left.blocks[node].sources for node in above)
    holders = [*[f"the blocks above ({names}){named}"] * bool(above), *["the generic block"] * bool(left.generic)]
    text = f"{', '.join(holders)} and the anchor".replace(",,", ",") if holders else "the anchor"
    return text[0].upper() + text[1:]
