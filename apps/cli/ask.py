"""`hiermem ask`, in short `hiermem "question"`: one answer from the model that was used last."""

from __future__ import annotations

import json
from collections.abc import Iterator

import typer

from mlx_hiermem.apps.cli.display import console, describe, notes, utf8, write


def ask(
    question: list[str] = typer.Argument(
        ..., help="The question; `hiermem ask` may be left out before one in quotes."
    ),
    model: str = typer.Option(
        "", "--model", help="Folder or hub id. Default: $HIERMEM_MODEL, else the last model used, else the demo's."
    ),
    memory: str = typer.Option(
        "", help="none, generic, fetched, or a path. Default: fetched where there is a bank."
    ),
    max_tokens: int = typer.Option(256, "--max-tokens", "-n", min=1, help="Longest answer, in tokens."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Answer one question and exit.

    Example: `hiermem "What is the atomic number of neon?"`
    """
    from mlx_hiermem.apps.cli import recent
    from mlx_hiermem.session import Session

    name, asked = model or recent.preferred(), utf8(" ".join(question))
    loaded = recent.open_model(name)
    reply: Iterator[str]
    if loaded.tokenizer is not None and loaded.tokenizer.chat_template is not None:
        reply = Session(loaded, memory, max_tokens=max_tokens).ask(asked)
    else:
        reply = loaded.stream(asked, memory=memory or None, max_tokens=max_tokens)
    pieces = []
    for piece in reply:
        pieces.append(piece)
        if not as_json:
            write(piece)
    if as_json:
        result = {"text": "".join(pieces), "model": name, "selection": loaded.selection.to_json()}
        console.print_json(json.dumps(result, ensure_ascii=False))
        return
    console.print()
    notes.print(describe(loaded.selection), style="dim", markup=False, soft_wrap=True)
