"""What is in a saved .mlpackage: functions, their operations and constants, as plain dataclasses.

Read from its protobuf by the message classes of coremltools alone, none of its runtime, and checked for what a
program must have before it can run: every name defined before its use, interfaces as described.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.weights import DTYPES, WeightFile, decode, numpy_dtype
from mlx_hiermem.errors import CoreMLError, MissingDependencyError
from mlx_hiermem.files import parse_json

MODEL_PATH = "@model_path/"
DAMAGED = "Export the model again."
# What the package's description calls the types of inputs and outputs.
FEATURE_DTYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131080: "int8", 131104: "int32"}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of an input, output or state; None in a shape is a size that is only known at run time.

    `shapes` lists the allowed ones where there are several; `shape` is then the default.
    """

    shape: tuple[int | None, ...]
    dtype: str
    shapes: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    def allows(self, shape: tuple[int, ...]) -> bool:
        if self.shapes:
            return shape in self.shapes
        return len(shape) == len(self.shape) and all(
            want in (None, size) for want, size in zip(self.shape, shape, strict=True)
        )


class Constant:
    """A constant of the program: `value` as stored, `wide` for arithmetic, cast once. `sources` made it."""

    def __init__(self, value: Any, sources: Any = None) -> None:
        self.value, self.sources = value, sources

    @cached_property
    def wide(self) -> Any:
        is_half = isinstance(self.value, np.ndarray) and self.value.dtype == np.float16
        return self.value.astype(np.float32) if is_half else self.value


Argument = str | Constant  # a name, or a value written in place


@dataclass(frozen=True)
class Operation:
    """`inputs`: parameter -> one argument, or a tuple of them. `outputs`: names and declared types."""

    type: str
    name: str
    inputs: dict[str, Argument | tuple[Argument, ...]]
    outputs: tuple[tuple[str, TensorSpec], ...]
    last_uses: tuple[str, ...] = ()  # values that no later operation needs
    replaces: str = ""  # the state that this operation's result is written to next, in place of its `x`

    def __str__(self) -> str:
        return f"{self.type} '{self.name}'"

    def value(self) -> Constant:
        """Of a const."""
        value = self.inputs.get("val")
        if not isinstance(value, Constant):
            raise CoreMLError(f"{self} has no value")
        return value

    def names(self) -> Iterator[str]:
        for argument in self.inputs.values():
            for each in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(each, str):
                    yield each


@dataclass(frozen=True)
class FunctionSpec:
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    states: dict[str, TensorSpec]
    constants: dict[str, Constant]
    operations: tuple[Operation, ...]  # the others


def read_program(package: pathlib.Path) -> dict[str, FunctionSpec]:
    """The functions of a package (one without named functions has `main`).

    Raises CoreMLError where the package is damaged, no ML program, or contradicts itself, MissingDependencyError
    without coremltools.
    """
    file = _model_file(package)
    model = _parse(file)
    if model.WhichOneof("Type") != "mlProgram":
        raise CoreMLError(f"{package} is no ML program but {model.WhichOneof('Type') or 'nothing'}")
    reader = _ProtobufReader(file.parent)
    described = {one.name: one for one in model.description.functions} or {"main": model.description}
    functions = model.mlProgram.functions
    if set(described) != set(functions):
        raise CoreMLError(f"{package} describes {sorted(described)} but has {sorted(functions)}")
    return {name: reader.function(name, functions[name], described[name]) for name in described}


def _model_file(package: pathlib.Path) -> pathlib.Path:
    try:
        manifest = parse_json((package / "Manifest.json").read_text(encoding="utf-8"))
        path = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CoreMLError(f"{package} is no .mlpackage: {error}", DAMAGED) from error
    return package / "Data" / path


def _parse(file: pathlib.Path) -> Any:
    try:
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingDependencyError(
            "reading a Core ML package needs coremltools", "pip install 'mlx-hiermem[coreml]'"
        ) from error
    try:
        model = Model_pb2.Model()
        model.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise CoreMLError(f"cannot read {file}: {error}", DAMAGED) from error
    return model


