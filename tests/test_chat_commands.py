"""What is typed in a chat: the slash commands, each with what it says and what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from chatting import command, say, talk
from tiny import NAMES, REST, load_aimed, make_model

from mlx_hiermem.apps.cli import slash
from mlx_hiermem.apps.cli.display import console, write
from mlx_hiermem.apps.cli.shelf import Shelf
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.printable import printable
from mlx_hiermem.session import Session

# the commands


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/foo", "there is no command /foo"),
        ("/", "there is no command /"),
        ("/memory lots", "unknown memory 'lots'"),
        ("/memory 7.7", "has no node 7.7"),
        ("/pin x", "'x' is not a path"),
        ("/pin 7.7", "has no node 7.7"),
        ("/pin", "no path to stay on yet"),
        ("/pin off", "nothing is pinned"),
        ("/why", "no memory was used"),
        ("/why else", "/why knows no 'else'"),
        ("/compare", "nothing was asked yet"),
        ("/route", "nothing was routed yet"),
        ("/save", "no file is named. Write /save FILE."),
        ("/load", "no file is named. Write /load FILE."),
        ("/load nowhere", "cannot read nowhere: No such file"),
        ("/save nowhere/chat", "cannot write nowhere/chat: No such file"),
        ("/save /dev/null/chat", "cannot write /dev/null/chat: Not a directory"),
    ],
)
def test_bad_commands_are_one_line_and_change_nothing(session: Session, line: str, message: str) -> None:
    before = json.dumps(session.to_json())
    with pytest.raises(HierMemError, match=message.replace(".", r"\.")):
        slash.run(session, line)
    assert json.dumps(session.to_json()) == before


def test_help_and_quit(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_width", 160)  # a narrow one folds what is long
    text = command(session, "/help", capsys)
    assert all(name in text for name in slash.names())
    assert "/memory fetched|none|generic|source|fetched+source|PATH" in text
    assert not slash.run(session, "/quit")


def test_route_and_why(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    text = command(session, "/route about iron", capsys)
    assert "topic 2.0" in text
    assert "alone it takes 2.0; the conversation would take it (decided by " in text
    assert session.topic is None  # asking changes nothing
    say(session, "about neon")
    say(session, "and its symbol?")
    plain = command(session, "/why", capsys)
    memory = "the memory on topic 0 › topic 0.1 (0.1), where the conversation was before."
    told = f"“and its symbol?” was answered with {memory}"
    assert plain.startswith(f"{told} provenance: ")
    text = command(session, "/why --verbose", capsys)
    assert text.startswith(told)
    assert "topic 0.1 1.7 kB, in memory" in text
    assert "topic 0.2 1.7 kB, on disk" in text  # what else was near
    assert "alone it takes 2.2; the conversation stays on 0.1 (decided by " in text
    assert "provenance: what these blocks were learnt from" in text
    assert "0.1 no sources are recorded" in text
    assert "alone it takes 2.2" in command(session, "/route", capsys)


def test_why_names_sources_and_blocked_nodes(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    bank = session.model.bank
    assert bank
    entry = bank.manifest.blocks[Path((0,))]
    many = replace(entry, sources=tuple(f"s{i}" for i in range(11)))
    bank.manifest = replace(bank.manifest, blocks=bank.manifest.blocks | {many.path: many})
    bank.policy = session.model.router.policy = BankPolicy(frozenset([Path((0, 1))]))
    say(session, "about neon")
    assert "0.1 topic 0.1 would be nearer, but is blocked" in command(session, "/why", capsys)
    text = command(session, "/why --verbose", capsys)
    assert "0.1 topic 0.1 would be nearer, but is blocked" in text
    assert "1.7 kB, blocked" in text
    assert "0 s0, s1, s2, s3, s4, s5, s6, s7 and 3 more" in text


def test_why_after_another_process_has_removed_the_path(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(load_aimed(make_model(tmp_path / "model"), NAMES, REST), max_tokens=4)
    say(session, "about neon")
    assert session.model.bank
    edit.remove(session.model.bank.root, [Path((0, 1))])
    command(session, "/route about iron", capsys)  # takes the edit up
    assert "0.1 inf" in " ".join(command(session, "/why --verbose", capsys).split())


def test_memories_are_compared(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    """Each as if it had answered, and the conversation stays what it was."""
    say(session, "now iron")
    say(session, "about neon")
    before = session.to_json()
    capsys.readouterr()
    slash.run(session, "/compare")
    lines = capsys.readouterr().out.splitlines()
    expected = []
    for memory, name in (("none", "without memory"), ("generic", "generic memory"), ("0.1", "topic 0 › topic 0.1")):
        other = Session(session.model, memory, max_tokens=4)
        other.messages = []  # as the question about neon was answered
        expected += [name, printable(say(other, "about neon"))]
    assert "\n".join(lines) == "\n".join(expected)
    assert expected[-1] == printable(session.messages[-1]["content"])
    assert session.to_json() == before
    fresh = Session(session.model, max_tokens=4)
    for question in session.questions:
        say(fresh, question)
    expected = [say(fresh, "and its symbol?")]
    slash.run(session, "/compare")  # what it attached is not what answers next
    assert [say(session, "and its symbol?")] == expected


def test_conversations_are_kept_and_gone_on_with(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path))
    shelf = Shelf("my-model")
    assert "no earlier conversation" in chats(session, "/chats", shelf, capsys)
    with pytest.raises(HierMemError, match="there are none yet"):
        slash.run(session, "/chats 1", shelf)
    say(session, "about neon")
    shelf.keep(session)
    say(session, "and its symbol?")
    shelf.keep(session)
    first = session.to_json()
    other, later = Session(session.model, max_tokens=4), Shelf("my-model")
    say(other, "now iron\nplease")
    later.keep(other)
    (tmp_path / "chats/broken.json").write_text("{")
    Shelf("another").keep(other)
    assert (tmp_path / "chats").stat().st_mode & 0o077 == 0
    newest = Shelf("my-model")
    rows = chats(session, "/chats", newest, capsys)
    assert rows.index("now iron please") < rows.index("about neon")
    text = chats(other, "/chats 2", newest, capsys)
    assert text == " ".join(f"› and its symbol? {first['messages'][-1]['content']}".split())
    assert other.to_json() == first
    say(other, "once more")
    newest.keep(other)  # in the same file
    assert len(list((tmp_path / "chats").glob("2*.json"))) == 3
    assert [one.title for one in Shelf("my-model").kept()] == ["about neon", "now iron\nplease"]
    for line, words in (("/chats 9", "no conversation 9"), ("/chats x", "'x' is no number")):
        with pytest.raises(HierMemError, match=words):
            slash.run(other, line, newest)
    slash.run(other, f"/save {tmp_path / 'saved.json'}")
    slash.run(session, f"/load {tmp_path / 'saved.json'}", newest)
    newest.keep(session)  # what was loaded is another conversation
    assert len(list((tmp_path / "chats").glob("2*.json"))) == 4


def test_a_resumed_chat_shows_where_it_was_and_is_kept(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    reply = say(session, "about neon")
    assert talk(session, ["/chats", "now iron"], monkeypatch, Shelf("my-model"))
    assert f"› about neon\n{reply}\n" in capsys.readouterr().out
    (kept,) = Shelf("my-model").kept()
    assert kept.data["messages"] == session.messages
    assert len(session.messages) == 4


def test_replies_shown_again_are_laid_out_unless_told_not_to(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(session, "about neon")
    asked = list[bool]()

    @contextlib.contextmanager
    def written(plain: bool) -> Iterator[Callable[[str], None]]:
        asked.append(plain)
        yield write

    monkeypatch.setattr(slash, "written", written)
    slash.show_last(session, plain=False)
    slash.run(session, "/compare")
    assert asked == [False] * 4
    slash.run(session, "/compare", plain=True)
    assert asked == [False] * 4 + [True] * 3


def chats(session: Session, line: str, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert slash.run(session, line, shelf)
    return " ".join(capsys.readouterr().out.split())


def test_memory_and_pin(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(session, "/memory", capsys) == "memory fetched: each turn is routed"
    say(session, "about neon")
    assert command(session, "/pin", capsys) == "memory stays on 0.1"
    say(session, "now iron")
    assert session.selection.path == Path((0, 1))
    assert "questions are not routed" in command(session, "/why", capsys)
    assert command(session, "/pin off", capsys) == "memory fetched: each turn is routed"
    say(session, "now iron")
    assert session.selection.path == Path((2, 0))
    for line, memory, answer in (
        ("/memory off", "none", "memory none"),
        ("/memory generic", "generic", "memory generic: the same for every turn"),
        ("/memory 1.2", "1.2", "memory stays on 1.2"),
        ("/memory on", "fetched", "memory fetched: each turn is routed"),
    ):
        assert command(session, line, capsys) == answer
        assert session.memory == memory


def test_stats_and_system(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert "turns 0" in command(session, "/stats", capsys)
    say(session, "about neon")
    text = command(session, "/stats", capsys)
    for part in ("blocks in memory 2, 5.0 kB of 536.9 MB", "misses 2", "turns 1", "last reply", "tokens/s"):
        assert part in text
    assert "remote" not in text
    assert command(session, "/system", capsys) == "no system message; /system TEXT sets one"
    assert command(session, "/system\nBe brief.", capsys) == "system message: Be brief."
    assert session.system == "Be brief."
    command(session, "/system off", capsys)
    assert session.system == ""


def test_save_and_load(
    session: Session, aimed: MemoryModel, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(session, "about neon")
    file = tmp_path / "my chat.json"
    for _ in range(2):  # a saved conversation may be written over
        assert "2 messages saved" in command(session, f"/save {file}", capsys)
    other = Session(aimed, max_tokens=4)
    assert command(other, f"/load {file}", capsys) == "2 messages loaded, on 0.1"
    assert other.messages == session.messages
    letter = tmp_path / "letter"
    letter.write_text("Dear all")
    with pytest.raises(HierMemError, match="exists and is not a saved conversation"):
        slash.run(session, f"/save {letter}")
    with pytest.raises(HierMemError, match="is not a saved conversation"):
        slash.run(session, f"/load {letter}")
    for name in ("~nobody-has-this-name.json", 300 * "x"):
        for line in (f"/save {name}", f"/load {name}"):
            with pytest.raises(HierMemError, match=r"cannot use .* Take another name\."):
                slash.run(session, line)
    assert letter.read_text() == "Dear all"
    assert {child.name for child in tmp_path.iterdir()} == {file.name, letter.name}
