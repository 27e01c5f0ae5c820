"""What a chat shows: replies, the status line, turns without memory, errors, Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chatting import command, say, talk
from tiny import Aimed

from mlx_hiermem.apps.cli import chat
from mlx_hiermem.apps.cli.display import FAR, console
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.printable import printable
from mlx_hiermem.selection import Selection
from mlx_hiermem.session import Session
from mlx_hiermem.tree import Route


def test_replies_go_to_the_output_and_all_else_beside_it(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(session, ["about neon", "", "and its symbol?", "now iron"], monkeypatch)
    out, err = capsys.readouterr()
    replies = [m["content"] for m in session.messages if m["role"] == "assistant"]
    assert out == "".join(f"{printable(reply)}\n" for reply in replies)
    lines = err.splitlines()
    assert [line.endswith("new path") for line in lines if " · " in line and "blocks" in line] == [
        True,
        False,
        True,
    ]
    assert lines[0].startswith("0.1 · topic 0 › topic 0.1 · 2 blocks")
    assert sum("tokens prefilled" in line for line in lines) == 3


def test_a_terminal_shows_what_moved_and_the_rest_in_the_status_line(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_color_system", None)
    talk(session, ["about neon", "and its symbol?", "now iron"], monkeypatch)
    out, err = capsys.readouterr()
    arrows = [line.rstrip() for line in out.splitlines() if line.startswith("→")]
    assert arrows == ["→ topic 0 › topic 0.1", "→ topic 2 › topic 2.0"]
    assert "prefilled" not in out + err


def test_a_turn_without_memory_is_told(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    router = session.model.router
    assert isinstance(router.embedder, Aimed)
    router.embedder.names["rice"] = -5 * router.embedder.names["neon"]  # far from all there is
    near, far = (route.distances[-1] for route in router.route_batch(["about neon", "cook rice"]))
    router.policy = BankPolicy(reach=(near + far) / 2)
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_color_system", None)
    talk(session, ["cook rice", "about neon", "cook rice", "cook rice again"], monkeypatch)
    arrows = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.startswith("→")]
    assert arrows == [f"→ {FAR}", "→ topic 0 › topic 0.1", f"→ {FAR}"]
    assert chat.status_line(session, 120).startswith(FAR)
    plain = command(session, "/why", capsys)
    assert plain == "“cook rice again” was answered without memory: nothing in the bank is like it."
    why = command(session, "/why --verbose", capsys)
    assert "alone it takes none; it gets no memory, and the conversation stays on 0.1 (decided by 0.000" in why
    assert "belonging to the conversation by -" in why
    tried = command(session, "/route cook rice", capsys)
    assert "it would get no memory, and the conversation would stay on 0.1" in tried


def test_errors_do_not_end_a_chat(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not talk(session, ["/nonsense", "^C", "about neon", "/quit", "never read"], monkeypatch)
    out, err = capsys.readouterr()
    assert "hiermem: there is no command /nonsense. /help lists them.\n" in err
    assert "Ctrl-D leaves." in out
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["about neon"]


def test_ctrl_c_stops_a_reply_and_keeps_the_session(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = session.model.responses

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        monkeypatch.setattr(session.model, "responses", real)
        for response in real(*arguments, **options):
            yield response
            if response.text:
                raise KeyboardInterrupt

    monkeypatch.setattr(session.model, "responses", interrupted)
    assert talk(session, ["about neon", "and its symbol?"], monkeypatch)
    assert capsys.readouterr().out.count("[stopped]") == 1
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2


def test_dropped_turns_are_named(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session.model.config["max_position_embeddings"] = 110
    talk(
        session,
        ["about neon, the first", "about neon, the second", "about neon, the third", "x" * 200],
        monkeypatch,
    )
    err = capsys.readouterr().err
    assert "the 2 oldest turns were left out, to fit the model's 110 tokens" in err
    assert "hiermem: the question has " in err


def test_replies_cannot_control_the_terminal(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "ask", lambda _: iter(["a\x1b[2J", "\x07b\n\tc"]))
    talk(session, ["hello"], monkeypatch)
    assert capsys.readouterr().out == "a[2Jb\n\tc\n"


def test_status_line(session: Session) -> None:
    assert chat.status_line(session, 80) == "0 blocks, 0 B of 536.9 MB"
    say(session, "about neon")
    line = chat.status_line(session, 80)
    assert line.startswith("topic 0 › topic 0.1 · 2 blocks, 5.0 kB of 536.9 MB · ")
    assert line.endswith(" tokens/s")
    session.use("2.1")
    assert chat.status_line(session, 80).startswith("pinned: topic 2 › topic 2.1 · ")
    session.use("none")
    assert chat.status_line(session, 80).startswith("no memory · ")


@pytest.mark.parametrize("width", [120, 60, 50, 48, 45])
def test_a_narrow_status_line_keeps_its_figures(session: Session, width: int) -> None:
    say(session, "about neon")
    session.selection = Selection(
        MemoryChoice.FETCHED, Route(Path((0, 1))), ("Lanthanides: Neodymium, Thulium", "Noble gases")
    )
    right = "2 blocks, 5.0 kB of 536.9 MB"
    session.last = None
    line = chat.status_line(session, width)
    assert len(line) <= width
    assert line.endswith(right)
    assert ("Lanthanides" in line) == (width == 120)
    assert ("… › Noble gases" in line) == (48 <= width <= 60)
