"""The `hiermem` command as its user meets it: help, output, one-line errors, exit codes."""

import json
import pathlib
import subprocess
import sys

import pytest
from tiny import make_anchor, make_bank, make_model

COMMANDS = ("demo", "convert", "verify", "chat", "serve", "generate", "route", "plan", "eval")


def run(*arguments: str | pathlib.Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    code = "from mlx_hiermem.apps.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_model(tmp_path_factory.mktemp("cli") / "model")


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert f"hiermem {command}" in result.stdout.split("Example:")[1]


def test_version() -> None:
    from mlx_hiermem import __version__

    assert run("--version").stdout.strip() == f"hiermem {__version__}"


def test_generate(model: pathlib.Path) -> None:
    result = run("generate", model, "abc", "--memory", "1.2", "-n", "5")
    assert result.returncode == 0
    assert "1.2 · topic 1 › topic 1.2 · 2 blocks" in " ".join(result.stderr.split())
    result = run("generate", model, "-", "--memory", "1.2", "-n", "5", "--json", stdin="abc")
    answer = json.loads(result.stdout)
    assert answer["selection"]["blocks"] == ["1", "1.2"]
    assert answer["generated_tokens"] <= 5


def test_route(model: pathlib.Path) -> None:
    from mlx_hiermem import load

    result = run("route", model, "some text", "--json")
    routed = json.loads(result.stdout)
    assert routed["path"] == str(load(model).router.route("some text").path)
    assert [node["label"] for node in routed["nodes"]] == [f"topic {node['node']}" for node in routed["nodes"]]
    assert f"path {routed['path']}" in run("route", model, "some text").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "nowhere", "abc"), "there is no model at nowhere"),
        (("chat", "nowhere"), "there is no model at nowhere"),
        (("route", "nowhere", "abc"), "there is no bank in nowhere"),
        (("verify", "nowhere"), "nowhere"),
        (("convert", "nowhere", "out"), "nowhere"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: pathlib.Path) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("hiermem: ")
    assert message in result.stderr
    assert not pathlib.Path("out").exists()


def test_bad_memory_and_foreign_bank(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = run("generate", model, "abc", "--memory", "lots")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "unknown memory 'lots'" in result.stderr
    make_anchor(tmp_path / "model" / "anchor", seed=1)
    make_bank(tmp_path / "model" / "bank", model / "anchor")
    result = run("generate", tmp_path / "model", "abc")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "was made for the anchor" in result.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("generate", "nowhere", "abc", "--debug").stderr


def test_bad_usage_exits_with_2() -> None:
    assert run("generate").returncode == 2
    assert run("nonsense").returncode == 2
