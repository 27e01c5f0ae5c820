"""The `hiermem` command as its user meets it: help, output, one-line errors, exit codes."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import typer
from tiny import make_anchor, make_bank

from mlx_hiermem.apps.cli.main import app

COMMANDS = ("demo", "convert", "verify", "chat", "ask", "serve", "route", "plan", "eval", "learn")


def run(*arguments: str | pathlib.Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    code = "from mlx_hiermem.apps.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert f"hiermem {command}" in result.stdout.partition("Example:")[2]


def test_version() -> None:
    from mlx_hiermem import __version__

    assert run("--version").stdout.strip() == f"hiermem {__version__}"


@pytest.mark.slow
def test_ask_continues_a_text(folder: pathlib.Path) -> None:
    result = run("ask", "--plain", "abc", "-m", folder, "--memory", "1.2", "-n", "5")
    assert result.returncode == 0
    assert "1.2 · topic 1 › topic 1.2 · 2 blocks" in " ".join(result.stderr.split())
    result = run("ask", "--plain", "-m", folder, "-", "--memory", "1.2", "-n", "5", "--json", stdin="abc")
    answer = json.loads(result.stdout)
    assert answer["selection"]["blocks"] == ["1", "1.2"]
    assert answer["generated_tokens"] <= 5
    earlier = run("generate", folder, "abc", "--memory", "1.2", "-n", "5", "--json")
    assert json.loads(earlier.stdout)["text"] == answer["text"]
    assert earlier.stderr == "note: `hiermem generate MODEL PROMPT` is now `hiermem ask --plain -m MODEL PROMPT`\n"


@pytest.mark.real
def test_route(folder: pathlib.Path) -> None:
    from mlx_hiermem import load

    result = run("route", "-m", folder, "some text", "--json")
    routed = json.loads(result.stdout)
    assert routed["path"] == str(load(folder).router.route("some text").path)
    assert [node["label"] for node in routed["nodes"]] == [f"topic {node['node']}" for node in routed["nodes"]]
    assert f"path {routed['path']}" in run("route", "some text").stdout  # of the model used last
    assert json.loads(run("route", folder, "some", "text", "--json").stdout)["path"] == routed["path"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "abc", "-m", "nowhere"), "there is no model at nowhere"),
        (("chat", "nowhere"), "there is no model at nowhere"),
        (("route", "-m", "nowhere", "abc"), "there is no model at nowhere"),
        (("verify", "nowhere"), "nowhere"),
        (("convert", "nowhere", "out"), "nowhere"),
    ],
)
@pytest.mark.slow
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: pathlib.Path) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("hiermem: ")
    assert message in result.stderr
    assert not pathlib.Path("out").exists()


@pytest.mark.slow
def test_bad_memory_and_foreign_bank(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = run("ask", "-m", folder, "abc", "--memory", "lots")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "unknown memory 'lots'" in result.stderr
    make_anchor(tmp_path / "model" / "anchor", seed=1)
    make_bank(tmp_path / "model" / "bank", folder / "anchor")
    result = run("ask", "-m", tmp_path / "model", "abc")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "was made for the anchor" in result.stderr


@pytest.mark.slow
def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("ask", "-m", "nowhere", "abc", "--debug").stderr


@pytest.mark.slow
def test_bad_usage_exits_with_2() -> None:
    for arguments, message in (
        (("ask",), "hiermem: Missing argument 'question'. `hiermem ask --help` says more."),
        (("nonsense",), "hiermem: No such command 'nonsense'. `hiermem --help` says more."),
        (("chat", "--loud"), "hiermem: No such option: --loud"),
        (("chat", "model", "-m", "model"), "hiermem: Invalid value for --model: the model is named twice"),
        (("chat", "--cache", "5"), "hiermem: Invalid value for --cache: '5' is a size of 5 bytes"),
        (
            ("What", "is", "gold"),
            'hiermem: there is no command What; put a question in quotes: hiermem "What is gold"',
        ),
    ):
        result = run(*arguments)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(message)


def test_alone_it_fits_a_small_terminal_and_names_every_command() -> None:
    shown = run().stdout
    lines = shown.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert lines[2] == '  hiermem "What is the capital of Laos?"'
    visible = [name for name, one in commands().items() if not one.hidden]
    assert all(f"  hiermem {name} " in shown for name in visible)


def test_the_model_is_named_in_the_same_way_everywhere() -> None:
    """By -m, in every command that uses one; --memory says which memory is wanted."""
    makes_one = {"demo", "learn", "convert", "merge", "pull"}
    for name, command in {**commands(), **commands("bank"), **commands("export")}.items():
        if hasattr(command, "commands") or name in makes_one or command.hidden:
            continue
        options = {one for param in command.params for one in param.opts}
        assert {"-m", "--model"} <= options, name
        for param in command.params:
            if "--memory" in param.opts and not param.hidden:
                assert "none, generic, fetched" in param.help


def commands(group: str = "") -> dict[str, Any]:
    found: Any = typer.main.get_command(app)
    return (found.commands[group] if group else found).commands