class _ProtobufReader:
    """Reads functions, and each blob once however many functions use it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.files: dict[str, WeightFile] = {}
        self.constants: dict[tuple[Any, ...], Constant] = {}

    def function(self, name: str, function: Any, described: Any) -> FunctionSpec:
        inputs, states = dict[str, TensorSpec](), dict[str, TensorSpec]()
        for one in function.inputs:
            is_state = one.type.WhichOneof("type") == "stateType"
            kind = one.type.stateType.wrappedType if is_state else one.type
            (states if is_state else inputs)[one.name] = _tensor_spec(kind)
        try:
            block = function.block_specializations[function.opset]
            operations = tuple(map(self.operation, block.operations))
        except CoreMLError as error:
            raise CoreMLError(f"function {name}: {error.what}", error.hint) from error
        produced = {out: spec for op in operations for out, spec in op.outputs}
        missing = [out for out in block.outputs if out not in produced]
        if missing:
            raise CoreMLError(f"function {name} computes no '{missing[0]}', which it declares as output")
        outputs = {out: produced[out] for out in block.outputs}
        return FunctionSpec(
            _agree(name, "input", inputs, described.input),
            _agree(name, "output", outputs, described.output),
            _agree(name, "state", states, described.state),
            {op.outputs[0][0]: op.value() for op in operations if op.type == "const"},
            _planned(name, operations, {*inputs, *states}, set(outputs)),
        )

    def operation(self, op: Any) -> Operation:
        attributes = dict(op.attributes)
        name = attributes.pop("name").immediateValue.tensor.strings.values[0] if "name" in attributes else ""
        try:
            # const has its value there, and so have the compressed constants before iOS 18.
            inputs: dict[str, Any] = {key: self.value(value) for key, value in attributes.items()}
            for key, argument in op.inputs.items():
                found = tuple(map(self.argument, argument.arguments))
                inputs[key] = found if key == "values" else found[0]
            outputs = tuple((out.name, _tensor_spec(out.type)) for out in op.outputs)
        except (CoreMLError, ValueError) as error:
            what = error.what if isinstance(error, CoreMLError) else str(error)
            raise CoreMLError(f"{op.type} '{name}': {what}", DAMAGED) from error
        return Operation(op.type, name, inputs, outputs)

    def argument(self, binding: Any) -> Argument:
        return binding.name if binding.WhichOneof("binding") == "name" else self.value(binding.value)

    def value(self, value: Any) -> Constant:
        if value.WhichOneof("value") == "blobFileValue":
            return self.blob(value.blobFileValue, _tensor_spec(value.type))
        if value.type.WhichOneof("type") != "tensorType":
            raise CoreMLError(f"has a value of {value.type.WhichOneof('type')}, which is not supported")
        return Constant(_immediate(value.immediateValue.tensor, _tensor_spec(value.type)))

    def blob(self, blob: Any, spec: TensorSpec) -> Constant:
        key = (blob.fileName, blob.offset, spec.shape, spec.dtype)
        if key not in self.constants:
            if not blob.fileName.startswith(MODEL_PATH):
                raise CoreMLError(f"its weights are in {blob.fileName}, outside the package")
            path = blob.fileName.removeprefix(MODEL_PATH)
            file = self.files.setdefault(path, WeightFile(self.folder / path))
            self.constants[key] = Constant(file.read(blob.offset, known(spec), spec.dtype))
        return self.constants[key]


def _tensor_spec(kind: Any) -> TensorSpec:
    tensor = kind.tensorType
    if kind.WhichOneof("type") != "tensorType" or tensor.dataType not in DTYPES:
        raise CoreMLError(f"has the type {kind.WhichOneof('type')} {tensor.dataType}, which is not supported")
    dims = [one.constant.size if one.WhichOneof("dimension") == "constant" else None for one in tensor.dimensions]
    return TensorSpec(tuple(dims), DTYPES[tensor.dataType])


def known(spec: TensorSpec) -> tuple[int, ...]:
    if None in spec.shape:
        raise CoreMLError(f"a constant of the unknown shape {spec.shape}")
    return tuple(size for size in spec.shape if size is not None)


def _immediate(tensor: Any, spec: TensorSpec) -> Any:
    """A value written in the program: text, or an array."""
    kind = tensor.WhichOneof("value")
    if kind == "strings":
        return tensor.strings.values[0]
    shape = known(spec)
    if kind == "bytes":
        return decode(tensor.bytes.values, shape, spec.dtype)
    return np.array(getattr(tensor, kind).values, spec.dtype).reshape(shape)


def _agree(name: str, role: str, specs: dict[str, TensorSpec], described: Any) -> dict[str, TensorSpec]:
    """Specs with the enumerated shapes of the description; CoreMLError where the two differ."""
    features = {one.name: one.type for one in described}
    if set(features) != set(specs):
        raise CoreMLError(f"function {name} has the {role}s {sorted(specs)}, described are {sorted(features)}")
    agreed = {}
    for key, spec in specs.items():
        kind = features[key]
        array = kind.stateType.arrayType if role == "state" else kind.multiArrayType
        shape, dtype = tuple(array.shape), FEATURE_DTYPES.get(array.dataType, str(array.dataType))
        if array.WhichOneof("ShapeFlexibility") == "shapeRange":
            raise CoreMLError(f"{role} {key} of {name} has a range of shapes", "Only listed shapes are supported.")
        shapes = tuple(tuple(one.shape) for one in array.enumeratedShapes.shapes)
        fits = dtype == spec.dtype and all(spec.allows(one) for one in (shapes or (shape,)) if one)
        if not fits:
            raise CoreMLError(
                f"{role} {key} of {name} is {spec.dtype} {list(spec.shape)}, described as {dtype} {list(shape)}"
            )
        agreed[key] = TensorSpec(shape or spec.shape, dtype, shapes)
    return agreed


def _planned(
    name: str, operations: tuple[Operation, ...], given: set[str], kept: set[str]
) -> tuple[Operation, ...]:
    """The operations but constants, with notes of which values may be dropped or written over.

    CoreMLError for a name used before it is defined, or defined twice.
    """
    defined, last, constants = set(given), {}, set()
    for index, op in enumerate(operations):
        for used in op.names():
            if used not in defined:
                raise CoreMLError(f"function {name}: {op} uses '{used}' before it is computed", DAMAGED)
            last[used] = index
        for out, _ in op.outputs:
            if out in defined:
                raise CoreMLError(f"function {name}: {op} computes '{out}' again", DAMAGED)
            defined.add(out)
            last[out] = index
            if op.type == "const":
                constants.add(out)
    drop: dict[int, list[str]] = {}
    for used, index in last.items():
        if used not in kept and used not in given and used not in constants:
            drop.setdefault(index, []).append(used)
    noted = [replace(op, last_uses=tuple(drop.get(index, ()))) for index, op in enumerate(operations)]
    noted = [op for op in noted if op.type != "const"]
    return tuple(_replacing(op, following) for op, following in zip(noted, [*noted[1:], None], strict=True))


def _replacing(op: Operation, following: Operation | None) -> Operation:
    """Notes the state whose part an operation changes, if nothing but that state needs what was there."""
    if op.type != "slice_update" or following is None or following.type != "write_state":
        return op
    changes = following.inputs.get("data") == op.outputs[0][0] and op.inputs.get("x") in op.last_uses
    return replace(op, replaces=str(following.inputs["input"])) if changes else op
