"""Runs an `.aimodel` by Apple's own runtime: its interpreter on Linux, Core AI itself on a Mac.

With the interface of the Core ML interpreter (`coreml/interpreter.py`), so that the same checks run on both.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import sys
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.interpreter import State as AnyState
from mlx_hiermem.convert.coreml.program import FunctionSpec, TensorSpec, known
from mlx_hiermem.errors import CoreAIError, MissingDependencyError
from mlx_hiermem.files import file_digest, reason


class State(MutableMapping[str, np.ndarray]):
    """States that the caller owns: reading copies, writing replaces."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.arrays = {name: _array(np.zeros(known(spec), spec.dtype)) for name, spec in specs.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array(self.arrays[name].numpy())

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        if name not in self.specs:
            raise CoreAIError(f"there is no state {name}")
        self.arrays[name] = _array(np.ascontiguousarray(value, self.specs[name].dtype))

    def __delitem__(self, name: str) -> None:
        raise CoreAIError(f"the state {name} cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class Runtime(Program):
    """An asset's functions. Compiled when it is opened, into a folder that goes when it is closed."""

    name = "Core AI" if sys.platform == "darwin" else "Core AI's interpreter"

    def __init__(self, asset: pathlib.Path) -> None:
        coreai = _coreai()
        _check(asset)
        self._loop = asyncio.Runner()
        self._context = contextlib.AsyncExitStack()
        self._loads: dict[str, Any] = {}
        self._held: dict[str, tuple[np.ndarray, Any]] = {}  # inputs of the last call: a memory stays the same
        self._close = weakref.finalize(self, _close, self._loop, self._context)
        try:
            executable = coreai.AIModelAsset.load(asset).executable()
            self._model = self._loop.run(self._context.enter_async_context(executable))
            super().__init__({name: self._describe(name) for name in self._model.function_names})
        except (RuntimeError, ValueError, OSError) as error:
            raise CoreAIError(f"{asset} cannot be opened: {error}", "Export the model again.") from error

    @classmethod
    def load(cls, package: pathlib.Path | str) -> Runtime:
        return cls(pathlib.Path(package))

    def close(self) -> None:
        self._close()

    def make_state(self, function: str) -> State:
        return State(self.functions[function].states)

    def run(
        self,
        function: str,
        inputs: Mapping[str, Any],
        state: AnyState | None = None,
        *,
        fp16: bool = True,
        peaks: dict[str, float] | None = None,
    ) -> dict[str, np.ndarray]:
        """Outputs by name; `state` is written. It rounds as it does and tells no peaks."""
        if peaks is not None or not fp16:
            raise CoreAIError("Core AI tells no peaks, and rounds as it does")
        specs = self.functions[function].inputs
        if missing := [name for name in specs if name not in inputs]:
            raise CoreAIError(f"{function} is not given {missing[0]}")
        given = {name: self._given(name, np.asarray(inputs[name]), spec) for name, spec in specs.items()}
        states = dict(state.arrays) if isinstance(state, State) else {}
        try:
            out = self._loop.run(self._call(self._load(function), given, states))
        except (RuntimeError, ValueError) as error:
            raise CoreAIError(f"{function} cannot be run: {error}") from error
        return {name: np.array(value.numpy()) for name, value in out.items()}

    def _given(self, name: str, value: np.ndarray, spec: TensorSpec) -> Any:
        held = self._held.get(name)
        if held is None or held[0] is not value:
            held = self._held[name] = (value, _array(np.ascontiguousarray(value, spec.dtype)))
        return held[1]

    def _load(self, function: str) -> Any:
        if function not in self._loads:
            self._loads[function] = self._model.load_function(function)
        return self._loads[function]

    @staticmethod
    async def _call(function: Any, inputs: dict[str, Any], states: dict[str, Any]) -> Any:
        return await function(inputs, states)

    def _describe(self, name: str) -> FunctionSpec:
        described = self._load(name).desc

        def specs(names: list[str], descriptor: Any) -> dict[str, TensorSpec]:
            return {one: TensorSpec(tuple(descriptor(one).shape), descriptor(one).dtype) for one in names}

        return FunctionSpec(
            specs(described.input_names, described.input_descriptor),
            specs(described.output_names, described.output_descriptor),
            specs(described.state_names, described.state_descriptor),
            constants={},
            operations=(),
        )


def _check(asset: pathlib.Path) -> None:
    """Raises CoreAIError for an asset that is not what was saved: the runtime would end the process."""
    try:
        told, digest = (asset / "main.hash").read_bytes(), file_digest(asset / "main.mlirb")
    except OSError as error:
        raise CoreAIError(f"{asset} is no Core AI asset: {reason(error)}", "Export the model again.") from error
    if told.hex() != digest:
        raise CoreAIError(f"the program in {asset} has changed", "Export the model again.")


def _close(loop: asyncio.Runner, context: contextlib.AsyncExitStack) -> None:
    loop.run(context.aclose())
    loop.close()


def _coreai() -> Any:
    try:
        from coreai.authoring import asset
    except ImportError as error:
        raise MissingDependencyError(
            "running a Core AI model needs coreai-core", "pip install 'mlx-hiermem[coreai]'"
        ) from error
    return asset


def _array(value: np.ndarray) -> Any:
    from coreai.runtime import NDArray

    return NDArray(value)
