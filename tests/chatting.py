"""A chat without a terminal: questions, slash commands and lines as a person types them."""

from __future__ import annotations

import pytest

from mlx_hiermem.apps.cli import chat, keyboard, slash
from mlx_hiermem.apps.cli.shelf import Shelf
from mlx_hiermem.session import Session


def say(session: Session, text: str) -> str:
    return "".join(session.ask(text))


def command(session: Session, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, in words, however wide the terminal is."""
    capsys.readouterr()
    assert slash.run(session, line)
    return " ".join(capsys.readouterr().out.split())


def talk(session: Session, lines: list[str], monkeypatch: pytest.MonkeyPatch, shelf: Shelf | None = None) -> bool:
    read = iter(lines)

    def one() -> str:
        line = next(read, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(keyboard, "reader", lambda *_: one)
    return chat.talk(session, shelf=shelf)
