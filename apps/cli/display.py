"""What several commands print in the same way: byte counts, a selection in one line, replies, progress."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from mlx_hiermem.errors import HierMemError
from mlx_hiermem.printable import printable
from mlx_hiermem.progress import Progress

if TYPE_CHECKING:
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.config import Path
    from mlx_hiermem.selection import Selection
    from mlx_hiermem.source_search import Source

console = Console(highlight=False)
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
SILENCE = 60.0  # seconds after which a stage that cannot count says that it goes on
notes = Console(stderr=True, highlight=False)  # beside the output, never in it


def size(count: float) -> str:
    """Bytes for people: 830 B, 36.1 MB, 9.2 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, option: str) -> int:
    """`500M`, `2 GB`, `1500000` -> bytes; a usage error of that option for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"'{text}' is no size; write 500M or 2G", param_hint=option)
    count = int(float(found[1]) * UNITS[found[2].upper()])
    if 0 < count < 1000:
        raise typer.BadParameter(f"'{text}' is a size of {count} bytes; write 500M or 2G", param_hint=option)
    return count


def several(count: int, noun: str) -> str:
    """1 block, 2 blocks."""
    return f"{count} {noun}{'s' * (count != 1)}"


NOT_SAID = "no source in this bank says this"
FAR = "nothing like it in the bank: no memory"


def describe(selection: Selection) -> str:
    """`10.7 · Noble gases › Helium, Neon · 2 blocks, 1.7 MB (read 0 B) · route 3.1 fetch 0.2 attach 1.0 ms`"""
    route, passage = selection.route, selection.passage
    if route.far:
        return FAR
    if not selection.blocks and not passage:
        where = str(selection.path) or "no memory"
        return f"{where} · nothing attached" if selection.path else where
    labels = " › ".join(label for label in selection.labels if label)
    blocks = f"{several(len(selection.blocks), 'block')}, {size(selection.memory_bytes)}"
    parts = [
        str(selection.path or selection.memory),
        labels,
        f"passage {passage.title or passage.document}" if passage else "",
        f"{blocks} (read {size(selection.bytes_read)})" if selection.blocks else "",
        f"route {route.milliseconds:.1f} fetch {selection.fetch_ms:.1f} attach {selection.attach_ms:.1f} ms",
    ]
    return " · ".join(part for part in parts if part)


def source_line(sources: Sequence[Source] | None) -> str:
    """`from Gold (metals.pdf, page 3): “It does not rust.”`; that nothing says it; empty where nothing was looked
    through."""
    if sources is None:
        return ""
    return f"from {sources[0].name}: “{sources[0].sentence}”" if sources else NOT_SAID


def blocked_note(bank: MemoryBank, node: Path) -> str:
    """About a node that a text would have entered."""
    return f"{node} {bank.manifest.label(node)} would be nearer, but is blocked"


def utf8(text: str) -> str:
    """A text that was typed or piped in. HierMemError where its bytes are none, for no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HierMemError("the text is not valid UTF-8", "Convert it: iconv -t utf-8.") from error
    return text


def faint(text: str) -> None:
    """A line beside what was asked for."""
    console.print(text, style="dim", markup=False)


def write(piece: str) -> None:
    """A piece of a reply, as it is but for control characters."""
    console.file.write(printable(piece))  # Rich would turn tabs into spaces
    console.file.flush()


@contextmanager
def written(plain: bool) -> Iterator[Callable[[str], None]]:
    """What shows the pieces of a reply, and ends its last line: as Markdown in a terminal, else as they are."""
    if plain or not console.is_interactive or not console.file.isatty():
        yield write
        console.print()
        return
    from mlx_hiermem.apps.cli.markdown import markdown

    with markdown(console) as show:
        yield show


def renamed(old: str, new: str) -> None:
    """Tells about an earlier name that was used; it still works."""
    notes.print(f"note: `{old}` is now `{new}`", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A turning wheel where somebody sees it, for what takes seconds and has no measure."""
    if not notes.is_terminal:
        yield
        return
    with notes.status(what, spinner="dots", spinner_style="dim"):
        yield


def duration(seconds: float | None) -> str:
    """4 s, 12 min, 3.1 h."""
    seconds = max(seconds or 0.0, 0.0)  # what is left is an estimate, and may have passed
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Lines:
    """Long work in a log: now and then a line on stderr that says what, how far and how long yet."""

    def __init__(self, what: str, unit: str) -> None:
        self.what, self.unit, self.stage = what, unit, ""
        self.out = sys.stderr  # what converters print goes elsewhere; this does not
        self._begun = self._said = time.monotonic()
        self._since: tuple[float, int] | None = None  # when the first of it was done, and how much that was

    def say(self, text: str) -> None:
        """Begins a stage."""
        self.stage = text
        self._print(text)

    def advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        since, before = self._since = self._since or (now, done)
        if now - self._said < LINE_EVERY:
            return
        amounts = [size(done), size(total)] if self.unit == "bytes" else [f"{done:,}", f"{total:,} {self.unit}"]
        left = f", {duration((now - since) / (done - before) * (total - done))} left" if done > before else ""
        self._print(" of ".join(amounts) + left)

    @contextmanager
    def never_silent(self) -> Iterator[None]:
        """Says every minute that a stage goes on, if nothing else was said."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(max(self._said + SILENCE - time.monotonic(), 0.01)):
                if time.monotonic() - self._said >= SILENCE:
                    self._print(f"still {self.stage}")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _print(self, text: str) -> None:
        self._said = time.monotonic()
        took = duration(self._said - self._begun)
        print(printable(f"{self.what}, {took}: {text}"), file=self.out, flush=True)


@contextmanager
def staged_progress(what: str, show: bool = True) -> Iterator[tuple[Progress | None, Callable[[str], None]]]:
    """Long work that says what it is doing: a progress bar, or lines on stderr where there is no terminal.

    A SIGTERM ends it as an interruption does, so that what is half made goes.
    """
    with _ended_by_sigterm():
        if not show:
            yield None, lambda stage: None
        elif sys.stderr.isatty():
            with progress_bar(what, "steps") as progress:
                yield progress, lambda stage: notes.print(stage, style="dim", markup=False, soft_wrap=True)
        else:
            lines = Lines(what, "steps")
            with lines.never_silent():
                yield lines.advance, lines.say


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM raises SystemExit within. A library that it interrupts may turn that into an error of its own."""
    status, came = 128 + signal.SIGTERM, threading.Event()

    def end(*_: object) -> None:
        came.set()
        sys.exit(status)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception:  # of any kind: only a SIGTERM makes it an exit, all others go on
        if came.is_set():
            sys.exit(status)
        raise


@contextmanager
def progress_bar(what: str, unit: str = "bytes", show: bool = True) -> Iterator[Progress | None]:
    """Progress on stderr as a callback (done, total): a bar, or lines where there is no terminal; None without
    `show`."""
    if not show or not sys.stderr.isatty():
        yield Lines(what, unit).advance if show else None
        return
    from rich import progress as bars

    amount = bars.DownloadColumn() if unit == "bytes" else bars.MofNCompleteColumn()
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), amount, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=notes, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
