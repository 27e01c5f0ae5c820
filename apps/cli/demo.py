"""`hiermem demo`: the main job on real weights, seen side by side: no memory, generic memory, fetched memory."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from mlx_hiermem.apps.cli.display import console, notes, progress_bar, size

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_hiermem.apps.demo.evaluate import Element
    from mlx_hiermem.model import MemoryModel


def demo(
    full: bool = typer.Option(False, "--full", help="Ask about all 118 elements, in all ways (some minutes)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of tables."),
    chat: bool = typer.Option(True, help="Offer a chat at the end, in a terminal."),
) -> None:
    """A tour on real weights: SmolLM2 asked for atomic numbers, and back, without and with its elements bank.

    Example: `hiermem demo`
    """
    from mlx_hiermem.apps.demo import evaluate, tour
    from mlx_hiermem.model_folder import load

    folder = tour.prepare(lambda line: notes.print(line, style="dim", markup=False))
    model = load(folder)
    if full:
        with progress_bar("asking", unit="questions", show=not as_json) as progress:
            counts = evaluate.evaluate(model, progress)
        _print_counts(counts, as_json, "measured now")
        return
    rows = [_ask(model, question) for question in evaluate.sample()]
    counts = evaluate.stored()["elements"]
    if as_json:
        console.print_json(json.dumps({"questions": rows, "elements": counts}, ensure_ascii=False))
        return
    _print_tour(model, rows)
    console.print(f"The model is in {folder}", style="dim", markup=False, soft_wrap=True)
    _print_counts(counts, False, "stored; `hiermem demo --full` measures it again")
    if chat and sys.stdin.isatty() and sys.stdout.isatty():
        _offer_chat(model)


def _ask(model: MemoryModel, question: Element) -> dict[str, Any]:
    """An element's number, and the element of the number, under each memory."""
    from mlx_hiermem.apps.demo.evaluate import MEMORIES, answer, is_right, named

    row: dict[str, Any] = {"element": question.name, "prompt": question.prompt, "number": question.number}
    row["back"] = {"prompt": question.back}
    for way in MEMORIES:
        got, text = answer(model, question.prompt, way)
        speed = round(model.response.tokens_per_second, 1) if model.response else 0.0
        row[way] = {"answer": got, "text": " ".join(text.split()), "tokens_per_second": speed}
    row["selection"] = model.selection.to_json()
    for way in MEMORIES:
        said = named(model, question.back, way)
        row["back"][way] = {"answer": said, "right": is_right(said, question, back=True)}
    return row


def _print_tour(model: MemoryModel, rows: list[dict[str, Any]]) -> None:
    from mlx_hiermem.apps.demo.evaluate import MEMORIES

    assert model.bank is not None
    memory, totals = model.bank.config, model.bank.manifest.totals()
    on_disk, fetched_each = totals["parameters"] / 1e6, memory.fetched_parameters / 1e6
    console.print(
        f"SmolLM2-135M-Instruct and a bank of {totals['blocks']} blocks: {on_disk:.2f} M parameters on disk "
        f"({size(totals['bytes'])}),\n{fetched_each:.2f} M of them fetched for a question. Asked: "
        "“The atomic number of … is”, and back:\n“The element with atomic number … is”\n",
        soft_wrap=True,
    )
    columns = ("no memory", "generic memory", "fetched memory")
    answers, back = _table("element", "number", *columns), _table("number", "element", *columns)
    fetched = _table("element", "path", "read", "route", "fetch", "attach ms", "tokens/s")
    topics: dict[str, str] = {}
    for row in rows:
        name, number = row["element"], str(row["number"])
        texts = [_marked(row[way]["text"], row[way]["answer"] == row["number"]) for way in MEMORIES]
        answers.add_row(name, number, *texts)
        back.add_row(
            number, name, *(_marked(row["back"][way]["answer"], row["back"][way]["right"]) for way in MEMORIES)
        )
        selection = row["selection"]
        topics[selection["path"]] = " › ".join(selection["labels"])
        fetched.add_row(
            name,
            selection["path"],
            size(selection["bytes_read"]),
            *(f"{selection[f'{step}_ms']:.1f}" for step in ("route", "fetch", "attach")),
            " ".join(f"{row[way]['tokens_per_second']:.0f}" for way in MEMORIES),
        )
    console.print(answers)
    console.print()
    console.print(back)
    console.print(
        "\nWhat was fetched for the first, and tokens per second in the three ways (of very short answers):\n",
        style="dim",
    )
    console.print(fetched)
    console.print()
    for path, labels in sorted(topics.items()):
        console.print(f"{path}  {labels}", style="dim", markup=False, soft_wrap=True)
    console.print()


def _table(*headers: str) -> Table:
    from rich.table import Table

    return Table(*headers, box=None, header_style="dim", pad_edge=False)


def _marked(text: str, right: bool) -> str:
    colour, mark = ("green", "✓") if right else ("red", "✗")
    return f"[{colour}]{mark}[/] {text[:20]}"


def _print_counts(counts: dict[str, Any], as_json: bool, origin: str) -> None:
    if as_json:
        console.print_json(json.dumps({"elements": counts}))
        return
    total, back = counts["total"], counts["back"]
    console.print(
        f"Of all {total} elements: no memory {counts['none']}, generic {counts['generic']}, "
        f"[bold]fetched {counts['fetched']}[/]; in unseen wordings {counts['paraphrased']}, "
        f"in chat {counts['chat']}\nand back: no memory {back['none']}, generic {back['generic']}, "
        f"[bold]fetched {back['fetched']}[/]; in an unseen wording {back['paraphrased']}  ({origin})",
        soft_wrap=True,
    )


def _offer_chat(model: MemoryModel) -> None:
    from mlx_hiermem.apps.cli.chat import talk
    from mlx_hiermem.session import Session

    console.print("\nNow ask it yourself, for instance: What is the atomic number of gallium?")
    talk(Session(model, max_tokens=128))
