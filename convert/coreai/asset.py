"""Writes PyTorch modules as one `.aimodel`: Core AI's PyTorch extensions trace them and store each weight once.

The one place that imports `coreai_torch`.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlx_hiermem.errors import MissingDependencyError

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a torch newer than it was tried with
        from coreai_torch import TorchConverter, get_decomp_table
except ImportError as error:
    raise MissingDependencyError(
        "exporting to Core AI needs coreai-torch", "pip install 'mlx-hiermem[coreai]'"
    ) from error


@dataclass(frozen=True)
class Function:
    """One entry point: a module, and arguments of the shapes that a call has, in the order of `forward`.

    `states` are the last of the arguments; `forward` writes them.
    """

    module: nn.Module
    arguments: Mapping[str, Tensor]
    outputs: Sequence[str]
    states: Sequence[str] = ()


def save(functions: Mapping[str, Function], path: pathlib.Path) -> None:
    """Writes the asset, a folder whose name ends in `.aimodel`."""
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    unheard = io.StringIO()  # it draws progress bars of its own
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in functions.items():
            # A tensor of its own for each argument: one object given twice is taken for one input.
            arguments = tuple(value.clone() for value in function.arguments.values())
            with torch.no_grad():
                traced = torch.export.export(function.module, args=arguments)
                traced = traced.run_decompositions(get_decomp_table())
            converter.add_exported_program(
                traced,
                input_names=[given for given in function.arguments if given not in function.states],
                output_names=list(function.outputs),
                state_names=list(function.states),
                entrypoint_name=name,
            )
        converter.to_coreai().save_asset(path)
