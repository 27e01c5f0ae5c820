"""Weights in fewer bits, by Core AI's own optimiser (coreai-opt), which also says what is left of a matrix.

    int8           a scale and a smallest value for each 32 values of a row: 9 bits a weight
    int8_channel   a scale for each row (output channel), symmetric: 8 bits
    int4           as int8 with codes of 4 bits, and a zero code for each block: 5.1 bits
    lut4           16 values for each 16 rows, found by k-means; every weight is one of them: 4 bits

Apple's guidance for its own models: blocks where the GPU runs them, rows or tables for the Neural Engine.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlx_hiermem.convert.coreml.compress import ENTRIES, block_of, group_of
from mlx_hiermem.errors import HierMemError, MissingDependencyError

TYPES = {"int8": "uint8", "int8_channel": "int8", "int4": "uint4"}


def rounded(values: np.ndarray, form: str) -> np.ndarray:
    """What a format leaves of a matrix [out, in], in float32."""
    if form == "fp16":
        return values.astype(np.float16).astype(np.float32)
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=torch.float16)
    linear.weight = nn.Parameter(torch.from_numpy(values).half(), requires_grad=False)
    row = torch.zeros(1, values.shape[1], dtype=torch.float16)
    model = compress(nn.Sequential(linear), {"0": form}, (row,))
    left: np.ndarray = model[0].weight.detach().float().numpy()
    return left


def size(shape: tuple[int, ...], form: str) -> int:
    """Bytes of a matrix [out, in] in a format."""
    rows, columns = shape
    blocks = rows * columns // block_of(columns)
    match form:
        case "int8_channel":
            return rows * columns + 3 * rows
        case "int8":
            return rows * columns + 4 * blocks
        case "int4":
            return rows * columns // 2 + 4 * blocks + blocks // 2
        case "lut4":
            return rows * columns // 2 + 2 * ENTRIES * rows // group_of(rows)
    return 2 * rows * columns


def compress(model: nn.Module, formats: Mapping[str, str], arguments: tuple[Tensor, ...]) -> Any:
    """`model` with its linear layers, by module name, in formats; those in fp16 or not named stay.

    `arguments`: of a call, as the optimiser runs the model to see what each layer gets.
    """
    opt: Any = _library()  # its types are narrower than what it takes
    scaled = {name: form for name, form in formats.items() if form in TYPES}
    tables = {name: form for name, form in formats.items() if form == "lut4"}
    if unknown := set(formats.values()) - {*TYPES, "lut4", "fp16"}:
        raise HierMemError(f"unknown weight format '{min(unknown)}'")
    with _quiet():
        if scaled:
            rows = {name: _scales(_linear(model, name), form) for name, form in scaled.items()}
            config = {"execution_mode": "eager", "global_config": None, "module_name_configs": rows}
            made = opt.Quantizer(model, opt.QuantizerConfig.from_dict({"quantization_config": config}))
            model = made.finalize(made.prepare(example_inputs=arguments), backend=opt.ExportBackend.CoreAI)
        if tables:
            rows = {name: _tables(_linear(model, name)) for name in tables}
            config = {"global_config": None, "module_name_configs": rows}
            made = opt.KMeansPalettizer(
                model, opt.KMeansPalettizerConfig.from_dict({"kmeans_palettization_config": config})
            )
            prepared = made.prepare(example_inputs=arguments, num_workers=1)
            model = made.finalize(prepared, backend=opt.ExportBackend.CoreAI)
    return model


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
    return found


def _scales(linear: nn.Linear, form: str) -> dict[str, Any]:
    weight: dict[str, Any] = {"dtype": TYPES[form]}
    if form == "int8_channel":
        weight |= {"qscheme": "symmetric", "granularity": {"type": "per_channel", "axis": 0}}
    else:
        # The smallest value is a float16: a zero point, rounded to a code, costs as much as two of the bits.
        block = {"type": "per_block", "block_size": block_of(linear.weight.shape[1]), "axis": 1}
        weight |= {"qscheme": "asymmetric", "qformulation": "minval", "granularity": block}
    return {"op_state_spec": {"weight": weight}, "op_input_spec": None, "op_output_spec": None}


def _tables(linear: nn.Linear) -> dict[str, Any]:
    granularity = {"type": "per_grouped_channel", "axis": 0, "group_size": group_of(linear.weight.shape[0])}
    return {"op_state_spec": {"weight": {"n_bits": 4, "granularity": granularity}}}


class _Library:
    """The names of coreai-opt that are used here."""

    def __init__(self) -> None:
        from coreai_opt.base_model_compressor import ExportBackend
        from coreai_opt.palettization.config.palettization_config import KMeansPalettizerConfig
        from coreai_opt.palettization.kmeans import KMeansPalettizer
        from coreai_opt.quantization import Quantizer, QuantizerConfig

        self.ExportBackend, self.Quantizer, self.QuantizerConfig = ExportBackend, Quantizer, QuantizerConfig
        self.KMeansPalettizer, self.KMeansPalettizerConfig = KMeansPalettizer, KMeansPalettizerConfig


def _library() -> _Library:
    try:
        with _quiet():
            return _Library()
    except ImportError as error:
        raise MissingDependencyError(
            "compressed weights for Core AI need coreai-opt", "pip install 'mlx-hiermem[coreai]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars, and the warnings of what else could be installed."""
    disabled = logging.root.manager.disable
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
