"""`hiermem chat`: a conversation in the terminal that shows which memory each answer came with."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from itertools import chain
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import keyboard, models, sampling
from mlx_hiermem.apps.cli.display import (
    FAR,
    console,
    describe,
    notes,
    parse_size,
    several,
    size,
    source_line,
    utf8,
    waiting,
    written,
)
from mlx_hiermem.apps.cli.shelf import Shelf
from mlx_hiermem.printable import printable

if TYPE_CHECKING:
    from mlx_hiermem.apps.cli.keyboard import Paused, ReadLine
    from mlx_hiermem.prompt import History
    from mlx_hiermem.session import Session

WELCOME = "Ask something. /help lists commands, Ctrl-C stops a reply, Ctrl-D leaves."


def chat(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    memory: str = models.MEMORY,
    system: str = typer.Option("", help="A system message."),
    max_tokens: int = typer.Option(512, "--max-tokens", "-n", min=1, help="Longest reply, in tokens."),
    temperature: float = sampling.TEMPERATURE,
    top_p: float = sampling.TOP_P,
    top_k: int = sampling.TOP_K,
    min_p: float = sampling.MIN_P,
    repetition_penalty: float = sampling.REPETITION_PENALTY,
    presence_penalty: float = sampling.PRESENCE_PENALTY,
    frequency_penalty: float = sampling.FREQUENCY_PENALTY,
    chat_template_args: str = sampling.TEMPLATE,
    kv_bits: int | None = sampling.KV_BITS,
    kv_group_size: int = sampling.KV_GROUP_SIZE,
    quantized_kv_start: int = sampling.QUANTIZED_KV_START,
    cache: str = typer.Option("512M", help="Memory for blocks: 500M, 2G."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the last conversation with this model."),
    plain: bool = typer.Option(False, "--plain", help="Show replies as the model writes them, not as Markdown."),
    whole_history: bool = typer.Option(
        False, "--whole-history", help="A question on another subject sees what was said before too."
    ),
) -> None:
    """Talk with a model; each turn is routed, and what it brings into memory is shown.

    Reads lines from a pipe too: replies go to standard output, all else to standard error, and the exit
    status is 1 where a line failed.

    Example: `hiermem chat my-model`
    """
    drawn = sampling.changed(locals())
    template = sampling.template_args(chat_template_args)
    cache_bytes = parse_size(cache, "--cache")
    name = models.chosen(first_word, model)
    with keyboard.unechoed():
        from mlx_hiermem.apps.cli.slash import take_up
        from mlx_hiermem.session import Session

        loaded = models.open_model(name, cache_bytes)
        history: History = "all" if whole_history else "topic"
        session = Session(loaded, system=system, max_tokens=max_tokens, template=template, history=history, **drawn)
        folder = pathlib.Path(name)
        known = str(folder.resolve()) if folder.is_dir() else name  # from wherever it is named
        shelf = Shelf(known) if resume or sys.stdin.isatty() else None
        if resume and shelf:
            take_up(session, shelf)
        if memory:
            session.use(memory)
        if system:
            session.system = system
        well = talk(session, models.introduce(name, loaded), shelf, plain)
    if not well and not sys.stdin.isatty():
        raise typer.Exit(1)


def talk(session: Session, header: str = "", shelf: Shelf | None = None, plain: bool = False) -> bool:
    """Reads questions and commands until the end of input, /quit or Ctrl-D; whether all went well.

    What is said is kept on the shelf, where there is one. `plain` shows replies without their Markdown laid out.
    """
    from mlx_hiermem.apps.cli import slash
    from mlx_hiermem.errors import HierMemError

    read = keyboard.reader(lambda: status_line(session, console.width), slash.names(), _draft(session))
    well, away = True, session.is_away
    if sys.stdin.isatty():
        for line in filter(None, (header, WELCOME)):
            (console if console.is_terminal else notes).print(line, style="dim", markup=False, soft_wrap=True)
        if session.messages:
            slash.show_last(session, plain)
    while (text := _next(read)) is not None:
        try:
            text = utf8(text)
            if not text.startswith("/"):
                _reply(session, text, plain)
                if shelf:
                    shelf.keep(session)
            elif not slash.run(session, text, shelf, plain):
                break
        except HierMemError as error:
            notes.print(printable(f"hiermem: {error}"), style="red", markup=False, soft_wrap=True)
            well = False
        except KeyboardInterrupt:
            console.print("[stopped]", style="dim", markup=False)
        if away != session.is_away:
            away = session.is_away
            _tell_of_drive(session)
    return well


def _draft(session: Session) -> Paused:
    """What is done while the user thinks: the embedder is loaded, then drafts are routed and their blocks read."""
    from mlx_hiermem.errors import HierMemError
    from mlx_hiermem.memory_choice import MemoryChoice

    def paused(text: str) -> None:
        with contextlib.suppress(HierMemError):  # the question itself will tell
            if session.memory == MemoryChoice.FETCHED and not text:
                _ = session.model.router
            elif not text.startswith("/"):
                session.draft(utf8(text.strip()))

    return paused


def _next(read: ReadLine) -> str | None:
    """The next input that is not blank; None at the end. Ctrl-C clears what was typed."""
    while True:
        try:
            if text := read().strip():
                return text
        except EOFError:
            return None
        except KeyboardInterrupt:
            console.print("Ctrl-D leaves.", style="dim")


def status_line(session: Session, width: int) -> str:
    """`Noble gases › Helium, Neon · 4 blocks, 3.3 MB of 536.9 MB · 61.3 tokens/s`, in `width` columns."""
    selection, figures = session.selection, list[str]()
    if cache := session.model.cache:
        figures.append(f"{several(cache.blocks, 'block')}, {size(cache.bytes)} of {size(cache.budget)}")
    if session.last:
        figures.append(f"{session.last.generation_tps:.1f} tokens/s")
    right = "".join(f" · {figure}" for figure in figures)
    if session.memory in ("none", "generic"):
        topic = {"none": "no memory", "generic": "generic memory"}[session.memory]
    elif selection.route.far:
        topic = _fitted([FAR], width - len(right))
    else:
        pinned = "pinned: " if session.memory.path else ""
        labels = [label for label in selection.labels if label] or [str(selection.path)]
        topic = pinned + _fitted(labels, width - len(pinned) - len(right))
    return (topic + right).removeprefix(" · ")


def _fitted(labels: list[str], room: int) -> str:
    """Labels in `room` columns: where all do not fit the outer ones go first."""
    for first in range(len(labels)):
        text = " › ".join(["…"] * bool(first) + labels[first:])
        if len(text) <= room:
            return text
    return text[: max(room - 1, 0)] + "…"


def _reply(session: Session, text: str, plain: bool) -> None:
    """Streams one reply. In a terminal what was attached is shown where it changed; in a pipe always, beside it."""
    before, terminal = session.selection.blocks, console.is_terminal
    reply = session.ask(text)
    try:
        with waiting(""):
            first = next(reply, "")
        _notes(session, before, terminal)
        with written(plain) as show:
            for piece in chain([first], reply):
                show(piece)
        _name_source(session, terminal)
    except KeyboardInterrupt:
        reply.close()
        console.print(" [stopped]", style="dim", markup=False)
    if session.last and not terminal:
        figures = f"{session.prefilled} tokens prefilled · {session.last.generation_tps:.1f} tokens/s"
        notes.print(figures, style="dim")


def _tell_of_drive(session: Session) -> None:
    """That the bank's drive is gone, or is back."""
    where = session.model.bank.root if session.model.bank else ""
    line = f"the bank is back: {where}"
    if session.is_away:
        line = f"the bank {where} cannot be reached; the chat goes on with the memory that is here"
    notes.print(printable(f"hiermem: {line}"), style="yellow", markup=False, soft_wrap=True)


def _name_source(session: Session, terminal: bool) -> None:
    """What in the bank says the reply, below it in a terminal, beside it in a pipe."""
    response = session.model.response
    if response and (line := source_line(response.sources)):
        (console if terminal else notes).print(
            line, style="dim", markup=False, highlight=False, soft_wrap=not terminal
        )


def _notes(session: Session, before: tuple[str, ...], terminal: bool) -> None:
    """What there is to say before a reply: turns that were dropped, and the memory that it comes with."""
    lines = []
    if session.dropped:
        turns = "the oldest turn was" if session.dropped == 1 else f"the {session.dropped} oldest turns were"
        lines.append(f"{turns} left out, to fit the model's {session.context} tokens")
    moved = session.selection.blocks != before
    if not terminal:
        lines.append(describe(session.selection) + " · new path" * moved)
    elif session.selection.route.far and (moved or len(session.messages) == 1):
        lines.append(f"→ {FAR}")
    elif moved and session.selection.labels:
        lines.append("→ " + " › ".join(session.selection.labels))
    for line in lines:
        (console if terminal else notes).print(line, style="dim", markup=False, soft_wrap=not terminal)
