"""`hiermem chat` and `hiermem "question"`: what is typed, what is shown, which model is meant, and pipes."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pty
import select
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from tiny import Aimed

from mlx_hiermem import load
from mlx_hiermem.apps.cli import chat, keyboard, models, slash
from mlx_hiermem.apps.cli.display import FAR, console, notes
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.apps.cli.shelf import Shelf
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.printable import printable
from mlx_hiermem.selection import Selection
from mlx_hiermem.session import Session
from mlx_hiermem.tree import Route


def say(session: Session, text: str) -> str:
    return "".join(session.ask(text))


def command(session: Session, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, in words, however wide the terminal is."""
    capsys.readouterr()
    assert slash.run(session, line)
    return " ".join(capsys.readouterr().out.split())


# talking


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


# typing


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


def test_drafts_are_routed_but_commands_are_not(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[str] = []
    monkeypatch.setattr(session, "draft", drafts.append)
    paused = chat._draft(session)
    for text in ("", "about ne", "/why", " about neon ", "\udcff"):
        paused(text)
    assert drafts == ["about ne", "about neon"]


def test_pasted_lines_stay_together(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    assert typed(f"\x1b[200~a\nb\x1b[201~\r{CTRL_D}", monkeypatch, tmp_path) == ["a\nb"]


# as commands


def run(
    capsys: pytest.CaptureFixture[str], *arguments: str | pathlib.Path, stdin: str = ""
) -> tuple[int, str, str]:
    """(exit status, output, errors)."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hiermem", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
    done = capsys.readouterr()
    return int(ended.value.code or 0), done.out, done.err


def test_chat_reads_a_pipe(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "chat", folder, "--memory", "0.1", "-n", "4", stdin="hello \\\nyou\nmore\n")
    assert code == 0
    assert err.count("tokens prefilled") == 2
    assert err.count("0.1 · topic 0 › topic 0.1 · ") == 2
    code, out, err = run(capsys, "chat", folder, "--cache", "1k", "--memory", "0.1", stdin="/save\n/stats\n")
    assert (code, err) == (1, "hiermem: no file is named. Write /save FILE.\n")
    assert "of 1.0 kB" in out


def test_the_last_conversation_is_resumed(
    folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path))
    call = ("chat", folder, "--memory", "0.1", "-n", "4", "--resume")
    code, out, err = run(capsys, *call, stdin="hello\n")
    assert (code, out) == (1, "")
    assert err.startswith(f"hiermem: no conversation 1 with {folder.resolve()} is kept; there are none yet")
    session = Session(load(folder), "0.1", max_tokens=4)
    say(session, "hello")
    Shelf(str(folder.resolve())).keep(session)
    assert run(capsys, *call, stdin="and more\n")[0] == 0
    (kept,) = Shelf(str(folder.resolve())).kept()
    assert [m["content"] for m in kept.data["messages"] if m["role"] == "user"] == ["hello", "and more"]


def test_what_cannot_be_is_said_before_the_first_question(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "chat", folder, "--memory", "lots", stdin="hello\n")
    assert (code, out, err) == (
        1,
        "",
        "hiermem: unknown memory 'lots'. "
        "Use none, generic, fetched, source, fetched+source, or a path such as 10.7.\n",
    )
    code, _, err = run(capsys, "chat", folder / "anchor", "--memory", "generic")
    assert (code, err.count("\n")) == (1, 1)


def test_bytes_that_are_no_text_are_refused(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = b"caf\xe9 ?".decode(errors="surrogateescape")  # as Python hands them over
    for arguments in (["ask", wrong, "--model", folder], ["route", wrong, "-m", folder]):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err) == (1, "", "hiermem: the text is not valid UTF-8. Convert it: iconv -t utf-8.\n")
    code, out, err = run(capsys, "chat", folder, "--memory", "none", "-n", "1", stdin=f"{wrong}\nhello\n")
    assert (code, err.count("not valid UTF-8"), err.count("tokens prefilled")) == (1, 1, 1)


def test_a_question_needs_no_command(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run(capsys, "ask", "What", "is it?", "--model", folder, "--memory", "0.1", "-n", "4")
    assert code == 0
    assert err.startswith("0.1 · topic 0 › topic 0.1 · ")
    again = run(capsys, "What is it?", "--memory", "0.1", "-n", "4", "--json")  # of the model used last
    answer = json.loads(again[1])
    assert answer["text"] + "\n" == text
    assert (answer["model"], answer["selection"]["blocks"]) == (str(folder), ["0", "0.1"])
    assert answer["prompt_tokens"] > 0
    assert 1 <= answer["generated_tokens"] <= 4


def test_a_question_that_is_too_long_is_refused(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "anchor", tmp_path / "plain")
    config = json.loads((folder / "anchor/config.json").read_text()) | {"max_position_embeddings": 64}
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    code, text, err = run(capsys, "Why? " * 20, "--model", tmp_path / "plain")
    assert (code, text, err.count("\n")) == (1, "", 1)
    assert "the question has 118 tokens" in err


def test_which_model_is_meant(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HIERMEM_MODEL", raising=False)
    with pytest.raises(AnchorError, match=r"none was used before.*hiermem demo"):
        models.preferred()
    (tmp_path / "model" / "anchor").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    models.remember("model")
    assert models.preferred() == str(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(AnchorError):
        models.preferred()
    models.remember("me/elements")
    assert models.preferred() == "me/elements"
    monkeypatch.setenv("HIERMEM_MODEL", "other")
    assert models.preferred() == "other"
    monkeypatch.setenv("HIERMEM_CACHE", "/dev/null/cache")
    models.remember("model")  # nowhere to note it is no reason to fail


def test_a_model_is_introduced_on_one_line(
    aimed: MemoryModel, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert aimed.bank
    name = aimed.bank.manifest.anchor.name
    monkeypatch.setattr(notes, "_width", 500)
    assert models.introduce(str(folder), aimed) == f"{name}, 12 blocks · {folder}"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert models.introduce(str(folder), aimed) == f"{name}, 12 blocks · ~/model"
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setattr(notes, "_width", 30)
    assert models.introduce(str(folder), aimed) == f"{name}, 12 blocks · …/model"
