"""The commands of `hiermem bank` that write another bank: of two, in fewer bits, or without a part."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, progress_bar, several, size

if TYPE_CHECKING:
    from mlx_hiermem.bank.quantize import LevelReport


def merge(
    first: str = typer.Argument(..., help="A model, or a bank's folder."),
    second: str = typer.Argument(..., help="Another, of the same anchor and tree."),
    out: pathlib.Path = typer.Argument(..., help="The bank's folder to make."),
    prefer: str = typer.Option("", help="first or second: whose blocks count where both have one."),
    resume: bool = typer.Option(False, "--resume", help="Go on after an interruption."),
) -> None:
    """Make one bank of two that were trained for the same anchor, on different parts of the same tree.

    Example: `hiermem bank merge model-a model-b merged-bank`
    """
    from mlx_hiermem.bank import merge as merging

    if prefer not in ("", "first", "second"):
        raise typer.BadParameter("choose first or second", param_hint="--prefer")
    banks = models.open_bank(first), models.open_bank(second)
    with progress_bar("merging") as progress:
        merged = merging.merge(*banks, out, prefer, resume, progress)
    totals = merged.manifest.totals()
    console.print(
        f"written  {out}: {several(totals['blocks'], 'block')}, {size(totals['bytes'])}",
        markup=False,
        soft_wrap=True,
    )
    console.print("To use it, make it the bank/ beside that anchor.", style="dim")


def quantize(
    words: list[str] = typer.Argument(
        ..., metavar="[MODEL] OUT", help="OUT: folder to make, a model where MODEL is one, else a bank."
    ),
    model: str = models.MODEL,
    bits: str = typer.Option(
        ..., help="8, 4 or 2 for all levels, or level by level: 8,4 is level 1 in 8 bits, all below in 4. 16 keeps."
    ),
    group_size: int | None = typer.Option(
        None, help="Values that share a scale: 32, 64 or 128. Default: 64, or 32 where the memory's widths need it."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on after an interruption."),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list instead of a table."),
) -> None:
    """Write the bank again with smaller blocks (MLX's affine quantisation), and say what each level loses.

    Example: `hiermem bank quantize my-model my-model-8bit --bits 8`
    """
    from mlx_hiermem.bank import quantize as quantizing
    from mlx_hiermem.config import GROUP_SIZES
    from mlx_hiermem.convert.rewrite import quantize_model

    if group_size not in (None, *GROUP_SIZES):
        raise typer.BadParameter("choose 32, 64 or 128", param_hint="--group-size")
    name, target = models.last_word(words, model, "OUT")
    folder, bank, out = models.folder_of(name), models.open_bank(name), pathlib.Path(target)
    config = quantizing.design(bank.config, _parse(bits), group_size)
    with progress_bar("quantising", show=not as_json) as progress:
        if (folder / "anchor").is_dir():
            reports = quantize_model(folder, out, config, resume, progress)
        else:
            reports = quantizing.quantize(bank, out, config, resume, progress)
    if as_json:
        console.print_json(json.dumps([report.to_json() for report in reports]))
        return
    _print(reports, next(level.group_size for level in config.quantization if level))
    console.print(f"written  {out}", markup=False, soft_wrap=True)


def export(
    words: list[str] = typer.Argument(
        ..., metavar="[MODEL] OUT", help="OUT: folder to make, a model where MODEL is one, else a bank."
    ),
    model: str = models.MODEL,
    without: list[str] = typer.Option(
        ..., help="A subtree: a path such as 2.1, or a word of a label. May be given several times."
    ),
    sources: bool = typer.Option(True, "--sources/--no-sources", help="With the texts of the leaves that stay."),
    resume: bool = typer.Option(False, "--resume", help="Go on after an interruption."),
    as_json: bool = typer.Option(False, "--json", help="Print the receipt as JSON instead of text."),
) -> None:
    """Write a copy to share, without some subtrees, and a receipt of what is not in it.

    The receipt is `without.json` in the bank; `hiermem bank verify` of the copy checks it. The texts that `hiermem
    learn` keeps to learn on stay behind.

    Example: `hiermem bank export my-model to-share --without 3.1`
    """
    from mlx_hiermem.bank.subset import export as write
    from mlx_hiermem.convert.rewrite import rewrite
    from mlx_hiermem.share.pull import find

    name, target = models.last_word(words, model, "OUT")
    folder, bank, out = models.folder_of(name), models.open_bank(name), pathlib.Path(target)
    nodes = find(bank.manifest, without)
    with progress_bar("copying", show=not as_json) as progress:
        if (folder / "anchor").is_dir():
            receipt = rewrite(
                folder, out, lambda bank, out: write(bank, out, nodes, sources, resume, progress), resume
            )
        else:
            receipt = write(bank, out, nodes, sources, resume, progress)
    if as_json:
        console.print_json(json.dumps(receipt.to_json()))
        return
    left, texts = size(sum(block.bytes for block in receipt.blocks)), several(receipt.windows, "window")
    console.print(
        f"left out {', '.join(receipt.nodes)}: {several(len(receipt.blocks), 'block')}, {left}, {texts}",
        markup=False,
    )
    console.print(f"written  {out}", markup=False, soft_wrap=True)
    console.print(
        f"These have seen the same texts, and may hold something of them: {', '.join(receipt.may_retain)}.",
        style="dim",
        markup=False,
    )


def _parse(bits: str) -> list[int]:
    from mlx_hiermem.bank.quantize import KEPT
    from mlx_hiermem.config import BITS

    parts = bits.replace(" ", "").split(",")
    if not all(part.isdecimal() and int(part) in (*BITS, KEPT) for part in parts):
        raise typer.BadParameter("write 8, 4 or 2, or one of these and 16 for each level: 8,4", param_hint="--bits")
    return [int(part) for part in parts]


def _print(reports: list[LevelReport], group: int) -> None:
    from rich.table import Table

    table = Table("level", box=None, header_style="dim")
    for header in ("blocks", "bits", "before", "after", "largest error", "mean error"):
        table.add_column(header, justify="right", no_wrap=True)
    for report in reports:
        how, errors = report.quantization, (report.largest_error, report.mean_error)
        cells = [str(how.bits), *(f"{error:.2%}" for error in errors)] if how else ["kept", "", ""]
        sizes = size(report.bytes_before), size(report.bytes_after)
        table.add_row(str(report.level or "generic"), str(report.blocks), cells[0], *sizes, *cells[1:])
    before, after = sum(report.bytes_before for report in reports), sum(report.bytes_after for report in reports)
    table.add_row("all", str(sum(report.blocks for report in reports)), "", size(before), size(after))
    console.print(table)
    console.print(
        f"{group} values share a scale and a bias. Errors: ‖new − old‖ / ‖old‖ of each layer's matrices.",
        style="dim",
    )
