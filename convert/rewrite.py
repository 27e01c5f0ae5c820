"""A whole model with another bank: the same anchor, and what is made of its memories."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import TypeVar

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.quantize import LevelReport, quantize
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert.staging import ANCHOR, BANK, SOURCE, partial_folder
from mlx_hiermem.errors import OutputError

T = TypeVar("T")


def rewrite(
    model: pathlib.Path, out: pathlib.Path, write: Callable[[MemoryBank, pathlib.Path], T], resume: bool = False
) -> T:
    """Writes the model folder `out`: a copy of the anchor, and the bank that `write` makes of the model's own in a
    folder that is not there yet; returns what that returns.

    Raises what it raises, OutputError as `partial_folder`, and AnchorMismatchError where the anchor is not the
    bank's.
    """
    bank = MemoryBank.open(model / BANK)
    bank.manifest.check_anchor(identify(model / ANCHOR))
    if out.exists():
        raise OutputError(f"{out} exists already", "Choose another folder, or remove it first.")
    with partial_folder(out, resume) as partial:
        for left in (partial / ANCHOR, partial / BANK):  # of a run that was interrupted before or after the blocks
            shutil.rmtree(left, ignore_errors=True)
        (partial / ANCHOR).mkdir()
        for file in (*(model / ANCHOR).iterdir(), model / SOURCE):
            if file.is_file():
                shutil.copyfile(file, partial / file.relative_to(model))  # a read-only model makes no read-only one
        return write(bank, partial / BANK)


def quantize_model(
    model: pathlib.Path,
    out: pathlib.Path,
    config: MemoryConfig,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[LevelReport]:
    """`hiermem bank quantize`: the same anchor, its memories in fewer bits.

    Writes the model folder `out` with the bank as `config` (see `design`) has it.

    Arguments, errors and what is returned as for `bank.quantize.quantize`, and errors as for `rewrite`.
    """
    return rewrite(model, out, lambda bank, folder: quantize(bank, folder, config, resume, progress), resume)
