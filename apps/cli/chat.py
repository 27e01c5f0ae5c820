"""`hiermem chat`: a conversation in the terminal that shows which memory each answer came with."""

from __future__ import annotations

import contextlib
import pathlib
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli.display import console, describe
from mlx_hiermem.apps.cli.use import MODEL

if TYPE_CHECKING:
    from mlx_hiermem.session import Session


def chat(
    model: pathlib.Path = MODEL,
    memory: str = typer.Option(
        "", help="none, generic, fetched, or a path. Default: fetched where there is a bank."
    ),
    max_tokens: int = typer.Option(512, "--max-tokens", "-n", min=1, help="Longest reply, in tokens."),
    temperature: float = typer.Option(0.0, "--temperature", "-t", min=0.0, help="0 takes the likeliest token."),
) -> None:
    """Talk with a model; every turn is routed, and the path it took is shown.

    Example: `hiermem chat my-model`
    """
    from mlx_hiermem.model import load
    from mlx_hiermem.session import Session

    talk(Session(load(model), memory=memory, max_tokens=max_tokens, temperature=temperature))


def talk(session: Session) -> None:
    """Reads lines until the end of input. Ctrl-C stops a reply, and at the prompt leaves."""
    from mlx_hiermem.errors import HierMemError

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (imported for its effect: line editing and history in input())
    console.print("Ask something. Ctrl-C stops a reply; an empty line or Ctrl-D leaves.", style="dim")
    while True:
        try:
            text = input("› ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            console.print()
            return
        try:
            _reply(session, text)
        except HierMemError as error:
            console.print(f"hiermem: {error}", style="red", markup=False)


def _reply(session: Session, text: str) -> None:
    before = session.selection.blocks
    shown = False
    reply = session.ask(text)
    try:
        for piece in reply:
            if not shown:
                moved = " · new path" if session.selection.blocks != before else ""
                console.print(describe(session.selection) + moved, style="dim", markup=False)
                shown = True
            console.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        reply.close()
        console.print(" [stopped]", style="dim", markup=False, end="")
    console.print()
    if session.model.last:
        tps = session.model.last.generation_tps
        console.print(f"{session.prefilled} tokens prefilled · {tps:.1f} tokens/s", style="dim")
