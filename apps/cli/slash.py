"""The commands inside a chat: lines that begin with a slash."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from mlx_hiermem.apps.cli.display import NOT_SAID, blocked_note, console, size, written
from mlx_hiermem.errors import FileError, HierMemError, OutputError
from mlx_hiermem.files import parse_json, read_json, read_text, write_json

if TYPE_CHECKING:
    import numpy as np

    from mlx_hiermem.apps.cli.shelf import Shelf
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.config import Path
    from mlx_hiermem.router import Turn
    from mlx_hiermem.session import Session

BEGINNING = 96  # characters of a window that `/sources` shows
COMPARED = 160  # tokens of a reply that is compared: without memory small models ramble
LISTED, TITLE = 20, 60  # conversations that `/chats` lists, characters of a title
SHOWN = 8  # sources of a block that `/why` lists; the rest is counted


@dataclass(frozen=True)
class Command:
    usage: str
    what: str
    run: Callable[[Session, str], None]


def run(session: Session, line: str, shelf: Shelf | None = None, plain: bool = False) -> bool:
    """Runs one line; whether the chat goes on. Raises HierMemError for an unknown command.

    `plain` shows replies without their Markdown laid out.
    """
    name, _, argument = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/chats":
        _chats(session, argument.strip(), shelf, plain)
    elif name == "/compare":
        _compare(session, plain)
    elif name in COMMANDS:
        COMMANDS[name].run(session, argument.strip())
    else:
        raise HierMemError(f"there is no command {name}", "/help lists them.")
    return True


def names() -> list[str]:
    return [*COMMANDS, "/compare", "/chats", "/quit"]


def _say(text: str) -> None:
    console.print(text, style="dim", markup=False)


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
        _say("/chats NUMBER goes on with one." if kept else "no earlier conversation with this model is kept")
        return
    if not argument.isdecimal():
        raise HierMemError(f"'{argument}' is no number", "/chats lists the conversations.")
    shelf.take_up(session, int(argument))
    show_last(session, plain)


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
            _say({"none": "without memory", "generic": "generic memory"}.get(memory, labels))
            with written(plain) as show:
                for piece in other.ask(session.messages[-2]["content"]):
                    show(piece)
    finally:
        session.model.response = response  # what /why tells of is the conversation's


def _route(session: Session, argument: str) -> None:
    turn = session.turn
    if argument:
        turn = session.route(argument)
    if turn is None:
        raise HierMemError("nothing was routed yet", "Write a text behind /route.")
    distances = dict(zip(turn.alone.path.prefixes(), turn.alone.distances, strict=True))
    _path_table(session, turn.alone.path, distances)
    _verdict(session, turn, tried=bool(argument))


def _verdict(session: Session, turn: Turn, tried: bool = False) -> None:
    """Why the conversation stays or moves, or would, in numbers: see `router`."""
    from mlx_hiermem.router import BELONGS

    bank = _bank(session)
    for node in turn.alone.avoided:
        _say(blocked_note(bank, node))
    if turn.alone.far:
        passage, policy = turn.alone.passage, bank.policy
        what = "the leaf it would take" if passage is None else "the nearest passage"
        _say(f"It is farther than {policy.measured_by(passage is not None):.3f} from {what}: nothing is like it.")
    stays, takes, gets = ("would stay", "would take", "would get") if tried else ("stays", "takes", "gets")
    keeps = f"the conversation {stays} on {turn.topic.path}"
    if turn.route.far:
        goes = f"it {gets} no memory" + (f", and {keeps}" if turn.topic.path else "")
    else:
        goes = keeps if turn.route.stayed else f"the conversation {takes} it"
    figures = f"decided by {turn.decided:.3f}"
    if turn.needed:
        figures += f", and more than {turn.needed:.3f} leaves the path before"
    if turn.belongs is not None:
        figures += f"; belonging to the conversation by {turn.belongs:.3f}, and more than {BELONGS} stays"
    _say(f"alone it takes {turn.alone.path or 'none'}; {goes} ({figures})")


def _bank(session: Session) -> MemoryBank:
    """The bank of a session in which something was routed."""
    assert session.model.bank is not None
    return session.model.bank


def _path_table(session: Session, path: Path, distances: dict[Path, float], beside: tuple[Path, ...] = ()) -> None:
    """The nodes of a path and those beside it: distance, label, and where each block is."""
    from rich.table import Table
    from rich.text import Text

    bank, cache = _bank(session), session.model.cache
    table = Table("node", "distance", "label", "block", box=None, header_style="dim")
    for node in sorted((*path.prefixes(), *beside), key=lambda node: (len(node), distances[node])):
        entry = bank.manifest.blocks.get(node)
        state = bank.state(node)
        if state == "on disk" and cache and node in cache:
            state = "in memory"
        block = f"{size(entry.bytes)}, {state}" if entry else "none"
        taken = node in path.prefixes()
        row = (f"{node}", f"{distances[node]:.3f}", Text(bank.manifest.label(node)), block)
        table.add_row(*row, style="" if taken else "dim")
    console.print(table)


def _why(session: Session, argument: str) -> None:
    from mlx_hiermem.config import ROOT, Path

    bank, turn, path = session.model.bank, session.turn, session.selection.path
    figures = argument in ("-v", "--verbose")
    if argument and not figures:
        raise HierMemError(f"/why knows no '{argument}'", "/why --verbose shows the numbers too.")
    if turn is not None and turn.route.far:
        console.print(f"“{turn.text}” was answered without memory: nothing in the bank is like it.", markup=False)
        if figures:
            _verdict(session, turn)
        return
    if bank is None or not (session.selection.blocks or path):
        raise HierMemError("no memory was used", "/memory fetched, and a question, bring one in.")
    console.print(_plainly(session), markup=False, highlight=False)
    if turn is not None and not figures:
        for node in turn.alone.avoided:
            _say(blocked_note(bank, node))
    _told_by(session)
    if turn is not None and figures:
        distances: dict[Path, float] = {}
        for parent in (ROOT, *path.prefixes()[:-1]):
            for child, distance in enumerate(_distances(bank, turn.vector, parent)):
                if distance != float("inf"):
                    distances[Path((*parent, child))] = distance
        beside = tuple(node for node in distances if node not in path.prefixes())
        _path_table(session, path, distances, beside)
        _verdict(session, turn)
    _provenance(bank, path)


def _plainly(session: Session) -> str:
    """Which memory answered, in one sentence."""
    turn, path = session.turn, session.selection.path
    if turn is None:
        return f"The memory is {session.memory}; questions are not routed."
    labels = " › ".join(filter(None, session.selection.labels))
    on = f"on {labels} ({path})" if labels else f"on {path}"
    stayed = ", where the conversation was before" if turn.route.stayed else ""
    return f"“{turn.text}” was answered with the memory {on}{stayed}."


def _told_by(session: Session) -> None:
    """The sentences that say the last answer, each with its document."""
    response = session.model.response
    found = response.sources if response else None
    for source in found or ():
        console.print(f"{source.name} says: “{source.sentence}”", markup=False, highlight=False)
    if found is not None and not found:
        console.print(NOT_SAID)


def _sources(session: Session, argument: str) -> None:
    """The windows of the last question's leaf. Those that say the answer, or were in its prompt, are marked."""
    from mlx_hiermem.sources import Source

    search, selection = session.model.search, session.selection
    if search is None:
        raise HierMemError("this model's bank keeps no sources", "`hiermem learn` keeps them, unless told not to.")
    if not selection.path:
        raise HierMemError("nothing was routed yet", "Ask something first.")
    leaf, response = search.sources.read(selection.path), session.model.response
    saying = {(one.document, one.place) for one in (response.sources or () if response else ())}
    for window in leaf.windows if leaf else ():
        marks = ["says the answer"] * ((window.document, window.place) in saying)
        marks += ["in the prompt"] * (window == selection.passage)
        name = Source(window.document, window.title, window.place, "", 0.0).name
        begins = window.text if len(window.text) <= BEGINNING else window.text[:BEGINNING].rsplit(" ", 1)[0] + " …"
        console.print(f"{name}{''.join(f' [{mark}]' for mark in marks)}", markup=False, highlight=False)
        console.print(f"  {begins}", style="dim", markup=False, highlight=False)
    if leaf is None:
        _say(f"the bank keeps no windows of {selection.path}")


