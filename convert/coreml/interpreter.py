"""Runs a saved .mlpackage without a Mac: numpy in float32 inside an operation, float16 between them.

It believes no declaration: the shape and type of every value are compared with what the program says it is,
indices are checked, and what a state holds afterwards is what the program wrote. What a device's own rounding and
fusing do beyond that is not known here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.ops import OPS
from mlx_hiermem.convert.coreml.program import Constant, FunctionSpec, Operation, TensorSpec, known, read_program
from mlx_hiermem.errors import CoreMLError, first_line

State = MutableMapping[str, np.ndarray]
Value = np.ndarray | Constant
HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)


class Program:
    """A package's functions. `functions` has their inputs, outputs and states."""

    name = "interpreter"

    def __init__(self, functions: dict[str, FunctionSpec]) -> None:
        self.functions = functions
        self._derived: dict[tuple[Any, ...], Constant] = {}  # decompressed constants, by operation and sources

    @classmethod
    def load(cls, package: pathlib.Path | str) -> Program:
        """Opens a saved package; raises CoreMLError where it is damaged or contradicts itself."""
        program = cls(read_program(pathlib.Path(package)))
        for name, function in program.functions.items():
            for op in function.operations:
                if op.type not in OPS and op.type not in ("read_state", "write_state"):
                    raise CoreMLError(f"function {name}: the interpreter has no operation {op}")
        return program

    def make_state(self, function: str) -> State:
        """Zeros for each state of a function, for `run` to read and write."""
        return {name: np.zeros(known(spec), spec.dtype) for name, spec in self._function(function).states.items()}

    def run(
        self,
        function: str,
        inputs: Mapping[str, Any],
        state: State | None = None,
        *,
        fp16: bool = True,
        peaks: dict[str, float] | None = None,
    ) -> dict[str, np.ndarray]:
        """Outputs by name. `state` is changed only if all went well.

        `fp16` False keeps float32 where the program says float16. `peaks` collects the largest |x| of each tensor
        before it was rounded, over several runs.
        Raises CoreMLError for inputs or states of another shape or kind, and where an operation fails or gives
        something else than declared.
        """
        spec = self._function(function)
        run = _Run(spec.constants, self._derived, fp16, peaks)
        state = state if state is not None else {}
        run.values.update(run.given("input", spec.inputs, inputs))
        run.values.update(run.given("state", spec.states, state))
        for op in spec.operations:
            run.step(op)
        outputs = {name: np.array(run.plain(name)) for name in spec.outputs}  # no memory shared with a state
        state.update({name: np.array(run.plain(name)) for name in run.written})
        return outputs

    def _function(self, name: str) -> FunctionSpec:
        if name not in self.functions:
            raise CoreMLError(f"the package has no function '{name}'", f"It has {', '.join(self.functions)}.")
        return self.functions[name]


