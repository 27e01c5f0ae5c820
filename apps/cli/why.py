"""`/route`, `/why` and `/sources` of a chat: where a text goes, which memory answered, what its leaf has learnt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mlx_hiermem.apps.cli.display import NOT_SAID, blocked_note, console, faint, size
from mlx_hiermem.errors import HierMemError

if TYPE_CHECKING:
    import numpy as np

    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.config import Path
    from mlx_hiermem.router import Turn
    from mlx_hiermem.session import Session

BEGINNING = 96  # characters of a window that `/sources` shows
SHOWN = 8  # sources of a block that `/why` lists; the rest is counted


def route(session: Session, argument: str) -> None:
    """The path of a text, or of the last question, and what the conversation makes of it."""
    turn = session.turn
    if argument:
        turn = session.route(argument)
    if turn is None:
        raise HierMemError("nothing was routed yet", "Write a text behind /route.")
    distances = dict(zip(turn.alone.path.prefixes(), turn.alone.distances, strict=True))
    _path_table(session, turn.alone.path, distances)
    _verdict(session, turn, tried=bool(argument))


def why(session: Session, argument: str) -> None:
    """Which memory answered last, what says so, and what its blocks were learnt from."""
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
            faint(blocked_note(bank, node))
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


def sources(session: Session, argument: str) -> None:
    """The windows of the last question's leaf. Those that say the answer, or were in its prompt, are marked."""
    from mlx_hiermem.source_search import Source

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
        faint(f"the bank keeps no windows of {selection.path}")


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


def _path_table(session: Session, path: Path, distances: dict[Path, float], beside: tuple[Path, ...] = ()) -> None:
    """The nodes of a path and those beside it: distance, label, and where each block is."""
    from rich.table import Table
    from rich.text import Text

    bank, cache = _bank(session), session.model.cache
    table = Table("node", "distance", "label", "block", box=None, header_style="dim")
    for node in sorted((*path.prefixes(), *beside), key=lambda node: (len(node), distances.get(node, math.inf))):
        entry = bank.manifest.blocks.get(node)
        state = bank.state(node)
        if state == "on disk" and cache and node in cache:
            state = "in memory"
        block = f"{size(entry.bytes)}, {state}" if entry else "none"
        taken = node in path.prefixes()
        row = (f"{node}", f"{distances.get(node, math.inf):.3f}", Text(bank.manifest.label(node)), block)
        table.add_row(*row, style="" if taken else "dim")
    console.print(table)


def _verdict(session: Session, turn: Turn, tried: bool = False) -> None:
    """Why the conversation stays or moves, or would, in numbers: see `router`."""
    from mlx_hiermem.router import BELONGS

    bank = _bank(session)
    for node in turn.alone.avoided:
        faint(blocked_note(bank, node))
    if turn.alone.far:
        passage, policy = turn.alone.passage, bank.policy
        what = "the leaf it would take" if passage is None else "the nearest passage"
        faint(f"It is farther than {policy.measured_by(passage is not None):.3f} from {what}: nothing is like it.")
    stays, takes, gets = ("would stay", "would take", "would get") if tried else ("stays", "takes", "gets")
    keeps = f"the conversation {stays} on {turn.topic.path}"
    if turn.route.far:
        goes = f"it {gets} no memory" + (f", and {keeps}" if turn.topic.path else "")
    else:
        goes = keeps if turn.route.stayed else f"the conversation {takes} it"
    figures = f"decided by {turn.decided:.3f}"
    if turn.near is not None and turn.alone.passage is not None:
        figures = f"{turn.alone.passage:.3f} from a passage, and at most {turn.near:.3f} leaves the path before"
    elif turn.needed:
        figures += f", and more than {turn.needed:.3f} leaves the path before"
    if turn.belongs is not None:
        figures += f"; belonging to the conversation by {turn.belongs:.3f}, and more than {BELONGS} stays"
    faint(f"alone it takes {turn.alone.path or 'none'}; {goes} ({figures})")


def _distances(bank: MemoryBank, vector: np.ndarray, node: Path) -> list[float]:
    return [float(distance) for distance in bank.tree.distances(vector, node)]


def _bank(session: Session) -> MemoryBank:
    """The bank of a session in which something was routed."""
    assert session.model.bank is not None
    return session.model.bank
