"""`hiermem demo`: what a bank is for, on real weights: questions without memory, with it, and with its source."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from mlx_hiermem.apps.cli.display import FAR, NOT_SAID, console, notes, progress_bar, several, size, waiting
from mlx_hiermem.printable import printable

if TYPE_CHECKING:
    from rich.text import Text

    from mlx_hiermem.apps.demo.exam import ExamQuestion
    from mlx_hiermem.model import MemoryModel

WIDEST, GAP = 120, 1  # of the four columns together, and between two

# What the memories are called, in the order of the table.
CALLED = {
    "none": "no memory",
    "generic": "generic block",
    "fetched": "fetched",
    "oracle": "the right leaf",
    "source": "source alone",
    "fetched+source": "fetched + source",
}


def demo(
    full: bool = typer.Option(False, "--full", help="Ask the other 720 questions again (an hour or so)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
    chat: bool = typer.Option(True, help="Offer a chat at the end, in a terminal."),
) -> None:
    """A tour on real weights: SmolLM2 asked about 480 articles of Wikipedia, without and with its bank of them.

    Example: `hiermem demo`
    """
    from mlx_hiermem.apps.demo import exam, tour
    from mlx_hiermem.model_folder import load

    folder = tour.prepare(lambda line: notes.print(line, style="dim", markup=False))
    model = load(folder)
    if full:
        with progress_bar("asking", unit="questions", show=not as_json) as progress:
            result = exam.measured(model, exam.questions()[exam.DEVELOPMENT :], progress)
        console.print_json(json.dumps({"exam": result})) if as_json else _print_exam(result, "measured now")
        return
    if as_json:
        rows = [{"topic": one.topic, "question": one.text} | _asked(model, one) for one in exam.sample()]
        console.print_json(json.dumps({"questions": rows, "exam": exam.stored()}, ensure_ascii=False))
        return
    _print_beginning(model)
    for question in exam.sample():
        with waiting(f"asking about {question.topic}"):
            answers = _asked(model, question)
        _print_question(question, answers)
    _print_exam(exam.stored(), "stored; `hiermem demo --full` asks all 720")
    console.print(f"The model is in {folder}", style="dim", markup=False, soft_wrap=True)
    if chat and sys.stdin.isatty() and sys.stdout.isatty():
        _offer_chat(model)


def _asked(model: MemoryModel, question: ExamQuestion) -> dict[str, Any]:
    """A question's answers with each memory."""
    from mlx_hiermem.apps.demo.exam import MEMORIES

    return {memory: question.asked(model, memory) for memory in MEMORIES}


def _print_beginning(model: MemoryModel) -> None:
    from rich.text import Text

    from mlx_hiermem.apps.demo.exam import MEMORIES

    assert model.bank is not None
    totals, fetched = model.bank.manifest.totals(), model.bank.config.fetched_parameters / 1e6
    console.print(
        f"SmolLM2-135M-Instruct and a bank of {several(totals['blocks'], 'block')} on disk "
        f"({totals['parameters'] / 1e6:.1f} M parameters, {size(totals['bytes'])}), of which a question fetches "
        f"{fetched:.2f} M.\nAsked in chat, a question of each topic. [green]✓[/]: the reply has the answer.\n"
    )
    _print_columns([Text(f"  {CALLED[memory]}", style="dim") for memory in MEMORIES])


def _print_question(question: ExamQuestion, answers: dict[str, Any]) -> None:
    """What was asked, the replies beside each other, and what was fetched for them."""
    from rich.text import Text

    console.print(Text.assemble((question.topic, "bold"), f"  {question.text} ", (f"({question.names[0]})", "dim")))
    marks = [("✓ ", "green") if one["lenient"] else ("✗ ", "red") for one in answers.values()]
    replies = [_cut(printable(one["reply"]), question.names, _width() - 2) for one in answers.values()]
    _print_columns([Text.assemble(mark, reply) for mark, reply in zip(marks, replies, strict=True)])
    console.print(f"  {_where(answers['fetched'])}", style="dim", markup=False, no_wrap=True, overflow="ellipsis")


def _where(fetched: dict[str, Any]) -> str:
    """`3.1 coast, bay, gulf · 1.1 MB in 43 ms · from Caribbean Sea`: what was fetched, and what says the answer."""
    selection, source = fetched["selection"], fetched["source"]
    if not selection["path"]:
        return FAR
    took = sum(selection[f"{step}_ms"] for step in ("route", "fetch", "attach"))
    said = f"from {source['title']}" if source else NOT_SAID
    return (
        f"{selection['path']} {selection['labels'][-1]} · {size(selection['bytes_read'])} in {took:.0f} ms · {said}"
    )


def _print_columns(cells: list[Text]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, GAP, 0, 0))
    for _ in cells:
        grid.add_column(width=_width(), no_wrap=True, overflow="ellipsis")
    grid.add_row(*cells)
    console.print(grid)


def _width() -> int:
    """Of one of the four columns."""
    return min(console.width, WIDEST) // 4 - GAP


def _cut(reply: str, names: tuple[str, ...], width: int) -> str:
    """A reply that is too long, from so far on that the answer in it is seen."""
    ends = [found + len(name) for name in names if (found := reply.casefold().find(name.casefold())) >= 0]
    hidden = min(ends, default=0) - width + 2
    return reply if len(reply) <= width or hidden <= 0 else "…" + reply[hidden:]


def _print_exam(result: dict[str, Any], origin: str) -> None:
    """The table of right answers; the interval is that of 95 %."""
    from rich.table import Table

    table = Table("", "has the answer", "is the answer", box=None, header_style="dim", pad_edge=False)
    for memory, row in result.items():
        shares = [
            f"{row[rule]['share']:5.1%}  ({row[rule]['interval'][0]:.0%} to {row[rule]['interval'][1]:.0%})"
            for rule in ("lenient", "strict")
        ]
        table.add_row(CALLED[memory], *shares, style="bold" if memory == "fetched" else None)
    count = next(iter(result.values()))["questions"]
    console.print(f"\nOf {count} other questions, the reply ({origin}):", soft_wrap=True)
    console.print(table)


def _offer_chat(model: MemoryModel) -> None:
    from mlx_hiermem.apps.cli.chat import talk
    from mlx_hiermem.session import Session

    console.print("\nNow ask it yourself, for instance: What is the capital of Laos?")
    talk(Session(model, max_tokens=128))
