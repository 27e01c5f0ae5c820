"""`hiermem bank quantize` of a whole model: the same anchor, its memories in fewer bits."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from mlx_hiermem.bank.quantize import LevelReport, quantize
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert.rewrite import rewrite


def quantize_model(
    model: pathlib.Path,
    out: pathlib.Path,
    config: MemoryConfig,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[LevelReport]:
    """Writes the model folder `out` with the bank as `config` (see `design`) has it.

    Arguments, errors and what is returned as for `bank.quantize.quantize`, and errors as for `rewrite`.
    """
    return rewrite(model, out, lambda bank, folder: quantize(bank, folder, config, resume, progress), resume)
