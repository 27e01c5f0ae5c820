"""A package run by Core ML itself, where there is one (macOS 15), with the interface of the interpreter.

Nothing here has run on a Mac yet; on Linux the tests hold it to the documented interface of coremltools' MLModel.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.interpreter import Program, State
from mlx_hiermem.convert.coreml.program import FunctionSpec, read_program
from mlx_hiermem.errors import CoreMLError


def open_package(package: pathlib.Path) -> Program:
    """Core ML on a Mac, the interpreter elsewhere."""
    return Device(package) if Device.is_here() else Program.load(package)


class Device(Program):
    """A package's functions, each a model of its own; a state made for one serves all that have the same states."""

    name = "Core ML"

    def __init__(self, package: pathlib.Path) -> None:
        super().__init__(read_program(package))
        self.package = package
        self.models: dict[str, Any] = {}

    @staticmethod
    def is_here() -> bool:
        """Whether coremltools found Core ML."""
        from coremltools.models import model

        return model._MLModelProxy is not None

    def model(self, function: str) -> Any:
        if function not in self.models:
            import coremltools as ct

            named = {"function_name": function} if len(self.functions) > 1 else {}
            self.models[function] = ct.models.MLModel(str(self.package), **named)
        return self.models[function]

    def make_state(self, function: str) -> State:
        return DeviceState(self.model(function).make_state(), self.functions[function])

    def run(
        self,
        function: str,
        inputs: Mapping[str, Any],
        state: State | None = None,
        *,
        fp16: bool = True,
        peaks: dict[str, float] | None = None,
    ) -> dict[str, np.ndarray]:
        """As `Program.run`; Core ML tells no peaks."""
        if peaks is not None or not fp16:
            raise CoreMLError("Core ML tells no peaks, and rounds as it does", "Use the interpreter.")
        specs = self.functions[function].inputs
        given = {name: np.asarray(inputs[name]).astype(spec.dtype) for name, spec in specs.items()}
        try:
            model = self.model(function)
            found = model.predict(given, state.handle) if isinstance(state, DeviceState) else model.predict(given)
        except (RuntimeError, ValueError) as error:
            raise CoreMLError(f"Core ML cannot run {function} of {self.package}: {error}") from error
        return {name: np.asarray(found[name]) for name in self.functions[function].outputs}


class DeviceState(MutableMapping[str, np.ndarray]):
    """An MLState as a mapping: reading copies, writing copies."""

    def __init__(self, handle: Any, function: FunctionSpec) -> None:
        self.handle, self.specs = handle, function.states

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.handle.read_state(name))

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        self.handle.write_state(name, np.ascontiguousarray(value, self.specs[name].dtype))

    def __delitem__(self, name: str) -> None:
        raise CoreMLError(f"the state {name} cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)
