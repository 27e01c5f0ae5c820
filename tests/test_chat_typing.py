"""What is typed in a chat: keys, pastes, what is typed ahead, drafts."""

from __future__ import annotations

import os
import pathlib
import pty
import select
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_hiermem.apps.cli import chat, keyboard, slash
from mlx_hiermem.session import Session


def typed(keys: str, monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path) -> list[str]:
    """What the terminal reader makes of keys, until the end of input."""
    monkeypatch.setenv("HIERMEM_CACHE", str(cache))
    lines = []
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        session = keyboard.terminal(lambda: "status", slash.names())
        while True:
            try:
                lines.append(session.prompt(keyboard.PROMPT))
            except EOFError:
                return lines
            except KeyboardInterrupt:
                lines.append("^C")


UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


def test_typing(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    keys = f"one\ra\\\rb\rc\x1b\rd\rgone{CTRL_C}/mem\r{CTRL_D}"
    assert typed(keys, monkeypatch, tmp_path) == ["one", "a\nb", "c\nd", "^C", "/mem"]
    assert typed(f"{UP}{UP}{UP}\r{CTRL_D}", monkeypatch, tmp_path) == ["c\nd"]  # of the session before
    assert (tmp_path / "chat-history").stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    assert typed(f"one\r{CTRL_D}", monkeypatch, tmp_path / "file") == ["one"]


def test_pauses_are_told_with_what_is_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(keyboard, "PAUSE", 0.05)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    told: list[str] = []
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):

        def paused(text: str) -> None:
            told.append(text)
            pipe.send_text({"": "about ne", "about ne": "on", "about neon": "\r"}[text])

        assert keyboard.reader(lambda: "", [], paused)() == "about neon"
    assert told == ["", "about ne", "about neon"]


TYPED_AHEAD = """
import time
from mlx_hiermem.apps.cli import keyboard
with keyboard.unechoed():
    print("loading", flush=True)
    time.sleep(1.5)
    read = keyboard.reader(lambda: "status", [])
    print("read:", read(), read(), flush=True)
    print("answering", flush=True)
    time.sleep(1.5)
    print("read:", read(), flush=True)
print("echoes", flush=True)
print("done", input(), flush=True)
"""


@pytest.mark.slow
def test_what_is_typed_ahead_is_shown_by_the_prompt_alone(tmp_path: pathlib.Path) -> None:
    """In a real terminal, while the model loads and while it answers; afterwards the terminal echoes again."""
    program, terminal = pty.fork()
    if program == 0:
        os.environ |= {"HIERMEM_CACHE": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        os.execv(sys.executable, [sys.executable, "-c", TYPED_AHEAD])
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            ready, _, _ = select.select([terminal], [], [], 60)
            assert ready, f"no {text!r} in {seen!r}"
            seen += os.read(terminal, 4096).decode()

    until("loading")
    os.write(terminal, b"about neon\rand its symbol?\r")
    until("read: about neon and its symbol?")
    loading, _, rest = seen.partition(keyboard.PROMPT)
    assert "about" not in loading
    assert "about neon" in rest
    until("answering")
    os.write(terminal, b"thanks\r")
    until("read: thanks")
    assert "thanks" not in seen.partition("answering")[2].partition(keyboard.PROMPT)[0]
    until("echoes")
    os.write(terminal, b"bye\r")
    until("done bye")
    assert "bye\r\n" in seen.partition("echoes")[2].partition("done")[0]
    assert os.waitpid(program, 0)[1] == 0
    os.close(terminal)


def test_where_no_prompt_shows_what_is_typed_the_terminal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `hiermem chat | tee log`. The input here is no real terminal: whoever changes it fails."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    with keyboard.unechoed():
        pass


def test_drafts_are_routed_but_commands_are_not(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[str] = []
    monkeypatch.setattr(session, "draft", drafts.append)
    paused = chat._draft(session)
    for text in ("", "about ne", "/why", " about neon ", "\udcff"):
        paused(text)
    assert drafts == ["about ne", "about neon"]


def test_pasted_lines_stay_together(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    assert typed(f"\x1b[200~a\nb\x1b[201~\r{CTRL_D}", monkeypatch, tmp_path) == ["a\nb"]
