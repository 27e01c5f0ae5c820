"""Which model a command means, and opening it.

Every command names its model in the same way: `-m MODEL`, a folder or a hub id. Many take it as their first word
too. Without a name it is $HIERMEM_MODEL, else the last one used, else the demo's.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli.display import notes, several, waiting
from mlx_hiermem.errors import AnchorError, BankError, HierMemError, OutputError
from mlx_hiermem.files import write_text

if TYPE_CHECKING:
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.model import MemoryModel

HELP = "Folder or hub id of a model. Default: the last one used, else the demo's."
MODEL = typer.Option("", "--model", "-m", help=HELP)
FIRST_WORD = typer.Argument("", metavar="MODEL", help="The model, as with `-m`.")
MEMORY = typer.Option(
    "",
    help="none, generic, fetched, source (retrieval: a passage in the prompt), fetched+source, or a path such as "
    "10.7. Default: fetched where there is a bank.",
)


def chosen(first_word: str, model: str) -> str:
    """The model of a command `hiermem COMMAND [MODEL]`."""
    if first_word and model:
        raise typer.BadParameter(f"the model is named twice: {first_word} and {model}", param_hint="--model")
    return first_word or model or preferred()


def split(words: Sequence[str] | None, model: str, is_model: Callable[[str], bool]) -> tuple[str, list[str]]:
    """The model of a command `hiermem COMMAND [MODEL] WORDS`, and the other words.

    `is_model` says whether the first word is one, where `-m` names none.
    """
    rest = list(words or ())
    if model:
        return model, rest
    if rest and is_model(rest[0]):
        return rest[0], rest[1:]
    return preferred(), rest


def is_no_number(word: str) -> bool:
    """Where other words are paths of nodes or distances: whether this one is neither, and so a model's name.

    Raises BadParameter where it may be both.
    """
    if not re.fullmatch(r"\d+(\.\d+)*\.?|\.\d+", word):
        return True
    if is_model_folder(word):
        raise typer.BadParameter(f"{word} is a model here, and a node or number too: write ./{word}, or -m MODEL")
    return False


def is_model_folder(word: str) -> bool:
    """Where other words are texts or files: whether this one is the folder of a model or of a bank."""
    folder = pathlib.Path(word)
    return any((folder / name).exists() for name in ("anchor", "bank", "bank.json"))


def last_word(words: Sequence[str], model: str, what: str) -> tuple[str, str]:
    """The model and the other word of a command `hiermem COMMAND [MODEL] WHAT`."""
    name, rest = split(words, model, lambda _: len(words) > 1)
    if len(rest) != 1:
        raise typer.BadParameter("give one, and before it or with -m a model", param_hint=what)
    return name, rest[0]


def folder_of(name: str) -> pathlib.Path:
    """The folder of a model by its name; one on the hub is downloaded if need be. AnchorError where it is none."""
    from mlx_hiermem.share.resolve import resolve

    return resolve(name)


def open_model(name: str, cache_bytes: int = 512 << 20) -> MemoryModel:
    """Loads a model by folder or hub id, and notes it as the last one used."""
    folder = folder_of(name)  # first: a download has a bar of its own
    finish_removal(folder / "bank")
    with waiting("loading"):
        from mlx_hiermem.model_folder import load

        model = load(folder, cache_bytes=cache_bytes)
    remember(name)
    return model


def open_bank(name: str) -> MemoryBank:
    """The bank of a model, by folder or hub id, or the bank in a folder of its own. Notes the model as used."""
    from mlx_hiermem.bank.bank import MANIFEST, MemoryBank

    root = bank_folder(folder_of(name))
    if not (root / MANIFEST).is_file():
        raise BankError(f"there is no bank in {name}", "Give a model with a bank/ folder, or a bank's folder.")
    finish_removal(root)
    bank = MemoryBank.open(root)
    remember(name)
    return bank


def bank_folder(folder: pathlib.Path) -> pathlib.Path:
    """The bank in a model's folder; a folder of its own is one itself."""
    return folder / "bank" if (folder / "bank").is_dir() else folder


def finish_removal(root: pathlib.Path) -> None:
    """Drops the texts of removed nodes where a `bank remove` was killed before it had; says so."""
    from mlx_hiermem.bank.commit import FORGET

    if not (root / FORGET).exists():
        return
    from mlx_hiermem.learn.publish import forget

    try:
        line = f"finished a removal that was interrupted: {several(forget(root), 'text')} dropped"
    except HierMemError as error:
        line = f"texts of removed nodes are still kept: {error}"
    notes.print(line, style="yellow", markup=False, soft_wrap=True)


def introduce(name: str, model: MemoryModel) -> str:
    """`SmolLM2-135M-Instruct, 20 blocks · ~/.cache/…/smollm2-135m-elements`: which model it is, on one line."""
    from mlx_hiermem.share.resolve import home

    folder = pathlib.Path(name)
    where = folder.resolve() if folder.is_dir() else home(name)
    who = f"{where.name}, no memory"
    if model.bank is not None:
        who = f"{model.bank.manifest.anchor.name}, {several(len(model.bank.manifest.blocks), 'block')}"
    line = f"{who} · {where}".replace(f" {pathlib.Path.home()}/", " ~/")
    return line if len(line) <= notes.width else f"{who} · …/{where.name}"


def show_which(name: str, model: MemoryModel) -> None:
    """Says on the terminal which model answers; in a pipe it would be in the way."""
    if notes.is_terminal:
        notes.print(introduce(name, model), style="dim", markup=False, soft_wrap=True)


def remember(name: str) -> None:
    """Notes a model as the last one used. A bank alone is none; a cache folder that is read-only is no error."""
    folder = pathlib.Path(name)
    if folder.is_dir():
        if not any((folder / part).exists() for part in ("anchor", "config.json")):
            return
        name = str(folder.resolve())
    file = _note()
    with contextlib.suppress(OSError, OutputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, name + "\n")


def preferred() -> str:
    """A model's folder or hub id. Raises AnchorError where there is none, saying how to get one."""
    from mlx_hiermem.apps.demo import tour

    if named := os.environ.get("HIERMEM_MODEL"):
        return named
    with contextlib.suppress(OSError, UnicodeDecodeError):
        last = _note().read_text(encoding="utf-8").strip()
        # A folder that is gone is no choice; a hub id (not absolute) is in the cache or comes from the hub.
        if last and (not os.path.isabs(last) or os.path.isdir(last)):
            return last
    if tour.ready(tour.model_folder()):
        return str(tour.model_folder())
    raise AnchorError(
        "no model was named and none was used before",
        "`hiermem demo` makes one; or name yours, or set HIERMEM_MODEL to its folder.",
    )


def _note() -> pathlib.Path:
    from mlx_hiermem.assets import cache_folder

    return cache_folder() / "last-model"
