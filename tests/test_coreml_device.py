"""Running a package by Core ML itself, held to the interface of coremltools' MLModel, as there is none on Linux."""

from __future__ import annotations

import inspect
import pathlib
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.models.model import MLState

from mlx_hiermem.convert.coreml.device import Device, open_package
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.mil import function, mb, save, state, tensor
from mlx_hiermem.errors import CoreMLError


class Proxy:
    """What is behind an MLState on a Mac."""

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays

    def read_state(self, name: str) -> np.ndarray:
        return self.arrays[name].copy()

    def write_state(self, name: str, value: np.ndarray) -> None:
        assert (value.dtype, value.shape) == (self.arrays[name].dtype, self.arrays[name].shape)
        assert value.flags.c_contiguous
        self.arrays[name][:] = value


class Model:
    """MLModel's methods with their own parameters, over the interpreter."""

    def __init__(self, model: str, function_name: str | None = None) -> None:
        self.program, self.function = Program.load(model), function_name or "main"

    def make_state(self) -> MLState:
        return MLState(Proxy(self.program.make_state(self.function)))

    def predict(self, data: dict[str, np.ndarray], state: MLState | None = None) -> dict[str, np.ndarray]:
        for name, spec in self.program.functions[self.function].inputs.items():
            assert data[name].dtype == spec.dtype
        if "x" in data and not np.isfinite(data["x"]).all():
            raise RuntimeError("the prediction failed")
        return self.program.run(self.function, data, state.__proxy__.arrays if state else None)


def adding(times: int) -> Any:
    """Adds x so many times to a state, and returns it."""

    def body(inputs: Any) -> list[Any]:
        total = mb.read_state(input=inputs["total"])
        for _ in range(times):
            total = mb.add(x=total, y=inputs["x"])
        total = mb.coreml_update_state(state=inputs["total"], value=total)
        return [mb.mul(x=total, y=np.float16(2), name="doubled")]

    return function({"x": tensor([3]), "total": state([3])}, body)


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A package, and a machine with Core ML."""
    save({"once": adding(1), "twice": adding(2)}, tmp_path / "m.mlpackage")
    monkeypatch.setattr(ct.models, "MLModel", Model)
    monkeypatch.setattr(Device, "is_here", staticmethod(lambda: True))
    return tmp_path / "m.mlpackage"


def test_the_stand_in_has_coremltools_interface() -> None:
    from coremltools.models.model import MLModel

    for ours, theirs in ((Model.__init__, MLModel.__init__), (Model.predict, MLModel.predict)):
        assert set(inspect.signature(ours).parameters) <= set(inspect.signature(theirs).parameters)
    assert set(inspect.signature(MLModel.make_state).parameters) == {"self"}
    for name, parameters in (("read_state", ["self", "name"]), ("write_state", ["self", "name", "value"])):
        assert list(inspect.signature(getattr(MLState, name)).parameters) == parameters


def test_states_are_shared_and_written(package: pathlib.Path) -> None:
    program = open_package(package)
    assert (program.name, set(program.functions)) == ("Core ML", {"once", "twice"})
    total = program.make_state("twice")
    program.run("twice", {"x": [1.0, 2.0, 3.0]}, total)
    found = program.run("once", {"x": [1.0, 1.0, 1.0]}, total)["doubled"]
    assert found.tolist() == [6, 10, 14]
    total.update({"total": np.arange(6.0)[::2]})  # of another type, with strides: as the caller happens to have it
    assert program.run("once", {"x": [1, 1, 1]}, total)["doubled"].tolist() == [2, 6, 10]
    assert {name: array.tolist() for name, array in total.items()} == {"total": [1, 3, 5]}


def test_what_core_ml_does_not_tell(package: pathlib.Path) -> None:
    program = open_package(package)
    total = program.make_state("once")
    with pytest.raises(CoreMLError, match=r"Core ML tells no peaks"):
        program.run("once", {"x": [1, 1, 1]}, total, peaks={})
    with pytest.raises(CoreMLError, match=r"Core ML cannot run once of .*m\.mlpackage: the prediction failed"):
        program.run("once", {"x": [np.inf, 1, 1]}, total)


def test_the_interpreter_where_there_is_no_core_ml(tmp_path: pathlib.Path) -> None:
    save({"main": adding(1)}, tmp_path / "m.mlpackage")
    assert type(open_package(tmp_path / "m.mlpackage")) is (Device if Device.is_here() else Program)
