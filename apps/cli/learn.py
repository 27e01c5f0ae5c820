"""`hiermem learn`: documents become a model with a memory bank."""

from __future__ import annotations

import json
import pathlib
import re
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli.display import console, notes, parse_size, renamed, several, size
from mlx_hiermem.apps.cli.learn_screen import duration, screen_for

if TYPE_CHECKING:
    from mlx_hiermem.learn.run import AnchorSource, Learnt

GO_ON = "What was learnt is kept: the same command goes on from there."
DEFAULTS = "Chosen by the corpus' size."


def learn(
    docs: list[str] = typer.Argument(
        ..., help="Folders and files (.txt .md .html .pdf .jsonl), or hf://owner/name."
    ),
    out: pathlib.Path = typer.Argument(..., help="Folder of the model to make."),
    anchor: str = typer.Option("SmolLM2", "--anchor", "-a", help="Model folder or hub id, or what convert takes."),
    field: str = typer.Option("text", help="Field of a .jsonl line that holds the text."),
    title: str = typer.Option("", help="Field that holds its title. Default: title, name, heading or subject."),
    tokens: int = typer.Option(192, min=16, max=240, help="Length of the windows that documents are cut into."),
    any_language: bool = typer.Option(False, "--any-language", help="Learn a corpus that is not in English, too."),
    branching: int = typer.Option(0, min=0, help=f"Children of a node. {DEFAULTS}"),
    depth: int = typer.Option(0, min=0, help=f"Levels of the tree. {DEFAULTS}"),
    leaves: int = typer.Option(2, min=1, help="Leaves in which one window is learnt, at most."),
    kind: str = typer.Option("ffn", help="Kind of memory: ffn, lora-qk, lora-vo, lora-ffn or kv."),
    memory: str = typer.Option("", "--memory", hidden=True),
    sizes: str = typer.Option(
        "", help="Units of a block at each level, such as 24,8. Default: 8, threefold upwards."
    ),
    layers: str = typer.Option("late", help="Layers with memory: uniform, early, middle, late, or such as 20-29."),
    objective: str = typer.Option("next-token", help="next-token or distillation (of answers from self-study)."),
    epochs: int = typer.Option(0, min=0, help=f"How often each text is learnt. {DEFAULTS}"),
    rate: float = typer.Option(6e-3, min=0.0, help="Learning rate at its highest."),
    teacher: str = typer.Option(
        "", help="Who writes the questions of self-study: a model of mlx-lm. Default: the anchor."
    ),
    self_study: bool = typer.Option(
        True, "--self-study/--no-self-study", help="Have questions and answers written about the documents, too."
    ),
    heldout: float = typer.Option(0.0, min=0.0, max=0.5, help="Share of the windows that only measure."),
    questions: pathlib.Path | None = typer.Option(
        None, help="Questions to measure the routing by: a JSON line each, with question and document."
    ),
    prompts: pathlib.Path | None = typer.Option(
        None, help="Prompts of your own to learn: a JSON line each, with document, prompt and completion."
    ),
    cache: str = typer.Option(
        "20G", help="Disk for what the anchor computes again and again: 500M, 20G. Less is slower."
    ),
    licence: str = typer.Option("", help="Of the documents, for the bank's manifest."),
    seed: int = typer.Option(0, help="Of everything that is drawn at random."),
    keep: bool = typer.Option(False, "--keep", help="Keep the work folder OUT.learn."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object in the end instead of text."),
) -> None:
    """Learn documents: a tree of their topics, and a block of memory for each. Run again, it goes on.

    Example: `hiermem learn ./docs my-model --anchor SmolLM2`
    """
    from mlx_hiermem.errors import HierMemError
    from mlx_hiermem.evaluate.questions import read_questions
    from mlx_hiermem.learn import run
    from mlx_hiermem.learn.settings import (
        CorpusSettings,
        LearnSettings,
        MemorySettings,
        TrainingSettings,
        TreeSettings,
    )
    from mlx_hiermem.learn.study.prompts import read_prompts

    if memory:
        renamed("--memory KIND", "--kind KIND")
    units = _numbers(sizes, "--sizes") if sizes else ()
    asked = read_questions(questions, documents=True) if questions else []
    settings = LearnSettings(
        CorpusSettings(field, title, tokens, any_language),
        TreeSettings(branching, depth or len(units), leaves, seed=seed),
        MemorySettings(memory or kind, units, _layers(layers)),
        self_study=self_study,
        teacher=teacher,
        heldout=heldout,
        training=TrainingSettings(
            epochs=epochs,
            rate=rate,
            objective=objective,
            seed=seed,
            states_bytes=parse_size(cache, "--cache"),
        ),
        questions=tuple((one.prompt, one.document) for one in asked),
        prompts=read_prompts(prompts) if prompts else (),
        licence=licence,
        keep=keep,
    )
    try:
        with screen_for(not as_json and _is_first()) as screen:
            learnt = run.learn(docs, out, lambda: find_anchor(anchor), settings, screen)
    except KeyboardInterrupt as error:
        raise HierMemError("stopped", GO_ON) from error
    if learnt and as_json:
        console.print_json(json.dumps(learnt.to_json()))
    elif learnt:
        _print(out, learnt)


def find_anchor(name: str) -> AnchorSource:
    """An anchor by its name: one that the project knows, a memory model's, or a checkpoint that is converted."""
    from mlx_hiermem import assets
    from mlx_hiermem.convert.pipeline import convert
    from mlx_hiermem.convert.source import find_source
    from mlx_hiermem.learn.run import AnchorSource

    folder = pathlib.Path(name)
    if (folder / "anchor").is_dir():
        return AnchorSource.of(folder)
    known = re.fullmatch(r"smollm2(-135m(-instruct)?)?", name.lower()) and not folder.exists()
    checkpoint = str(assets.fetch("smollm2-135m-instruct-gguf", _say)) if known else name
    source = find_source(checkpoint)
    files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in source.files]

    def put(target: pathlib.Path) -> None:
        convert(checkpoint, target)

    return AnchorSource(source.name, [source.kind, source.revision, files], put)


def _is_first() -> bool:
    """Of several ranks one speaks."""
    import mlx.core as mx

    return mx.distributed.init().rank() == 0


def _say(line: str) -> None:
    notes.print(line, style="dim", markup=False)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter("write numbers with commas between: 24,8", param_hint=option)
    return tuple(map(int, text.split(",")))


def _layers(text: str) -> str | tuple[int, ...]:
    """`late`, or `0,3,20-29`."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return text
    ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
    return tuple(layer for part in ends for layer in range(part[0], part[-1] + 1))


def _print(out: pathlib.Path, learnt: Learnt) -> None:
    totals = learnt.totals
    figures = (
        f"{several(totals['blocks'], 'block')}, {size(totals['bytes'])}; "
        f"{totals['fetched_parameters'] / 1e6:.2f} M parameters fetched for a question"
    )
    times = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in learnt.seconds.items())
    console.print(f"{'written':<10}{out}: {figures}", markup=False, soft_wrap=True)
    console.print(f"{'times':<10}{times}", markup=False, soft_wrap=True)
    if (picture := out / "learning" / "loss.png").exists():
        console.print(f"{'plot':<10}{picture}", markup=False, soft_wrap=True)
    console.print(f"Talk to it: hiermem chat {out}", markup=False, soft_wrap=True)
