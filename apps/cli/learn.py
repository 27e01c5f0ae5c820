"""`hiermem learn`: documents become a model with a memory bank."""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mlx_hiermem.apps.cli.display import console, duration, notes, parse_size, renamed, several, size
from mlx_hiermem.apps.cli.learn_screen import screen_for

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from mlx_hiermem.learn.run import AnchorSource, Learnt
    from mlx_hiermem.learn.settings import LearnSettings

Settings = TypeVar("Settings", bound="DataclassInstance")

GO_ON = "What was learnt is kept: the same command goes on from there."


# How the help is divided: the common ten, then these.
FILES, SELDOM = "All settings, in a file", "Seldom needed; in the file too"
DOCUMENTS = typer.Argument(
    metavar="DOCS... OUT",
    help="DOCS: folders, files (.txt .md .html .pdf .docx .pptx .epub .csv .jsonl), hf://owner/name. "
    "OUT: the model's folder to make.",
)
ANCHOR = typer.Option("--anchor", "-a", help="Model folder or hub id, or what convert takes.")
FIELD = typer.Option(help="Field of a .jsonl line that holds the text. Default: text.", rich_help_panel=SELDOM)
ANY_LANGUAGE = typer.Option("--any-language", help="Learn what is not in English, too.", rich_help_panel=SELDOM)
KIND = typer.Option(help="Kind of memory: ffn, lora-qk, lora-vo, lora-ffn or kv. Default: ffn.")
EPOCHS = typer.Option(min=0, help="How often each text is learnt. Default: 4 to 16, fewer for more text.")
SELF_STUDY = typer.Option(
    "--self-study/--no-self-study",
    help="Have questions and answers written about the documents, and learn them too. Default: yes.",
)
TEACHER = typer.Option(help="Who writes them: a model that mlx-lm loads. Default: the anchor.")
TEACHER_URL = typer.Option(
    help="Or a server that speaks OpenAI's protocol; its key is in OPENAI_API_KEY, if it needs one."
)
TEACHER_MODEL = typer.Option(
    help="What the model is called there. Default: the first one that the server names.", rich_help_panel=SELDOM
)
STUDY = typer.Option(
    min=0.1,
    help="Tokens of study for each token of the documents, of a teacher that can write. Default: 10.",
    rich_help_panel=SELDOM,
)
PROMPTS = typer.Option(help="Prompts of your own to learn: a JSON line each, with document, prompt and completion.")
QUESTIONS = typer.Option(help="Questions to measure the routing by: a JSON line each, with question and document.")
SOURCES = typer.Option(
    "--sources/--no-sources",
    help="Keep the texts in the bank, so that an answer can show where it comes from. Default: yes.",
)
CACHE = typer.Option(
    help="Disk for what the anchor computes once and uses often: 500M, 20G. Less is slower. Default: 20G.",
    rich_help_panel=SELDOM,
)
KEEP = typer.Option("--keep", help="Keep the work folder OUT.learn.", rich_help_panel=SELDOM)
CONFIG = typer.Option(
    help="TOML file of settings. A later file overrides an earlier one; options on the line override all.",
    rich_help_panel=FILES,
)
WRITE_CONFIG = typer.Option(
    help="Write all settings that would be used into this TOML file, and learn nothing.", rich_help_panel=FILES
)
JSON = typer.Option("--json", help="Print one JSON object in the end instead of text.")


def learn(
    words: Annotated[list[str] | None, DOCUMENTS] = None,
    anchor: Annotated[str, ANCHOR] = "SmolLM2",
    field: Annotated[str | None, FIELD] = None,
    any_language: Annotated[bool, ANY_LANGUAGE] = False,
    kind: Annotated[str | None, KIND] = None,
    memory: Annotated[str | None, typer.Option("--memory", hidden=True)] = None,
    epochs: Annotated[int | None, EPOCHS] = None,
    self_study: Annotated[bool | None, SELF_STUDY] = None,
    teacher: Annotated[str | None, TEACHER] = None,
    teacher_url: Annotated[str | None, TEACHER_URL] = None,
    teacher_model: Annotated[str | None, TEACHER_MODEL] = None,
    study: Annotated[float | None, STUDY] = None,
    prompts: Annotated[pathlib.Path | None, PROMPTS] = None,
    questions: Annotated[pathlib.Path | None, QUESTIONS] = None,
    sources: Annotated[bool | None, SOURCES] = None,
    cache: Annotated[str | None, CACHE] = None,
    keep: Annotated[bool, KEEP] = False,
    config: Annotated[list[pathlib.Path] | None, CONFIG] = None,
    write_config: Annotated[pathlib.Path | None, WRITE_CONFIG] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Learn documents: a tree of their topics, and a block of memory for each. Run again, it goes on.

    Example: `hiermem learn ./docs my-model --anchor SmolLM2`

    Example: `hiermem learn --write-config learn.toml`, then `hiermem learn ./docs my-model --config learn.toml`
    """
    from mlx_hiermem.learn.settings import read_settings

    if memory:
        renamed("--memory KIND", "--kind KIND")
    settings = read_settings(*config or ())
    states_bytes = parse_size(cache, "--cache") if cache else None
    settings = _changed(
        settings,
        corpus=_changed(settings.corpus, field=field, any_language=any_language or None),
        memory=_changed(settings.memory, kind=kind or memory),
        training=_changed(settings.training, epochs=epochs, states_bytes=states_bytes),
        self_study=self_study,
        teacher=teacher,
        teacher_url=teacher_url,
        teacher_model=teacher_model,
        study=_changed(settings.study, amount=study),
        sources=sources,
        keep=keep or None,
    )
    if write_config:
        _write(write_config, settings)
        return
    if not words or len(words) < 2:
        raise typer.BadParameter("name documents, and the folder to make", param_hint="DOCS... OUT")
    *docs, target = words
    _learn(docs, pathlib.Path(target), anchor, _with_files(settings, questions, prompts), as_json)


def _with_files(
    settings: LearnSettings, questions: pathlib.Path | None, prompts: pathlib.Path | None
) -> LearnSettings:
    """Settings with what these files hold."""
    from mlx_hiermem.evaluate.questions import read_questions
    from mlx_hiermem.learn.study.prompts import read_prompts

    asked = read_questions(questions, documents=True) if questions else []
    return _changed(
        settings,
        questions=tuple((one.prompt, one.document) for one in asked),
        prompts=read_prompts(prompts) if prompts else (),
    )


def _learn(docs: list[str], out: pathlib.Path, anchor: str, settings: LearnSettings, as_json: bool) -> None:
    from mlx_hiermem.errors import HierMemError
    from mlx_hiermem.learn import run

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


def _changed(settings: Settings, **given: Any) -> Settings:
    """Settings with what was given; None was not."""
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _write(file: pathlib.Path, settings: LearnSettings) -> None:
    from mlx_hiermem.errors import OutputError
    from mlx_hiermem.learn.settings import write_settings

    if file.exists():
        raise OutputError(f"{file} exists already", "Take another name, or remove it.")
    write_settings(file, settings)
    console.print(f"written  {file}", markup=False, soft_wrap=True)


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
    console.print(next_step(out), markup=False, soft_wrap=True)


def next_step(out: pathlib.Path) -> str:
    """How to talk to what was learnt. A base model has no chat template: it is asked one question."""
    from mlx_hiermem.tokenizer import load_tokenizer

    if getattr(load_tokenizer(out / "anchor"), "chat_template", None):
        return f"Talk to it: hiermem chat {out}"
    return f"Ask it: hiermem ask -m {out} 'What is …?' (its anchor is a base model, without a chat template)"
