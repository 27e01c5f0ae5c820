"""What the user types: in a terminal with editing, history and a status line, elsewhere plain lines."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from prompt_toolkit import PromptSession
    from prompt_toolkit.buffer import Buffer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

ReadLine = Callable[[], str]  # raises EOFError at the end of input, KeyboardInterrupt at Ctrl-C
Paused = Callable[[str], None]  # told of what is typed so far

PROMPT, CONTINUED = "› ", "  "
PAUSE = 0.25  # seconds without a key


def reader(status: Callable[[], str], commands: Sequence[str], paused: Paused = lambda text: None) -> ReadLine:
    """A terminal reader where there is a terminal, else one that reads lines from standard input.

    In a terminal `paused` is called before anything is typed, with "", and whenever typing pauses.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused, the next is read
        return read_plain
    session = terminal(status, commands, paused)

    def at_once() -> None:
        _call_later(0.0, paused, "")

    return lambda: session.prompt(PROMPT, pre_run=at_once)


@contextmanager
def unechoed() -> Iterator[None]:
    """The terminal shows nothing of what is typed while nobody reads: it would land in the midst of other output.

    It is not lost: the next prompt shows it. Where nothing has such a prompt (`hiermem chat | tee log`), the
    terminal goes on showing it.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def read_plain() -> str:
    """One message: a line, or several of which all but the last end in a backslash."""
    lines = [input()]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)


def terminal(
    status: Callable[[], str], commands: Sequence[str], paused: Paused = lambda text: None
) -> PromptSession[str]:
    """prompt_toolkit's reader: `status` is the bottom line, `commands` complete with Tab."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.styles import Style

    session: PromptSession[str] = PromptSession(
        multiline=True,  # Enter is bound below; pasted lines stay together
        key_bindings=_keys(),
        history=_history(),
        prompt_continuation=CONTINUED,
        bottom_toolbar=status,
        style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        reserve_space_for_menu=0,
    )
    _watch(session.default_buffer, paused)
    return session


def _watch(buffer: Buffer, paused: Paused) -> None:
    """Calls `paused` on this thread, in the loop that waits for keys, once no key came for a while."""
    timer: TimerHandle | None = None

    def changed(buffer: Buffer) -> None:
        nonlocal timer
        if timer:
            timer.cancel()
        timer = _call_later(PAUSE, paused, buffer.text)

    buffer.on_text_changed += changed


def _call_later(seconds: float, paused: Paused, text: str) -> TimerHandle:
    import asyncio

    return asyncio.get_running_loop().call_later(seconds, paused, text)


def _keys() -> KeyBindings:
    """Enter sends; after a backslash, or with Esc or Alt, it starts a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """What was asked before, in a file that only its owner can read; in memory where that cannot be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from mlx_hiermem.assets import cache_folder

    file = cache_folder() / "chat-history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
