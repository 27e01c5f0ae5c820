"""The pages: links lead somewhere, their commands exist, and the page of commands is not stale."""

from __future__ import annotations

import pathlib
import re
import runpy
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from mlx_hiermem.apps.cli.main import app

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]


def test_the_page_of_commands_is_not_stale() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == script["page"]()


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in sorted(folder.glob("2*.md")) if f"({file.name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for file, anchor in links:
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def calls_in(text: str) -> Iterator[list[str]]:
    """The words of each call of hiermem in the fenced blocks, and in the `code` of the prose.

    A call begins a line, or stands behind a prompt, a variable or a pipe. One whose command is a placeholder
    (`hiermem COMMAND`) or a question is none.
    """
    fenced = re.findall(r"```(?:bash|sh|console|text)\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = "\n".join([*fenced, *re.findall(r"`([^`]+)`", prose)]).replace("\\\n", " ")
    for call in re.findall(r"^(?:\$ )?(?:.*(?:\||&&) |[A-Z_]+=\S+ )?hiermem (-*[a-z].*)", lines, re.MULTILINE):
        yield shlex.split(re.sub(r"\[OPTIONS\]| [|>&2].*", "", call), comments=True)


def unknown(words: list[str]) -> set[str]:
    """The command of a call that is none, or the options that its command does not have."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while (children := getattr(command, "commands", None)) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in children:
            return {name}
        command = children[name]
    options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    used = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    return used - options - {"--help", "-h", "--debug"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_pages_exist(page: pathlib.Path) -> None:
    wrong = {shlex.join(call): unknown(call) for call in calls_in(page.read_text(encoding="utf-8"))}
    assert {call: names for call, names in wrong.items() if names} == {}


def test_commands_that_do_not_exist_are_found() -> None:
    page = """`hiermem bank vanish m` `hiermem COMMAND` `hiermem "why?"`
```console
$ hiermem chat m --loud -n 3
$ KEY=x hiermem serve --lan 2>/dev/null
$ echo hi | hiermem chat m > file
$ hiermem bank add-block m f \\
    --path 1 --colour=red  # --not-an-option
```
"""
    assert [unknown(call) for call in calls_in(page)] == [{"--loud"}, {"--lan"}, set(), {"--colour"}, {"vanish"}]


def test_the_walk_through_the_code_leads_through_code() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    walk = re.findall(r"^\| \d\. [^|]*\| `([\w/.]+)` \| (.*) \|$", page, re.MULTILINE)
    assert 0 < len(walk) <= 8
    for file, functions in walk:
        source = (ROOT / "src" / "mlx_hiermem" / file).read_text(encoding="utf-8")
        names = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", functions)]
        assert names
        assert [name for name in names if f"def {name}(" not in source] == []
