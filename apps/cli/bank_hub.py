"""`hiermem bank push` and `hiermem bank pull`: a memory model to the hub and back, whole or in part."""

from __future__ import annotations

import json
import pathlib
import sys

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, parse_size, progress_bar, several, size


def asks() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty()


def push(
    words: list[str] = typer.Argument(
        ..., metavar="[MODEL] REPO", help="REPO: organisation/name on the hub. Made where it is missing."
    ),
    model: str = models.MODEL,
    branch: str = typer.Option(
        "main", "--branch", "--revision", help="Branch to push to. Made where it is missing."
    ),
    private: bool = typer.Option(
        False, "--private", help="Only for people with access; refuses a public repository."
    ),
    message: str = typer.Option("", help="The commit's message."),
    with_sources: bool | None = typer.Option(
        None, "--with-sources/--no-sources", help="Upload the texts that the bank keeps, too. Default: asks."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Upload a model to the hub, with a model card. Digests are checked first; the commit is printed.

    Example: `hiermem bank push my-model me/elements --private`
    """
    from mlx_hiermem.share.push import push as run

    name, repo = models.last_word(words, model, "REPO")
    kept = models.open_bank(name).manifest.sources
    if kept and with_sources is None and asks():
        texts = f"{several(kept.windows, 'text')} of {several(kept.documents, 'document')}"
        with_sources = typer.confirm(f"The bank keeps {texts}, which whoever pulls it can read. Upload them too?")
    with progress_bar("checking", show=not as_json) as progress:
        pushed = run(
            models.folder_of(name),
            repo,
            branch=branch,
            private=private,
            message=message,
            with_sources=with_sources,
            progress=progress,
        )
    if as_json:
        console.print_json(json.dumps(pushed.to_json()))
        return
    console.print(f"pushed   {several(pushed.blocks, 'block')}, {size(pushed.bytes)}, and the anchor", markup=False)
    console.print(f"commit   {pushed.commit}", markup=False)
    console.print(f"see      {pushed.url}", markup=False, soft_wrap=True)
    console.print(f"use      hiermem chat {repo}", style="dim", markup=False)


def pull(
    repo: str = typer.Argument(..., help="Repository on the hub: organisation/name."),
    out: pathlib.Path = typer.Argument(..., help="Folder to make, or to add to if it was pulled from there."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit. Default: main, or what OUT holds."),
    only: list[str] | None = typer.Option(
        None, help="A subtree: a path such as 2.1, or a word of a label. May be given several times."
    ),
    lazy: bool = typer.Option(False, "--lazy", help="Anchor, tree and level 1; the rest when it is first needed."),
    tree_only: bool = typer.Option(
        False, "--tree-only", help="Manifest and tree alone, enough for `hiermem route`."
    ),
    disk_budget: str = typer.Option("", help="Most that blocks fetched on first use may take on disk: 500M, 2G."),
    sources: bool = typer.Option(True, "--sources/--no-sources", help="Bring the texts that the bank keeps, too."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Download a model, or a part of its memories, at a fixed commit. Goes on after an interruption.

    Example: `hiermem bank pull me/elements my-model --only bromine --lazy`
    """
    from mlx_hiermem.share.pull import pull as run

    if tree_only and (only or lazy):
        raise typer.BadParameter("goes without --only and --lazy", param_hint="--tree-only")
    budget = parse_size(disk_budget, "--disk-budget") if disk_budget else None
    with progress_bar("pulling", show=not as_json) as progress:
        pulled = run(
            repo,
            out,
            revision=revision,
            only=only or (),
            lazy=lazy,
            tree_only=tree_only,
            disk_budget=budget,
            sources=sources,
            progress=progress,
        )
    if as_json:
        console.print_json(json.dumps(pulled.to_json()))
        return
    files, blocks = several(pulled.files, "file"), several(pulled.blocks, "block")
    console.print(f"pulled   {files}, {size(pulled.bytes)}, {blocks}", markup=False)
    if pulled.remote_blocks:
        left = f"{several(pulled.remote_blocks, 'block')}, {size(pulled.remote_bytes)}"
        console.print(f"remote   {left}: fetched when first needed", markup=False)
    console.print(f"commit   {pulled.revision}", markup=False)
    console.print(f"written  {out}", markup=False)
