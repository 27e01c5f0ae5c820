"""`hiermem plan`: what of a model fits on a device, and how long fetching its memories would take there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, size

if TYPE_CHECKING:
    from mlx_hiermem.plan import Device, Disk, Plan


FIGURES = {
    "memory": ("memory", "{:g} GB"),
    "program_share": ("for one program", "{:.1%}"),
    "storage": ("storage", "{:g} MB/s"),
    "access": ("a file", "{:g} ms"),
    "bandwidth": ("bandwidth", "{:g} GB/s"),
}


def plan(
    first_word: str = typer.Argument("", metavar="MODEL", help="The model; nothing large is downloaded for it."),
    model: str = models.MODEL,
    device: str = typer.Option("", help="One device of --list. Default: a line for each."),
    disk: str = typer.Option("", help="An external disk of --list, where the bank lies."),
    context: list[int] | None = typer.Option(
        None, min=1, help="Context length in tokens; may be given several times."
    ),
    show_list: bool = typer.Option(False, "--list", help="Show the devices and where their figures come from."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Say what fits on a device: anchor, levels in memory, cache, KV at a context length, fetch times.

    Example: `hiermem plan my-model --device iphone-15`
    """
    from mlx_hiermem import plan as plans

    if show_list:
        _show_devices([*plans.devices().values(), *plans.disks().values()], as_json)
        return
    wanted = [plans.device(name, disk) for name in ([device] if device else plans.devices())]
    measured = plans.measure(models.chosen(first_word, model))
    results = [plans.plan(measured, one, context or plans.CONTEXTS) for one in wanted]
    if as_json:
        data = [result.to_json() for result in results]
        console.print_json(json.dumps(data[0] if device else data, ensure_ascii=False))
    elif device:
        _show(results[0])
        if context and max(context) > measured.max_context:
            console.print(f"The anchor was made for no more than {measured.max_context} tokens.", style="dim")
    else:
        _compare(results)


def _show_devices(devices: Sequence[Device | Disk], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        console.print_json(json.dumps([asdict(device) for device in devices], ensure_ascii=False))
        return
    from rich.table import Table

    table = Table("device", "figure", "", "basis", box=None, header_style="dim")
    table.add_column("source", overflow="fold")  # an address must stay whole
    for device in devices:
        figures = [(*FIGURES[key], getattr(device, key)) for key in FIGURES if hasattr(device, key)]
        for number, (what, shown, figure) in enumerate(figures):
            value = shown.format(figure.value)
            table.add_row("" if number else device.name, what, value, figure.basis, figure.source)
    console.print(table)


def _compare(results: list[Plan]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="dim")
    for header in ("device", "fits", "left", "levels"):
        table.add_column(header, no_wrap=True)
    for header in ("cold", "warm", "at most"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        first = result.fetches[0] if result.fetches else None
        table.add_row(
            result.device.name,
            "[green]yes[/]" if result.fits else "[red]no[/]",
            _signed(result.contexts[0].left_bytes),
            f"{result.pinned_levels} of {len(result.model.levels)}" if result.model.levels else "",
            _ms(first.cold_ms) if first else "",
            _ms(first.warm_ms) if first else "",
            f"{result.tokens_per_second:.0f} tokens/s",
        )
    console.print(table)
    tokens = results[0].contexts[0].tokens
    console.print(f"\nleft at {tokens} tokens of context · levels of the bank that fit whole", style="dim")
    console.print("cold, warm: fetching a path from storage, from memory · at most: by bandwidth", style="dim")
    console.print("Computed from the table's figures, not measured: `hiermem plan --list`", style="dim")


def _show(result: Plan) -> None:
    device, model = result.device, result.model
    figures = [
        f"{device.memory.value:g} GB of memory, "
        f"{size(device.usable)} for one program ({device.program_share.basis})",
        f"storage {device.storage.value:g} MB/s ({device.storage.basis})",
        f"bandwidth {device.bandwidth.value:g} GB/s ({device.bandwidth.basis})",
    ]
    console.print(device.title, style="bold", markup=False)
    console.print(" · ".join(figures), style="dim", markup=False, soft_wrap=True)
    console.print()
    _show_memory(result)
    if model.has_bank:
        _show_levels(result)
        _show_fetches(result)
    console.print(f"\nat most {result.tokens_per_second:.0f} tokens/s, from the bandwidth", markup=False)
    console.print(f"on disk {size(model.anchor_bytes + model.bank_bytes)} and the tree", markup=False)
    console.print(
        "Computed from the table's figures, not measured: `hiermem plan --list`", style="dim", markup=False
    )


def _show_memory(result: Plan) -> None:
    from rich.table import Table

    model = result.model
    parts = [("anchor", model.anchor_bytes), ("program", model.program_bytes)]
    if model.has_bank:
        level_1 = model.levels[0]
        parts += [("embedder", model.embedder_bytes), (f"level 1, all {level_1.blocks} blocks", level_1.bytes)]
        parts += [("one path, attached", model.path_bytes)]
    table = Table("always in memory", box=None, header_style="dim")
    table.add_column("", justify="right")
    for what, count in parts:
        table.add_row(what, size(count))
    table.add_row("together", size(result.fixed_bytes), style="bold")
    console.print(table)
    console.print()
    table = Table("context", "KV cache", "left", box=None, header_style="dim")
    if model.has_bank:
        table.add_column("cached paths", justify="right")
    for row in result.contexts:
        colour = "green" if row.left_bytes >= 0 else "red"
        cells = [f"{row.tokens} tokens", size(row.kv_bytes), f"[{colour}]{_signed(row.left_bytes)}[/]"]
        table.add_row(*cells, *([_paths(row.paths, model.paths)] if model.has_bank else []))
    console.print(table)


def _show_levels(result: Plan) -> None:
    from rich.table import Table

    console.print()
    table = Table("level", "blocks", "a block", "all", "", box=None, header_style="dim")
    for level in result.model.levels:
        where = "in memory" if level.level <= result.pinned_levels else "on disk, cached as needed"
        if not level.blocks:
            where = ""
        table.add_row(str(level.level), str(level.blocks), size(level.block_bytes), size(level.bytes), where)
    console.print(table)


def _show_fetches(result: Plan) -> None:
    from rich.table import Table

    console.print()
    table = Table("fetch", "files", "bytes", box=None, header_style="dim")
    for header in ("cold", "warm"):
        table.add_column(header, justify="right")
    for fetch in result.fetches:
        table.add_row(fetch.what, str(fetch.files), size(fetch.bytes), _ms(fetch.cold_ms), _ms(fetch.warm_ms))
    console.print(table)
    pinned = result.pinned_levels
    kept = "nothing" if not pinned else "level 1" if pinned == 1 else f"levels 1–{pinned}"
    console.print(f"\na new topic: {_ms(result.topic_ms)} with {kept} in memory")
    console.print(f"the same bytes from a flat bank: {_ms(result.flat_ms)}")


def _paths(cached: int, total: int) -> str:
    return f"all {total}" if cached >= total else f"{cached} of {total}"


def _ms(time: float) -> str:
    return f"{time:.1f} ms" if time >= 1 else f"{time:.2f} ms"


def _signed(count: int) -> str:
    return size(count) if count >= 0 else f"{size(-count)} too much"