class _Run:
    """Values by name while a function runs."""

    def __init__(
        self,
        constants: dict[str, Constant],
        derived: dict[tuple[Any, ...], Constant],
        fp16: bool,
        peaks: dict[str, float] | None,
    ) -> None:
        self.constants, self.derived, self.fp16, self.peaks = constants, derived, fp16, peaks
        self.values: dict[str, Value] = {}
        self.written: set[str] = set()
        self.own: dict[str, np.ndarray] = {}  # what a state will hold, in an array that no caller knows

    def given(
        self, role: str, specs: dict[str, TensorSpec], arrays: Mapping[str, Any]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """What the caller gave, in the declared types."""
        if set(arrays) != set(specs):
            raise CoreMLError(f"the {role}s {sorted(arrays)} were given", f"Give {sorted(specs)}.")
        for name, spec in specs.items():
            array = np.asarray(arrays[name])
            dtype = self.stored(spec.numpy)
            if not spec.allows(array.shape) or not np.can_cast(array.dtype, dtype, "same_kind"):
                wanted = " or ".join(str(list(shape)) for shape in spec.shapes or (spec.shape,))
                found = f"{array.dtype} {list(array.shape)}"
                raise CoreMLError(f"the {role} {name} is {found}", f"Give {spec.dtype} {wanted}.")
            yield name, array.astype(dtype, copy=False)

    def stored(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return SINGLE if dtype == HALF and not self.fp16 else dtype

    def step(self, op: Operation) -> None:
        """Runs one operation and checks its results."""
        try:
            if op.type == "write_state":
                self.write(op)
            elif op.type.startswith("constexpr_"):
                self.values[op.outputs[0][0]] = self.derive(op)
            else:
                self.values.update(self.compute(op))
        except CoreMLError as error:
            raise CoreMLError(f"{op}: {error.what}", error.hint) from error
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise CoreMLError(f"{op}: {first_line(error)}") from error
        for name in op.last_uses:
            del self.values[name]

    def lookup(self, argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(self.lookup, argument))
        if not isinstance(argument, str):
            return argument
        return self.values[argument] if argument in self.values else self.constants[argument]

    def plain(self, argument: Any) -> Any:
        """An argument, or a tuple of them, as it is stored."""
        if isinstance(argument, tuple):
            return tuple(map(self.plain, argument))
        value = self.lookup(argument)
        if isinstance(value, Constant):
            return value.value if self.fp16 else value.wide
        return value

    def wide(self, argument: Any) -> Any:
        """The same for arithmetic: float32 instead of float16."""
        if isinstance(argument, tuple):
            return tuple(map(self.wide, argument))
        value = self.lookup(argument)
        if isinstance(value, Constant):
            return value.wide
        return value.astype(SINGLE) if value.dtype == HALF else value

    def write(self, op: Operation) -> None:
        name = str(op.inputs["input"])
        value, old = self.plain(op.inputs["data"]), self.plain(name)
        if (value.shape, value.dtype) != (old.shape, old.dtype):
            raise ValueError(f"{value.dtype} {value.shape} for the state {name}, {old.dtype} {old.shape}")
        self.values[name] = value
        self.written.add(name)

    def derive(self, op: Operation) -> Constant:
        """A constant from constants, once for all functions and runs; rounded in any case."""
        sources = {key: self.lookup(argument) for key, argument in op.inputs.items()}
        key = (op.type, *sorted((name, id(source)) for name, source in sources.items()))
        if key not in self.derived:
            run = _Run({}, self.derived, True, None)
            (value,) = run.compute(replace(op, inputs=sources)).values()
            self.derived[key] = Constant(value, sources)
        return self.derived[key]

    def compute(self, op: Operation) -> dict[str, Any]:
        """The results of an operation by name, checked against its declared outputs."""
        if op.type == "read_state":
            results: tuple[np.ndarray, ...] = (self.plain(op.inputs["input"]),)
        else:
            with np.errstate(all="ignore"):  # an overflow is infinite here as there, and `peaks` tells
                results = self.call(op)
        if len(results) != len(op.outputs):
            raise ValueError(f"gives {len(results)} results, declared are {len(op.outputs)}")
        for (name, spec), result in zip(op.outputs, results, strict=True):
            if not spec.allows(result.shape) or result.dtype != self.stored(spec.numpy):
                found = f"{result.dtype} {list(result.shape)}"
                raise ValueError(f"'{name}' is {found}, declared is {spec.dtype} {list(spec.shape)}")
        return {name: result for (name, _), result in zip(op.outputs, results, strict=True)}

    def call(self, op: Operation) -> tuple[np.ndarray, ...]:
        entry = OPS[op.type]
        plain = {key: self.plain(argument) for key, argument in op.inputs.items()}
        if op.replaces and self.is_free(op, plain["x"]):
            plain["in_place"] = True
        given = {key: self.wide(argument) for key, argument in op.inputs.items()} if entry.computes else plain
        results = entry.function(**given)
        results = tuple(map(np.asarray, results if isinstance(results, tuple) else (results,)))
        if op.replaces:
            self.own[op.replaces] = results[0]
        self.note(op, results)
        if not entry.computes:
            return results
        dtype = self.stored(np.dtype(entry.casts(plain))) if entry.casts else _float_type(plain)
        return tuple(result.astype(dtype, copy=False) if result.dtype.kind == "f" else result for result in results)

    def is_free(self, op: Operation, x: np.ndarray) -> bool:
        """Whether x may be written over: made by this run, and only seen as the state that is replaced next.

        A cache is tens of megabytes, and each layer changes a few rows of it.
        """
        return self.own.get(op.replaces) is x and not any(
            getattr(value, "base", None) is x or (value is x and name not in (op.inputs["x"], op.replaces))
            for name, value in self.values.items()
        )

    def note(self, op: Operation, results: tuple[np.ndarray, ...]) -> None:
        if self.peaks is None:
            return
        for (name, _), result in zip(op.outputs, results, strict=False):
            if result.dtype.kind == "f" and result.size:
                peak = float(np.nan_to_num(np.abs(result).max(), nan=np.inf, posinf=np.inf))
                self.peaks[name] = max(peak, self.peaks.get(name, 0.0))


def _float_type(arguments: dict[str, Any]) -> np.dtype[Any]:
    """The one type of the floats among an operation's arguments."""
    flat = [each for value in arguments.values() for each in (value if isinstance(value, tuple) else (value,))]
    found = {value.dtype for value in flat if isinstance(value, np.ndarray) and value.dtype.kind == "f"}
    if len(found) > 1:
        raise ValueError(f"takes both {' and '.join(sorted(map(str, found)))}")
    return found.pop() if found else SINGLE