def _distances(bank: MemoryBank, vector: np.ndarray, node: Path) -> list[float]:
    return [float(distance) for distance in bank.tree.distances(vector, node)]


def _provenance(bank: MemoryBank, path: Path) -> None:
    """What the attached blocks were learnt from. This says nothing about where an answer came from."""
    nodes = bank.nodes_on(path)
    if not nodes:
        return
    console.print("\nprovenance: what these blocks were learnt from, whether or not it is in the answer")
    for node in nodes:
        entry = bank.manifest.blocks[node]
        listed = ", ".join(entry.sources[:SHOWN]) or "no sources are recorded"
        more = f" and {len(entry.sources) - SHOWN} more" if len(entry.sources) > SHOWN else ""
        console.print(f"  {node}  {listed}{more}", markup=False)


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
    _say(f"memory stays on {memory}" if memory.path else f"memory {memory}{what.get(memory, '')}")


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
    _say(f"system message: {session.system}" if session.system else "no system message; /system TEXT sets one")


def _save(session: Session, argument: str) -> None:
    file = _file(argument, "/save")
    if file.exists() and not _is_saved_chat(file):
        raise OutputError(f"{file} exists and is not a saved conversation", "Take another name.")
    write_json(file, session.to_json(), indent=1)
    _say(f"{len(session.messages)} messages saved in {file}")


def _load(session: Session, argument: str) -> None:
    file = _file(argument, "/load")
    try:
        session.restore(parse_json(read_text(file)))
    except ValueError as error:
        raise HierMemError(f"{file} is not a saved conversation: {error}") from error
    where = f", on {session.topic.path}" if session.topic else ""
    _say(f"{len(session.messages)} messages loaded{where}")


def _file(argument: str, command: str) -> pathlib.Path:
    if not argument:
        raise HierMemError("no file is named", f"Write {command} FILE.")
    return pathlib.Path(argument).expanduser()


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
        Command("/route [TEXT]", "the path of a text, or of the last question", _route),
        Command(
            "/memory fetched|none|generic|source|fetched+source|PATH",
            "which memory answers: each turn's own, none, the generic one, a passage, or a path's",
            _memory,
        ),
        Command("/pin [PATH]", "stay on a path, or on the present one, until /pin off", _pin),
        Command(
            "/why [--verbose]",
            "which memory answered, what says the answer, what was learnt; and with what numbers it was chosen",
            _why,
        ),
        Command("/sources", "the windows of the last question's leaf", _sources),
        Command("/stats", "figures of the block cache, the KV cache and the last reply", _stats),
        Command("/save FILE", "write the conversation", _save),
        Command("/load FILE", "go on with a saved conversation", _load),
        Command("/system TEXT", "set the system message; /system off removes it", _system),
        Command("/help", "this list", _help),
    )
}
