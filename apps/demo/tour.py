"""The demo's model: real SmolLM2 weights, converted on first use, with the bundled bank attached."""

from __future__ import annotations

import itertools
import pathlib
import shutil
from collections.abc import Callable

from mlx_hiermem import assets
from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.files import file_digest, replace_folder

NAME = "smollm2-135m-vital"
INSTALLED = "installed.sha256"  # in the model's folder: of the manifest as it was put there
BANK = pathlib.Path(__file__).parent / "bank"
WEIGHTS = "smollm2-135m-instruct-gguf"


def model_folder(name: str = NAME) -> pathlib.Path:
    return assets.cache_folder() / "models" / name


def ready(folder: pathlib.Path, bank: pathlib.Path = BANK) -> bool:
    """Whether the folder holds this version's bank and the anchor that it was made for."""
    try:
        same = (folder / "bank" / MANIFEST).read_bytes() == (bank / MANIFEST).read_bytes()
        MemoryBank.open(folder / "bank").manifest.check_anchor(identify(folder / "anchor"))
    except (HierMemError, OSError):
        return False
    return same


def prepare(say: Callable[[str], None], name: str = NAME, bank: pathlib.Path = BANK) -> pathlib.Path:
    """Fetches, converts and assembles a model with a bank where that has not been done; returns its folder."""
    folder = model_folder(name)
    if ready(folder, bank):
        return folder
    from mlx_hiermem.convert.pipeline import convert

    weights = assets.fetch(WEIGHTS, say)
    assets.fetch("all-minilm-l6-v2", say)
    say("converting it to an MLX anchor")
    staging = folder.with_name(folder.name + ".new")
    convert(str(weights), staging, overwrite=True)
    say("attaching the bundled bank")
    shutil.copytree(bank, staging / "bank", dirs_exist_ok=True)
    if not ready(staging, bank):
        raise HierMemError(
            "the bundled bank does not fit the converted anchor",
            "This is a bug, or the weights are not the ones the bank was made for; please report it.",
        )
    (staging / INSTALLED).write_text(file_digest(bank / MANIFEST), encoding="utf-8")
    if _is_changed(folder):
        names = (folder.with_name(f"{name}.changed-{n}") for n in itertools.count(1))
        aside = next(one for one in names if not one.exists())
        folder.rename(aside)
        say(f"you have changed the demo's model: yours is now {aside}")
    replace_folder(staging, folder)
    return folder


def _is_changed(folder: pathlib.Path) -> bool:
    """Whether somebody has edited its bank, or taught it something, since it was put there."""
    try:
        return file_digest(folder / "bank" / MANIFEST) != (folder / INSTALLED).read_text(encoding="utf-8")
    except OSError:
        return (folder / "learning").is_dir()
