"""`hiermem ask`, in short `hiermem "question"`, and `hiermem route`: one answer, and the path that a text takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from mlx_hiermem.apps.cli import models, sampling
from mlx_hiermem.apps.cli.display import (
    FAR,
    blocked_note,
    console,
    describe,
    notes,
    renamed,
    size,
    source_line,
    utf8,
    write,
)

if TYPE_CHECKING:
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.model import MemoryModel
    from mlx_hiermem.session import Session
    from mlx_hiermem.tree import Route


def ask(
    question: list[str] = typer.Argument(
        ..., help="The question; `hiermem ask` may be left out before one in quotes. `-` reads standard input."
    ),
    model: str = models.MODEL,
    memory: str = models.MEMORY,
    plain: bool = typer.Option(
        False, "--plain", help="Continue the text as it stands, and do not put it as a question."
    ),
    max_tokens: int = typer.Option(256, "--max-tokens", "-n", min=1, help="Longest answer, in tokens."),
    temperature: float = sampling.TEMPERATURE,
    top_p: float = sampling.TOP_P,
    top_k: int = sampling.TOP_K,
    min_p: float = sampling.MIN_P,
    repetition_penalty: float = sampling.REPETITION_PENALTY,
    presence_penalty: float = sampling.PRESENCE_PENALTY,
    frequency_penalty: float = sampling.FREQUENCY_PENALTY,
    chat_template_args: str = sampling.TEMPLATE,
    kv_bits: int | None = sampling.KV_BITS,
    kv_group_size: int = sampling.KV_GROUP_SIZE,
    quantized_kv_start: int = sampling.QUANTIZED_KV_START,
    seed: int = typer.Option(0, help="Seed of the sampler."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Answer one question and exit.

    Example: `hiermem "What is the capital of Laos?"`

    Example: `hiermem ask --plain -m my-model "The capital of Laos is" -n 8`
    """
    import mlx.core as mx

    from mlx_hiermem.session import Session

    drawn = sampling.changed(locals())
    text, template = _text(question), sampling.template_args(chat_template_args)
    name = model or models.preferred()
    loaded = models.open_model(name)
    mx.random.seed(seed)
    if not as_json:
        models.show_which(name, loaded)
    reply: Iterator[str]
    session = None  # where questions cannot be put the text is continued as it stands
    if not plain and loaded.can_chat:
        session = Session(loaded, memory, max_tokens=max_tokens, template=template, **drawn)
        reply = session.ask(text)
    else:
        reply = loaded.stream(text, memory=memory or None, max_tokens=max_tokens, **drawn)
    pieces = []
    for piece in reply:
        pieces.append(piece)
        if not as_json:
            write(piece)
    figures = _figures(loaded, session)
    if as_json:
        said = loaded.response.sources if loaded.response else None
        found = None if said is None else [source.to_json() for source in said]
        result: dict[str, Any] = {
            "text": "".join(pieces),
            "model": name,
            "selection": loaded.selection.to_json(),
            "sources": found,
        }
        result |= figures
        console.print_json(json.dumps(result, ensure_ascii=False))
        return
    console.print()
    line = f"{describe(loaded.selection)} · {figures['tokens_per_second']} tokens/s"
    notes.print(line, style="dim", markup=False, soft_wrap=True)
    if loaded.response and (line := source_line(loaded.response.sources)):
        notes.print(line, style="dim", markup=False, soft_wrap=True)


def _text(words: list[str]) -> str:
    return utf8(sys.stdin.read() if words == ["-"] else " ".join(words))


def _figures(model: MemoryModel, session: Session | None) -> dict[str, float]:
    """Of the last answer; a session has them of its own."""
    if session is not None:
        last = session.last
        count, speed = (last.generation_tokens, last.generation_tps) if last else (0, 0.0)
    else:
        last = model.response
        count, speed = (last.generation_tokens, last.tokens_per_second) if last else (0, 0.0)
    prompt = last.prompt_tokens if last else 0
    return {"prompt_tokens": prompt, "generated_tokens": count, "tokens_per_second": round(speed, 1)}


def generate(
    model: str = typer.Argument(..., help=models.HELP),
    prompt: str = typer.Argument(..., help="The text to continue; `-` reads it from standard input."),
    memory: str = models.MEMORY,
    chat: bool = typer.Option(False, "--chat", help="Ask in the anchor's chat template."),
    max_tokens: int = typer.Option(128, "--max-tokens", "-n", min=1),
    temperature: float = typer.Option(0.0, "--temperature", "-t", min=0.0),
    seed: int = typer.Option(0),
    as_json: bool = typer.Option(False, "--json"),
) -> None:
    """The earlier name of `hiermem ask --plain`."""
    renamed("hiermem generate MODEL PROMPT", "hiermem ask --plain -m MODEL PROMPT")
    options: dict[str, Any] = dict(sampling.NEUTRAL, temperature=temperature, chat_template_args="")
    ask([prompt], model, memory, not chat, max_tokens, seed=seed, as_json=as_json, **options)


WORDS = typer.Argument(..., metavar="TEXT", help="The text to route; `-` reads standard input.")


def route(
    words: list[str] = WORDS,
    model: str = models.MODEL,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
) -> None:
    """Show the path a text takes: distances, labels, blocks and bytes. The anchor is not loaded.

    Example: `hiermem route -m my-model "Which gas glows red in signs?"`
    """
    from mlx_hiermem.router import Router

    name, rest = models.split(words, model, lambda word: len(words) > 1 and models.is_model_folder(word))
    text, bank = _text(rest), models.open_bank(name)
    taken = Router.of_bank(bank).route(text)
    rows = _nodes(bank, taken)
    if as_json:
        result: dict[str, Any] = {
            "path": str(taken.path),
            "milliseconds": round(taken.milliseconds, 2),
            "nodes": rows,
            "avoided": [str(node) for node in taken.avoided],
            "far": taken.far,
        }
        console.print_json(json.dumps(result, ensure_ascii=False))
        return
    if taken.far:
        console.print(f"{FAR} (`hiermem bank reach` shows how far it reaches)", markup=False)
        return
    _print_nodes(rows)
    for node in taken.avoided:
        console.print(blocked_note(bank, node), style="dim", markup=False)
    total = sum(row["bytes"] for row in rows)
    console.print(f"path {taken.path} · {size(total)} to fetch · {taken.milliseconds:.1f} ms", style="dim")


def bank_path(
    words: list[str] = WORDS, model: str = models.MODEL, as_json: bool = typer.Option(False, "--json")
) -> None:
    """The earlier name of `hiermem route`."""
    renamed("hiermem bank path", "hiermem route")
    route(words, model, as_json)


def _nodes(bank: MemoryBank, taken: Route) -> list[dict[str, Any]]:
    """What there is to say of each node on a path."""
    rows = []
    for node, distance in zip(taken.path.prefixes(), taken.distances, strict=True):
        entry = bank.manifest.blocks.get(node)
        rows.append(
            {
                "node": str(node),
                "label": bank.manifest.label(node),
                "distance": round(distance, 4),
                "bytes": entry.bytes if entry else 0,
                "documents": entry.documents if entry else 0,
            }
        )
    return rows


def _print_nodes(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("node", "distance", "label", "documents", "block", box=None, header_style="dim")
    for row in rows:
        block = size(row["bytes"]) if row["bytes"] else "none"
        table.add_row(row["node"], f"{row['distance']:.3f}", Text(row["label"]), str(row["documents"]), block)
    console.print(table)
