"""`hiermem generate` and `hiermem route`: one answer, and why it came from where."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

import typer

from mlx_hiermem.apps.cli.display import FAR, blocked_note, console, describe, notes, size, utf8, write

if TYPE_CHECKING:
    from mlx_hiermem.bank.bank import MemoryBank

MODEL = typer.Argument(..., help="Folder of a memory model (anchor/ and bank/), or of a plain mlx-lm model.")
BANK = typer.Argument(..., metavar="MODEL", help="Folder of a memory model, or of a bank alone.")


def open_bank(model: pathlib.Path) -> MemoryBank:
    """The bank of a model folder, or the bank folder itself."""
    from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
    from mlx_hiermem.errors import BankError

    folder = model / "bank" if (model / "bank").is_dir() else model
    if not (folder / MANIFEST).is_file():
        raise BankError(f"there is no bank in {model}", "Give a model with a bank/ folder, or a bank's folder.")
    return MemoryBank.open(folder)


def generate(
    model: pathlib.Path = MODEL,
    prompt: str = typer.Argument(..., help="The text to continue; `-` reads it from standard input."),
    memory: str = typer.Option(
        "", help="none, generic, fetched, or a path such as 10.7. Default: fetched where there is a bank."
    ),
    chat: bool = typer.Option(False, "--chat", help="Ask in the anchor's chat template."),
    max_tokens: int = typer.Option(128, "--max-tokens", "-n", min=1, help="Stop after this many tokens."),
    temperature: float = typer.Option(0.0, "--temperature", "-t", min=0.0, help="0 takes the likeliest token."),
    seed: int = typer.Option(0, help="Seed of the sampler."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Continue a prompt with the memory that it needs.

    Example: `hiermem generate my-model "The atomic number of neon is" -n 8`
    """
    import sys

    import mlx.core as mx

    from mlx_hiermem.model import load

    mx.random.seed(seed)
    text = utf8(sys.stdin.read() if prompt == "-" else prompt)
    loaded = load(model)
    pieces = []
    stream = loaded.stream(text, memory=memory or None, chat=chat, max_tokens=max_tokens, temperature=temperature)
    for piece in stream:
        pieces.append(piece)
        if not as_json:
            write(piece)
    last = loaded.response
    figures = {
        "prompt_tokens": last.prompt_tokens if last else 0,
        "generated_tokens": last.generation_tokens if last else 0,
        "tokens_per_second": round(last.tokens_per_second, 1) if last else 0.0,
    }
    if as_json:
        result = {"text": "".join(pieces), "selection": loaded.selection.to_json(), **figures}
        console.print_json(json.dumps(result, ensure_ascii=False))
        return
    console.print()
    line = f"{describe(loaded.selection)} · {figures['tokens_per_second']} tokens/s"
    notes.print(line, style="dim", markup=False, soft_wrap=True)


def route(
    model: pathlib.Path = BANK,
    text: str = typer.Argument(..., help="The text to route."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
) -> None:
    """Show the path a text takes: distances, labels, blocks and bytes. The anchor is not loaded.

    Example: `hiermem route my-model "Which gas glows red in signs?"`
    """
    from mlx_hiermem.router import Router

    bank = open_bank(model)
    taken = Router.of_bank(bank).route(utf8(text))
    rows: list[dict[str, Any]] = []
    for node, distance in zip(taken.path.prefixes(), taken.distances, strict=True):
        entry = bank.manifest.blocks.get(node)
        rows.append(
            {
                "node": str(node),
                "label": bank.manifest.label(node),
                "distance": round(distance, 4),
                "bytes": entry.bytes if entry else 0,
                "documents": entry.documents if entry else 0,
            }
        )
    if as_json:
        result: dict[str, Any] = {
            "path": str(taken.path),
            "milliseconds": round(taken.milliseconds, 2),
            "nodes": rows,
            "avoided": [str(node) for node in taken.avoided],
            "far": taken.far,
        }
        console.print_json(json.dumps(result, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("node", "distance", "label", "documents", "block", box=None, header_style="dim")
    for row in rows:
        block = size(row["bytes"]) if row["bytes"] else "none"
        table.add_row(row["node"], f"{row['distance']:.3f}", Text(row["label"]), str(row["documents"]), block)
    if taken.far:
        console.print(f"{FAR} (`hiermem bank reach` shows how far it reaches)", markup=False)
        return
    console.print(table)
    for node in taken.avoided:
        console.print(blocked_note(bank, node), style="dim", markup=False)
    total = sum(row["bytes"] for row in rows)
    console.print(f"path {taken.path} · {size(total)} to fetch · {taken.milliseconds:.1f} ms", style="dim")
