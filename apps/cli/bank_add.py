"""`hiermem bank add` and `add-block`: documents that are learnt into a bank, and a block that is there already."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.bank_policy import parse_paths
from mlx_hiermem.apps.cli.display import console, several, size
from mlx_hiermem.apps.cli.learn import GO_ON
from mlx_hiermem.apps.cli.learn_screen import screen_for

if TYPE_CHECKING:
    import numpy as np

    from mlx_hiermem.bank.bank import MemoryBank


def add(
    words: list[str] = typer.Argument(
        ..., metavar="[MODEL] DOCS...", help="DOCS: documents to learn, as `hiermem learn` takes them."
    ),
    model: str = models.MODEL,
    field: str = typer.Option("text", help="Field of a .jsonl line that holds the text."),
    title: str = typer.Option("", help="Field that holds its title. Default: title, name, heading or subject."),
    any_language: bool = typer.Option(
        False, "--any-language", help="Learn documents that are not in English, too."
    ),
    new_leaf: bool = typer.Option(False, "--new-leaf", help="Give the documents a leaf of their own."),
    epochs: int = typer.Option(4, min=1, help="How often each text is learnt."),
    rate: float = typer.Option(6e-3, min=0.0, help="Learning rate at its highest."),
    teacher: str = typer.Option("", help="Who writes questions about them. Default: the anchor."),
    teacher_url: str = typer.Option("", help="Or a server that speaks OpenAI's protocol."),
    teacher_model: str = typer.Option("", help="What the model is called there. Default: the first one."),
    study: float = typer.Option(
        10.0, min=0.1, help="Tokens of study for each token of the documents, of a teacher that can write."
    ),
    self_study: bool = typer.Option(True, "--self-study/--no-self-study", help="Have questions written."),
    prompts: pathlib.Path | None = typer.Option(
        None, help="Prompts of your own to learn, as `hiermem learn` takes them."
    ),
    keep: bool = typer.Option(False, "--keep", help="Keep the work folder MODEL.learn."),
) -> None:
    """Learn more documents, into the leaves that they belong to.

    The blocks of these leaves change, and no byte of any other; they learn their old texts once more beside the new
    ones. Interrupted, the same command goes on.

    Example: `hiermem bank add my-model ./new-docs`
    """
    from mlx_hiermem.errors import HierMemError
    from mlx_hiermem.learn import add as adding
    from mlx_hiermem.learn.settings import AddSettings, CorpusSettings, StudySettings, TrainingSettings
    from mlx_hiermem.learn.study.prompts import read_prompts

    name, docs = models.split(words, model, lambda word: len(words) > 1 and models.is_model_folder(word))
    settings = AddSettings(
        CorpusSettings(field, title, any_language=any_language),
        new_leaf=new_leaf,
        self_study=self_study,
        teacher=teacher,
        teacher_url=teacher_url,
        teacher_model=teacher_model,
        study=StudySettings(amount=study),
        training=TrainingSettings(epochs=epochs, rate=rate),
        prompts=read_prompts(prompts) if prompts else (),
        keep=keep,
    )
    try:
        with screen_for(True) as screen:
            added = adding.add(models.folder_of(name), docs, settings, screen)
    except KeyboardInterrupt as error:
        raise HierMemError("stopped", GO_ON) from error
    models.remember(name)
    blocks = ", ".join(added.blocks[:8]) + ", …" * (len(added.blocks) > 8)
    new = f"; {added.new_leaf} is new" if added.new_leaf else ""
    documents = several(added.documents, "document")
    console.print(f"{'added':<10}{documents} to {several(len(added.blocks), 'block')}: {blocks}{new}", markup=False)


def add_block(
    words: list[str] = typer.Argument(..., metavar="[MODEL] FILE", help="FILE: the block, a .safetensors file."),
    model: str = models.MODEL,
    path: str = typer.Option(..., help="The node it is for, such as 10.7. A new node's parent must be there."),
    label: str | None = typer.Option(None, help="What it is about."),
    documents: int | None = typer.Option(None, min=0, help="How many documents it was made from."),
    source: list[str] | None = typer.Option(None, help="Where they are from; may be given several times."),
    centroid: pathlib.Path | None = typer.Option(None, help="A new node's centroid, as a .npy file."),
    example: list[str] | None = typer.Option(None, help="A text that belongs there; may be given several times."),
    replace: bool = typer.Option(False, "--replace", help="Take the place of the block that is there."),
) -> None:
    """Put in a block that was removed, or trained elsewhere for the same anchor.

    A node that the tree lacks needs a place: a centroid, or example texts to make one from. A file out of
    another bank brings its label and sources along, and a plain block is quantised where the bank is.

    Example: `hiermem bank add-block my-model gases.safetensors --path 10.7 --example "What is neon?"`
    """
    from mlx_hiermem.bank import edit

    if centroid and example:
        raise typer.BadParameter("give a file or example texts, not both", param_hint="--centroid")
    name, file = models.last_word(words, model, "FILE")
    bank = models.open_bank(name)
    (node,) = parse_paths([path])
    place = _read_centroid(centroid) if centroid else _embed(bank, example) if example else None
    entry = edit.add(
        bank.root,
        pathlib.Path(file),
        node,
        centroid=place,
        label=label,
        documents=documents,
        sources=source or None,
        replacing=replace,
    )
    console.print(f"added    {node} {entry.label} · {size(entry.bytes)}", markup=False)


def _read_centroid(file: pathlib.Path) -> np.ndarray:
    import numpy as np

    from mlx_hiermem.errors import BankError

    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BankError(
            f"{file} holds no centroid", "Save one vector with numpy.save, or give --example."
        ) from error


def _embed(bank: MemoryBank, texts: list[str]) -> np.ndarray:
    """The mean of the texts' embeddings: what k-means makes of a cluster's documents."""
    from mlx_hiermem.router import load_embedder

    return load_embedder(bank.manifest.embedder).embed(texts).mean(0)
