"""`hiermem chat` and `hiermem "question"` as commands: pipes, the last conversation, which model is meant."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from chatting import say

from mlx_hiermem import load
from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import notes
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.apps.cli.shelf import Shelf
from mlx_hiermem.bank import edit
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.session import Session


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


def test_a_conversation_whose_memory_is_gone_is_resumed(
    folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path))
    own = shutil.copytree(folder, tmp_path / "own")
    session = Session(load(own), "0.1", max_tokens=4)
    say(session, "hello")
    Shelf(str(own.resolve())).keep(session)
    edit.block(own / "bank", [Path((0, 1))])
    code, out, err = run(capsys, "chat", own, "-n", "4", "--resume", stdin="and more\n")
    assert (code, bool(out)) == (0, True)
    assert "memory 0.1 is blocked or gone; now fetched" in err


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
    code, out, err = run(capsys, "chat", folder, "--memory", "none", stdin=f"/system {wrong}\n/system\n")
    assert (code, err.count("not valid UTF-8"), out.count("no system message")) == (1, 1, 1)


def test_bytes_that_are_no_text_from_a_pipe(folder: pathlib.Path) -> None:
    """A Mac's standard input is strict."""
    code = "from mlx_hiermem.apps.cli.main import main; main()"
    call = [sys.executable, "-c", code, "chat", folder, "--memory", "none", "-n", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(call, input=b"caf\xe9 ?\nhello\n", env=environment, capture_output=True)
    said = done.stderr.decode()
    assert (done.returncode, said.count("not valid UTF-8"), said.count("tokens prefilled")) == (1, 1, 1)


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
