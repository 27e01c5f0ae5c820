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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_commands_is_not_stale() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == script["page"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for file, anchor in links:
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def commands_in(page: pathlib.Path) -> Iterator[str]:
    """Lines of the fenced blocks that call hiermem; in blocks with output they have a prompt in front."""
    for block in re.findall(r"```(?:bash|text|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:\$ )?(hiermem [a-z].*)", line):
                yield found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_pages_exist(page: pathlib.Path) -> None:
    for line in commands_in(page):
        command: Any = typer.main.get_command(app)
        words = iter(shlex.split(line.replace("[OPTIONS]", ""), comments=True)[1:])
        while children := getattr(command, "commands", None):
            name = next(words)
            assert name in children, line
            command = children[name]
        options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= options | {"--help", "-h", "--debug"}, line
