"""`hiermem export`: models for where no Python runs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, notes, renamed, size, staged_progress

if TYPE_CHECKING:
    from mlx_hiermem.convert.export.exporter import Options, Report

app = typer.Typer(help="Export a model for where no Python runs.")


@app.callback()
def export() -> None:
    """Export a model for where no Python runs."""


WORDS = typer.Argument(..., metavar="[MODEL] OUT", help="OUT: folder to make, for an app to bundle.")
CONTEXT = typer.Option(None, min=1, help="Most tokens of a conversation. Default: 1024.")
BOUND = typer.Option(
    None, min=0.0, help="Most that the anchor may differ, as mean KL in nats. Default: by --weights."
)
BLOCKS = typer.Option("all", help="Blocks to bundle: all, or level-1 with the rest to download.")
ONLY = typer.Option(
    None, help="Bundle a subtree: a path such as 2.1, or a word of a label. May be given several times."
)
URL = typer.Option("", help="Where the bank's folder will lie for the app. Default: where it came from.")
SOURCES = typer.Option(
    False,
    "--with-sources",
    help="Bundle the texts that the bank keeps, too: questions are routed by them, and answers name their source.",
)
AS_JSON = typer.Option(False, "--json", help="Print one JSON object instead of text.")


@app.command()
def coreml(
    words: list[str] = WORDS,
    model: str = models.MODEL,
    attach: str = typer.Option(
        "state", help="How the app gives a memory: state (written once) or input (each call)."
    ),
    memory: str = typer.Option("", "--memory", hidden=True),
    context: int | None = CONTEXT,
    weights: str = typer.Option(
        "int8", help="fp16, int8, int8_channel, int4 or lut4; 4 bits only where --bound allows it."
    ),
    bound: float | None = BOUND,
    blocks: str = BLOCKS,
    only: list[str] | None = ONLY,
    url: str = URL,
    with_sources: bool = SOURCES,
    as_json: bool = AS_JSON,
) -> None:
    """Write the folder that an iOS app bundles: Core ML packages, tokenizers, bank, manifest, receipt.

    Example: `hiermem export coreml my-model MyApp/Model --only bromine`
    """
    from mlx_hiermem.convert.coreml.export import export as run
    from mlx_hiermem.convert.export.exporter import Options

    if memory:
        renamed("--memory", "--attach")
    options = Options(context, memory or attach, weights, bound, blocks, tuple(only or ()), url, with_sources)
    _export(run, "--coreml", words, model, options, as_json)


@app.command()
def coreai(
    words: list[str] = WORDS,
    model: str = models.MODEL,
    context: int | None = CONTEXT,
    weights: str = typer.Option(
        "int8", help="fp16, int8, int8_channel, int4 or lut4; 4 bits only where --bound allows it."
    ),
    bound: float | None = BOUND,
    blocks: str = BLOCKS,
    only: list[str] | None = ONLY,
    url: str = URL,
    with_sources: bool = SOURCES,
    as_json: bool = AS_JSON,
) -> None:
    """The same for Core AI, which iOS 27 and macOS 27 have (Apple's Python packages for it are betas).

    Example: `hiermem export coreai my-model MyApp/Model --weights int4`
    """
    from mlx_hiermem.convert.coreai.export import export as run
    from mlx_hiermem.convert.export.exporter import Options

    options = Options(context, "input", weights, bound, blocks, tuple(only or ()), url, with_sources)
    _export(run, "--coreai", words, model, options, as_json)


def _export(
    run: Callable[..., Report], check: str, words: list[str], model: str, options: Options, as_json: bool
) -> None:
    name, target = models.last_word(words, model, "OUT")
    folder, out = models.folder_of(name), pathlib.Path(target)
    with staged_progress("exporting", show=not as_json) as (progress, say):
        report = run(folder, out, options, progress, say)
    if as_json:
        console.print_json(json.dumps(report.to_json(), ensure_ascii=False))
        return
    for warning in report.warnings:
        notes.print(f"note: {warning}", style="yellow", markup=False, soft_wrap=True)
    for line in _lines(report.manifest, report.receipt):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"written  {out}", markup=False, soft_wrap=True)
    console.print(
        f"check    hiermem verify {out} {check} --against {folder}", style="dim", markup=False, soft_wrap=True
    )


def _lines(manifest: dict, receipt: dict) -> list[str]:
    anchor, files, measured = manifest["anchor"], manifest["files"], receipt["measured"]

    def total(start: str) -> str:
        return size(sum(row["bytes"] for name, row in files.items() if name.startswith(start)))

    weights = ", ".join(f"{count} weights {form}" for form, count in anchor["compression"].items())
    found = (
        f"KL {measured['kl']:.1e}, {measured['agreement']:.1%} of choices the same on {measured['tokens']} tokens"
    )
    name, peak = next(iter(receipt["overflow"]["peaks"].items()))
    lines = [
        f"anchor   {anchor['architecture']}, {total(anchor['package'])}, context {anchor['context']}, {weights}",
        f"measured {found}",
        f"largest  {peak:.0f} of the {receipt['overflow']['limit']:.0f} that float16 holds, in {name}",
    ]
    if manifest["bank"]:
        blocks = sum(name.startswith("bank/blocks/") for name in files)
        left = len(manifest["bank"]["download"])
        lines.append(f"bank     {blocks} blocks, {total('bank/')}" + (f"; {left} to download" if left else ""))
        if any(name.startswith("bank/sources/") for name in files):
            lines.append(f"sources  {total('bank/sources/')}")
        lines.append(f"routing  {total('retriever')}")
    return [*lines, f"together {total('')}"]
