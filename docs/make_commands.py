"""Writes docs/commands.md: every command's help, as the command itself has it.

    python docs/make_commands.py            write the page
    python docs/make_commands.py --check    exit with 1 where it is not what would be written

Typer can print such a page too, but differently from one version to the next, and then nothing would be stale.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import typer

from mlx_hiermem.apps.cli.main import app

PAGE = pathlib.Path(__file__).with_name("commands.md")
HEAD = """\
# Commands

Written by `python docs/make_commands.py` out of the commands themselves; `make lint` says when it is stale.
`hiermem COMMAND --help` shows the same in the terminal. An error is one line; with `--debug` it is a traceback.
Exit status: 0 done, 1 it could not be done, 2 the command was not understood.
"""
SECTION = """\
## {name}

{help}

```text
{usage} [OPTIONS]
```

| | |
|---|---|
{rows}"""


def page() -> str:
    """The whole page."""
    return "\n".join((HEAD, *_sections(typer.main.get_command(app), "hiermem")))


def _sections(command: Any, name: str) -> Iterator[str]:
    """A section for a command, or one for each of a group's commands (a click.Group has `commands`)."""
    if children := getattr(command, "commands", None):
        for child in (child for child in children.values() if not child.hidden):
            yield from _sections(child, f"{name} {child.name}")
        return
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    usage = [name, *(_usage(param) for param in shown if param.param_type_name == "argument")]
    rows = "".join(f"| {_spelling(param)} | {_meaning(param)} |\n" for param in shown)
    yield SECTION.format(name=name, help=command.help.strip(), usage=" ".join(usage), rows=rows)


def _usage(argument: Any) -> str:
    """`MODEL`, `[MODEL]`, `DOCS...`, or what the command has set."""
    word = argument.metavar or argument.name.upper()
    if "[" in word:
        return word
    word = word.removesuffix("...") + "..." * (argument.nargs == -1)
    return word if argument.required else f"[{word}]"


def _spelling(param: Any) -> str:
    """`--max-tokens`, `-n` MAX_TOKENS"""
    if param.param_type_name == "argument":
        return f"`{param.metavar or param.name.upper()}`"
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    return names if param.is_flag else f"{names} {(param.metavar or param.name).upper()}"


def _meaning(param: Any) -> str:
    """The help text and the default, where there is one that says something."""
    text = " ".join((param.help or "").split()).replace("|", "\\|")
    if param.required or param.default is None or param.default is False or param.default == "":
        return text
    default = param.opts[0] if param.default is True else param.default
    return f"{text} Default: `{default}`."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is stale")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/commands.md is stale: python docs/make_commands.py writes it anew")


if __name__ == "__main__":
    main()
