"""The commands inside a chat: lines that begin with a slash."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from mlx_hiermem.apps.cli.display import console, faint, notes, size, written
from mlx_hiermem.apps.cli.why import route, sources, why
from mlx_hiermem.errors import FileError, HierMemError, OutputError
from mlx_hiermem.files import parse_json, read_json, read_text, write_json

if TYPE_CHECKING:
    from mlx_hiermem.apps.cli.shelf import Shelf
    from mlx_hiermem.session import Session

COMPARED = 160  # tokens of a reply that is compared: without memory small models ramble
LISTED, TITLE = 20, 60  # conversations that `/chats` lists, characters of a title


@dataclass(frozen=True)
class Command:
    usage: str
    what: str
    run: Callable[[Session, str], None]


def run(session: Session, line: str, shelf: Shelf | None = None, plain: bool = False) -> bool:
    """Runs one line; whether the chat goes on. Raises HierMemError for an unknown command.

    `plain` shows replies without their Markdown laid out.
    """
    name, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    if name in ("/quit", "/exit"):
        return False
    if name == "/chats":
        _chats(session, argument, shelf, plain)
    elif name == "/compare":
        _compare(session, plain)
    elif name in COMMANDS:
        COMMANDS[name].run(session, argument)
        if name == "/load" and shelf:
            shelf.begin_anew()  # or the next turn would be kept in place of the conversation before
    else:
        raise HierMemError(f"there is no command {name}", "/help lists them.")
    return True


def names() -> list[str]:
    return [*COMMANDS, "/compare", "/chats", "/quit"]


def _help(session: Session, argument: str) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")  # whole where the terminal is narrow
    table.add_column()
    for command in COMMANDS.values():
        table.add_row(command.usage, command.what)
    table.add_row("/compare", "the last question without memory, with the generic one, and with its own")
    table.add_row("/chats [NUMBER]", "earlier conversations with this model, or go on with one")
    table.add_row("/quit", "leave, as Ctrl-D does")
    table.add_row("Esc Enter, or \\ Enter", "start a new line")
    table.add_row("Ctrl-C", "stop a reply; what was said stays")
    console.print(table)


def _chats(session: Session, argument: str, shelf: Shelf | None, plain: bool) -> None:
    if shelf is None:
        raise HierMemError("this conversation is not kept: it comes from a pipe", "`--resume` keeps it.")
    if not argument:
        kept = shelf.kept()
        for number, one in enumerate(kept[:LISTED], 1):
            when = time.strftime("%d %b %Y, %H:%M", time.localtime(one.changed))
            title = " ".join(one.title.split())
            console.print(f"{number:3}  {when}  {title[:TITLE]}{'…' * (len(title) > TITLE)}", markup=False)
        faint("/chats NUMBER goes on with one." if kept else "no earlier conversation with this model is kept")
        return
    if not argument.isdecimal():
        raise HierMemError(f"'{argument}' is no number", "/chats lists the conversations.")
    take_up(session, shelf, int(argument))
    show_last(session, plain)


def take_up(session: Session, shelf: Shelf, number: int = 1) -> None:
    """Goes on with an earlier conversation; says so where its memory is not to be had any more."""
    before = shelf.take_up(session, number).data["memory"]
    if before != session.memory:
        notes.print(f"memory {before} is blocked or gone; now {session.memory}", style="yellow", markup=False)


def show_last(session: Session, plain: bool) -> None:
    """The last question and its answer, for one who goes on with a conversation."""
    question, answer = session.messages[-2:]
    console.print(f"› {question['content']}", markup=False, highlight=False, soft_wrap=True)
    with written(plain) as show:
        show(answer["content"])


def _compare(session: Session, plain: bool) -> None:
    """The last question again, without memory, with the generic one, and with that of its path."""
    from mlx_hiermem.memory_choice import MemoryChoice
    from mlx_hiermem.session import Session

    if not session.messages:
        raise HierMemError("nothing was asked yet", "Ask something first.")
    bank, response = session.model.bank, session.model.response
    generic = [MemoryChoice.GENERIC] if bank and bank.manifest.generic else []
    path = [MemoryChoice(str(session.selection.path))] if session.selection.path else []
    try:
        for memory in (MemoryChoice.NONE, *generic, *path):
            other = Session(session.model, memory, system=session.system, template=session.template, earlier=0)
            other.sampling = replace(session.sampling, max_tokens=min(COMPARED, session.sampling.max_tokens))
            other.messages = [dict(message) for message in session.messages[session.shown : -2]]
            labels = " › ".join(filter(None, session.selection.labels)) or str(memory)
            faint({"none": "without memory", "generic": "generic memory"}.get(memory, labels))
            with written(plain) as show:
                for piece in other.ask(session.messages[-2]["content"]):
                    show(piece)
    finally:
        session.model.response = response  # what /why tells of is the conversation's


def _memory(session: Session, argument: str) -> None:
    if argument:
        session.use(argument)
    what = {
        "fetched": ": each turn is routed",
        "generic": ": the same for every turn",
        "source": ": a passage of each turn's leaf goes into the prompt",
        "fetched+source": ": each turn is routed, and a passage goes into the prompt",
    }
    memory = session.memory
    faint(f"memory stays on {memory}" if memory.path else f"memory {memory}{what.get(memory, '')}")


def _pin(session: Session, argument: str) -> None:
    from mlx_hiermem.config import Path
    from mlx_hiermem.memory_choice import MemoryChoice

    if argument == "off":
        if not session.memory.path:
            raise HierMemError("nothing is pinned", "/pin PATH stays on a path.")
        session.use(MemoryChoice.FETCHED)
    elif argument or session.selection.path:
        session.use(Path.parse(argument) if argument else session.selection.path)
    else:
        raise HierMemError("there is no path to stay on yet", "Ask something, or name one: /pin 1.2")
    _memory(session, "")


def _stats(session: Session, argument: str) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    if cache := session.model.cache:
        table.add_row("blocks in memory", f"{cache.blocks}, {size(cache.bytes)} of {size(cache.budget)}")
        for name, count in asdict(cache.stats).items():
            if count or "remote" not in name:
                table.add_row(name.replace("_", " "), size(count) if "bytes" in name else str(count))
    context = f" of {session.context}" if session.context else ""
    table.add_row("tokens in the KV cache", f"{session.kv_tokens}{context}")
    turns = sum(message["role"] == "user" for message in session.messages)
    left_out = f", the oldest {session.first // 2} left out" if session.first else ""
    table.add_row("turns", f"{turns}{left_out}")
    if last := session.last:
        prompt, reply = session.prefilled, last.generation_tokens
        table.add_row("last prompt", f"{prompt} tokens computed, {last.prompt_tps:.1f} tokens/s")
        table.add_row("last reply", f"{reply} tokens, {last.generation_tps:.1f} tokens/s")
        table.add_row("peak memory", size(last.peak_memory * 1e9))
    console.print(table)


def _system(session: Session, argument: str) -> None:
    if argument:
        session.system = "" if argument == "off" else argument
    faint(f"system message: {session.system}" if session.system else "no system message; /system TEXT sets one")


def _save(session: Session, argument: str) -> None:
    file = _file(argument, "/save")
    if file.exists() and not _is_saved_chat(file):
        raise OutputError(f"{file} exists and is not a saved conversation", "Take another name.")
    write_json(file, session.to_json(), indent=1)
    faint(f"{len(session.messages)} messages saved in {file}")


def _load(session: Session, argument: str) -> None:
    file = _file(argument, "/load")
    try:
        session.restore(parse_json(read_text(file)))
    except ValueError as error:
        raise HierMemError(f"{file} is not a saved conversation: {error}") from error
    where = f", on {session.topic.path}" if session.topic else ""
    faint(f"{len(session.messages)} messages loaded{where}")


def _file(argument: str, command: str) -> pathlib.Path:
    if not argument:
        raise HierMemError("no file is named", f"Write {command} FILE.")
    try:
        file = pathlib.Path(argument).expanduser()
        file.exists()  # raises where the name is too long, or lies in a folder that is shut
    except (OSError, RuntimeError, ValueError) as error:
        raise HierMemError(f"cannot use {argument}: {error}", "Take another name.") from error
    return file


def _is_saved_chat(file: pathlib.Path) -> bool:
    from mlx_hiermem.session import FORMAT

    try:
        data = read_json(file)
    except FileError:
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command("/route [TEXT]", "the path of a text, or of the last question", route),
        Command(
            "/memory fetched|none|generic|source|fetched+source|PATH",
            "which memory answers: each turn's own, none, the generic one, a passage, or a path's",
            _memory,
        ),
        Command("/pin [PATH]", "stay on a path, or on the present one, until /pin off", _pin),
        Command(
            "/why [--verbose]",
            "which memory answered, what says the answer, what was learnt; and with what numbers it was chosen",
            why,
        ),
        Command("/sources", "the windows of the last question's leaf", sources),
        Command("/stats", "figures of the block cache, the KV cache and the last reply", _stats),
        Command("/save FILE", "write the conversation", _save),
        Command("/load FILE", "go on with a saved conversation", _load),
        Command("/system TEXT", "set the system message; /system off removes it", _system),
        Command("/help", "this list", _help),
    )
}
