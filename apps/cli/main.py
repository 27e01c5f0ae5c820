"""The `hiermem` command: its commands, and how errors reach the user.

Thin: each command imports what it needs when it runs, so that `hiermem --help` loads neither MLX nor
transformers. Errors that the project raises on purpose print as one line and exit with 1.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from mlx_hiermem import cpu
from mlx_hiermem.apps.cli import ask, bank, chat, convert, demo, evaluate, export, learn, plan, serve, use
from mlx_hiermem.errors import HierMemError

app = typer.Typer(
    name="hiermem",
    help="Language models with hierarchical memories: a small anchor, a large bank of facts on disk.",
    epilog="Start with: hiermem demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
for command in (
    demo.demo,
    convert.convert,
    convert.verify,
    learn.learn,
    chat.chat,
    ask.ask,
    serve.serve,
    use.generate,
    use.route,
    plan.plan,
):
    app.command()(command)
app.command("eval")(evaluate.evaluate)
app.add_typer(bank.app, name="bank")
app.add_typer(export.app, name="export")


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


def _ask_where_no_command(arguments: list[str]) -> list[str]:
    """`hiermem "What is …?"` is short for `hiermem ask "What is …?"`."""
    first = arguments[0] if arguments else ""
    question = not first.startswith("-") and any(mark in first.strip() for mark in " ?\n")
    return ["ask", *arguments] if question else arguments


def main() -> None:
    """Entry point of the console script."""
    debug = "--debug" in sys.argv
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are for programmers
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    cpu.enable(lambda line: print(f"hiermem: {line}", file=sys.stderr))
    try:
        app(args=_ask_where_no_command(arguments))
    except HierMemError as error:
        if debug:
            raise
        _fail(str(error))
    except (Exception, KeyboardInterrupt) as error:  # the last line of defence: no traceback unless asked for
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error}. Run again with --debug, and report it.")


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"hiermem: {line}", file=sys.stderr)
    sys.exit(1)
