"""The `hiermem` command: its commands, and how errors reach the user.

Thin: each command imports what it needs when it runs, so that `hiermem --help` loads neither MLX nor
transformers. Every error is one line. What the project raises on purpose exits with 1, a command that was not
understood with 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import io
import os
import shlex
import sys
from typing import Any, NoReturn

import typer

from mlx_hiermem import cpu
from mlx_hiermem.apps.cli import ask, bank, chat, convert, demo, evaluate, export, learn, mcp, plan, serve, sync
from mlx_hiermem.apps.server.left_behind import end_if_any
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.files import reason
from mlx_hiermem.printable import printable

START = """\
A small language model with a large memory on disk.

  hiermem "What is the capital of Laos?"

  hiermem demo       see it at work on a small real model
  hiermem chat       talk with a model
  hiermem ask        answer one question, as the line above does
  hiermem serve      OpenAI's API, and a page that shows the memory at work
  hiermem mcp        the model as tools of a larger assistant
  hiermem route      show the path that a text takes through the memory

  hiermem learn      make a model of your documents
  hiermem sync       learn what has changed in their folder
  hiermem convert    make one of a checkpoint that was trained elsewhere
  hiermem verify     check a model, also against what it was made of
  hiermem eval       test a model with and without its memory
  hiermem plan       say what fits on a device

  hiermem bank       look at a memory, change it, share it
  hiermem export     write a model for an iOS app

Name a model with -m; without it, the last one used answers, else the demo's.
`hiermem COMMAND --help` says more.
"""

app = typer.Typer(
    name="hiermem",
    help="Language models with hierarchical memories: a small anchor, a large bank of facts on disk.",
    epilog="Start with: hiermem demo",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
for command in (
    demo.demo,
    chat.chat,
    ask.ask,
    serve.serve,
    mcp.mcp,
    ask.route,
    learn.learn,
    sync.sync,
    convert.convert,
    convert.verify,
):
    app.command()(command)
app.command("eval")(evaluate.evaluate)
app.command()(plan.plan)
app.add_typer(bank.app, name="bank")
app.add_typer(export.app, name="export")
app.command(hidden=True)(ask.generate)


def _version(wanted: bool) -> None:
    if wanted:
        from mlx_hiermem import __version__

        typer.echo(f"hiermem {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks; works after the command's name too."),
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    try:
        _run()
    except SystemExit as end:
        end_if_any(int(end.code or 0))
        raise


def _run() -> NoReturn:
    """The command, to its exit."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):  # a file name that is no Unicode must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are for programmers
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not arguments:
        print(START, end="")
        sys.exit(0)
    cpu.enable(lambda line: print(f"hiermem: {line}", file=sys.stderr))
    try:
        sys.exit(app(args=_understood(arguments), prog_name="hiermem", standalone_mode=False) or 0)
    except HierMemError as error:
        if debug:
            raise
        _fail(str(error))
    except typer.Abort:
        _fail("stopped")
    except OSError as error:  # a disk that fails where no error of ours says what for
        if debug:
            raise
        where = f"cannot use {error.filename}: " if error.filename else ""
        _fail(f"{where}{reason(error)}")
    except (Exception, KeyboardInterrupt) as error:  # the last line of defence: no traceback unless asked for
        if debug:
            raise
        if hasattr(error, "format_message"):  # a command that was not understood, of click or of Typer's copy of it
            _fail(_usage(error), status=2)
        _fail(f"unexpected {type(error).__name__}: {error}. Run again with --debug, and report it.")


def _understood(arguments: list[str]) -> list[str]:
    """The arguments with what may be left out: `hiermem "What is …?"` asks, `hiermem bank` shows its commands."""
    commands: Any = getattr(typer.main.get_command(app), "commands", {})
    first = arguments[0]
    if first in commands:
        group = hasattr(commands[first], "commands")
        return [*arguments, "--help"] if group and len(arguments) == 1 else arguments
    if first.startswith("-"):
        return arguments
    if any(mark in first.strip() for mark in " ?\n"):
        return ["ask", *arguments]
    words = [word for word in arguments if not word.startswith("-")]
    if len(words) > 2 or (len(words) > 1 and not difflib.get_close_matches(first, commands)):
        _fail(f"there is no command {first}; put a question in quotes: hiermem {_quoted(words)}", status=2)
    return arguments


def _quoted(words: list[str]) -> str:
    text = " ".join(words)
    return shlex.quote(text) if any(mark in text for mark in '"\\$`!') else f'"{text}"'


def _usage(error: Any) -> str:
    """What was wrong with a command, and where its help is."""
    context = getattr(error, "ctx", None)
    where = f" `{context.command_path} --help` says more." if context else ""
    message = error.format_message()
    return message + "." * (message[-1:] not in ".?") + where


def _fail(message: str, status: int = 1) -> NoReturn:
    line = " ".join(printable(message).split())
    print(f"hiermem: {line}", file=sys.stderr)
    sys.exit(status)
