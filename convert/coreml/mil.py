"""coremltools' builder of MIL programs, and the few things said so often that they deserve a name.

The one place that imports it. Everything is float16: ids, positions and indices are int32. A weight that several
functions use carries a `weight_id`, and is stored once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.compress import Encoded, check_half, encode
from mlx_hiermem.errors import CoreMLError, MissingDependencyError, OutputError

logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of every torch and numpy it was not tried with
try:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813 (coremltools' own name for it)
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.mil import Function, Program, types
    from coremltools.converters.mil.mil import get_new_symbol as get_new_symbol
    from coremltools.converters.mil.mil.types.type_int import np_uint4_dtype
except ImportError as error:
    raise MissingDependencyError(
        "exporting to Core ML needs coremltools", "pip install 'mlx-hiermem[coreml]'"
    ) from error

Var = Any  # a value of the program; coremltools has no types
OPSET = ct.target.iOS18
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
UNWRITTEN = re.compile(r"filesystem error|MIL FileWriter")  # what coremltools says where a disk fails
PACKED = {"uint4": np_uint4_dtype}


def half(value: Any) -> Any:
    """float16, a scalar or an array."""
    return np.asarray(value).astype(np.float16)[()]


class Weights:
    """The constants of a program, by name. `plan` says which matrices are compressed, and how."""

    def __init__(self, plan: Mapping[str, str] | None = None) -> None:
        self.plan = plan or {}
        self.encoded: dict[str, Encoded] = {}
        self.made: dict[str, Var] = {}  # in the function at hand

    def begin(self) -> None:
        """Called at the start of each function: its variables are its own, what they hold is shared."""
        self.made.clear()

    def constant(self, name: str, values: np.ndarray) -> Var:
        """A constant in float16 (integers stay what they are)."""
        if values.dtype.kind == "f" and name not in self.made:
            check_half(name, values)
            values = half(values)
        return self._shared(name, values)

    def matrix(self, name: str, values: np.ndarray) -> Var:
        """A weight [out, in] in the format that the plan has for it."""
        form = self.plan.get(name, "fp16")
        if form == "fp16":
            return self.constant(name, values)
        if name in self.made:
            return self.made[name]
        if name not in self.encoded:
            check_half(name, values)
            self.encoded[name] = encode(values, form)
        encoded = self.encoded[name]
        codes = encoded.codes.astype(PACKED[encoded.packed]) if encoded.packed else encoded.codes
        data, table = self._shared(f"{name}_codes", codes), self._shared(f"{name}_table", encoded.table)
        if encoded.is_table:
            made = mb.constexpr_lut_to_dense(indices=data, lut=table, name=name)
        else:
            offset = None if encoded.offset is None else self._shared(f"{name}_offset", encoded.offset)
            made = mb.constexpr_blockwise_shift_scale(data=data, scale=table, offset=offset, name=name)
        self.made[name] = made
        return made

    def _shared(self, name: str, values: np.ndarray) -> Var:
        if name not in self.made:
            self.made[name] = mb.const(val=values, name=name)
            self.made[name].op.weight_id = name
        return self.made[name]


def tensor(shape: Sequence[int], dtype: str = "float16") -> Any:
    """An input of a function."""
    return mb.placeholder(tuple(shape), types.fp16 if dtype == "float16" else types.int32)


def state(shape: Sequence[int]) -> Any:
    """A state of a function: float16, and at most five axes."""
    return mb.state_tensor_placeholder(tuple(shape), types.fp16)


def function(inputs: Mapping[str, Any], body: Callable[[Mapping[str, Var]], Sequence[Var]]) -> Any:
    """A function of the program; `body` gets its inputs and states by name and returns its outputs."""
    mb.name_count.clear()  # names need be unique in a function only
    with Function(dict(inputs), opset_version=OPSET) as made:
        made.set_outputs(list(body(made.inputs)))
    for op in made.operations:
        wrong = [var.name for var in op.outputs if not NAME.fullmatch(var.name)]
        if wrong:  # coremltools corrects names in functions called `main` only
            raise CoreMLError(f"'{wrong[0]}' is no name for a value of a Core ML program")
    return made


def save(functions: Mapping[str, Any], package: pathlib.Path) -> None:
    """Writes functions as one .mlpackage; the first is the default.

    No pass of coremltools' runs: what is written is what was built. `ct.convert` refuses programs with states.
    """
    program = Program()
    for name, made in functions.items():
        program.add_function(name, made)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    program.skip_all_passes = True
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            mil_convert(
                program,
                convert_from="milinternal",
                convert_to="mlprogram",
                compute_units=ct.ComputeUnit.CPU_ONLY,
                specification_version=OPSET,
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
                package_dir=str(package),
            )
    except RuntimeError as error:
        if not UNWRITTEN.search(str(error)):
            raise
        raise OutputError(
            f"cannot write {package}: {error}", "Is there room for it, and may it be written?"
        ) from error
    for file in package.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # it makes some of them unreadable to others
