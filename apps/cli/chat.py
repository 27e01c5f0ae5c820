"""`hiermem chat`: a conversation in the terminal that shows which memory each answer came with."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli.display import console, describe, size

if TYPE_CHECKING:
    from mlx_hiermem.apps.cli.reader import Reader
    from mlx_hiermem.session import Session

# Control characters but tab and newline: a reply must not control the terminal.
UNSAFE = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
WELCOME = "Ask something. Esc Enter starts a new line, Ctrl-C stops a reply, /help lists commands, Ctrl-D leaves."


def chat(
    model: str = typer.Argument("", help="Folder or hub id of a model. Default: the one that was used last."),
    memory: str = typer.Option(
        "", help="none, generic, fetched, or a path. Default: fetched where there is a bank."
    ),
    system: str = typer.Option("", help="A system message."),
    max_tokens: int = typer.Option(512, "--max-tokens", "-n", min=1, help="Longest reply, in tokens."),
    temperature: float = typer.Option(0.0, "--temperature", "-t", min=0.0, help="0 takes the likeliest token."),
) -> None:
    """Talk with a model; each turn is routed, and what it brings into memory is shown.

    Example: `hiermem chat my-model`
    """
    from mlx_hiermem.apps.cli import recent
    from mlx_hiermem.model import load
    from mlx_hiermem.session import Session

    name = model or recent.preferred()
    loaded = load(name)
    recent.remember(name)
    talk(Session(loaded, memory, system, max_tokens=max_tokens, temperature=temperature))


def talk(session: Session) -> None:
    """Reads questions and commands until the end of input, /quit or Ctrl-D."""
    from mlx_hiermem.apps.cli import slash
    from mlx_hiermem.apps.cli.reader import reader
    from mlx_hiermem.errors import HierMemError

    read = reader(lambda: status_line(session), slash.names())
    if sys.stdin.isatty():
        console.print(WELCOME, style="dim")
    while (text := _next(read)) is not None:
        try:
            if not text.startswith("/"):
                _reply(session, text)
            elif not slash.run(session, text):
                return
        except HierMemError as error:
            console.print(f"hiermem: {error}", style="red", markup=False)
        except KeyboardInterrupt:
            console.print("[stopped]", style="dim", markup=False)


def _next(read: Reader) -> str | None:
    """The next input that is not blank; None at the end. Ctrl-C clears what was typed."""
    while True:
        try:
            if text := read().strip():
                return text
        except EOFError:
            return None
        except KeyboardInterrupt:
            console.print("Ctrl-D leaves.", style="dim")


def status_line(session: Session) -> str:
    """`Noble gases › Helium, Neon · 4 blocks, 3.3 MB of 536.9 MB · 61.3 tokens/s`"""
    labels = " › ".join(label for label in session.selection.labels if label)
    pinned = "pinned: " if session.selection.path and session.memory != "fetched" else ""
    memory = {"none": "no memory", "generic": "generic memory"}.get(session.memory, "")
    parts = [memory or pinned + (labels or str(session.selection.path))]
    if cache := session.model.cache:
        parts.append(f"{cache.blocks} blocks, {size(cache.bytes)} of {size(cache.budget)}")
    if session.last:
        parts.append(f"{session.last.generation_tps:.1f} tokens/s")
    return " · ".join(part for part in parts if part)


def _reply(session: Session, text: str) -> None:
    """Streams one reply. In a terminal what was attached is shown where it changed, else always."""
    before, terminal = session.selection.blocks, console.is_terminal
    reply = session.ask(text)
    try:
        with ExitStack() as waiting:
            if terminal:
                waiting.enter_context(console.status("", spinner="dots"))
            first = next(reply, "")
        for note in _notes(session, before, terminal):
            console.print(note, style="dim", markup=False)
        for piece in chain([first], reply):
            console.out(piece.translate(UNSAFE), end="", highlight=False)
        console.print()
    except KeyboardInterrupt:
        reply.close()
        console.print(" [stopped]", style="dim", markup=False)
    if session.last and not terminal:
        tps = session.last.generation_tps
        console.print(f"{session.prefilled} tokens prefilled · {tps:.1f} tokens/s", style="dim")


def _notes(session: Session, before: tuple[str, ...], terminal: bool) -> list[str]:
    """What there is to say before a reply: turns that were dropped, and the memory that it comes with."""
    lines = []
    if session.dropped:
        turns = "the oldest turn does" if session.dropped == 1 else f"the {session.dropped} oldest turns do"
        lines.append(f"{turns} not fit the model's {session.context} tokens any more and were left out")
    moved = session.selection.blocks != before
    if not terminal:
        lines.append(describe(session.selection) + " · new path" * moved)
    elif moved and session.selection.labels:
        lines.append("→ " + " › ".join(session.selection.labels))
    return lines
