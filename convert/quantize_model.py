"""`hiermem bank quantize` of a whole model: the same anchor, its memories in fewer bits."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.quantize import LevelReport, quantize
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert.staging import ANCHOR, BANK, SOURCE, partial_folder
from mlx_hiermem.errors import OutputError


def quantize_model(
    model: pathlib.Path,
    out: pathlib.Path,
    config: MemoryConfig,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[LevelReport]:
    """Writes the model folder `out`: a copy of the anchor, and the bank as `config` (see `design`) has it.

    Arguments, errors and what is returned as for `bank.quantize.quantize`; AnchorMismatchError too, where the
    anchor is not the bank's.
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
        reports = quantize(bank, partial / BANK, config, resume, progress)
    return reports
