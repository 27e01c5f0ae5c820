"""The interpreter on a package with two functions and a state: what it computes, and every damage it must find."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coremltools.proto import Model_pb2

from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.mil import Weights, function, mb, save, state, tensor
from mlx_hiermem.errors import CoreMLError

rng = np.random.default_rng(0)
TABLE = rng.standard_normal((9, 4)).astype(np.float16)
PROJECTION = rng.standard_normal((8, 4)).astype(np.float16)
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"


def reading(tokens: int) -> Any:
    """Embeds ids, writes them from `position` on into a state of 6 rows, and returns the sums of its rows."""

    def body(inputs: Any) -> list[Any]:
        rows = mb.gather(x=weights.constant("table", TABLE), indices=inputs["ids"], name="rows")
        rows = mb.linear(x=rows, weight=weights.constant("projection", PROJECTION), name="projected")
        begin = mb.concat(values=[inputs["position"], [0]], axis=0)
        end = mb.concat(values=[mb.add(x=inputs["position"], y=[tokens]), [8]], axis=0)
        cache = mb.slice_update(x=mb.read_state(input=inputs["cache"]), update=rows, begin=begin, end=end)
        cache = mb.coreml_update_state(state=inputs["cache"], value=cache)
        return [mb.reduce_sum(x=cache, axes=[1], name="sums")]

    weights = Weights()
    inputs = {"ids": tensor([tokens], "int32"), "position": tensor([1], "int32"), "cache": state([6, 8])}
    return function(inputs, body)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("package") / "two.mlpackage"
    save({"one": reading(1), "three": reading(3)}, out)
    return out


@pytest.fixture
def copy(package: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """To be damaged."""
    return shutil.copytree(package, tmp_path / "copy.mlpackage")


def rows(ids: list[int]) -> np.ndarray:
    return (TABLE[ids].astype(np.float32) @ PROJECTION.astype(np.float32).T).astype(np.float16)


def test_functions_share_states(package: pathlib.Path) -> None:
    program = Program.load(package)
    three = program.functions["three"]
    assert {name: (spec.shape, spec.dtype) for name, spec in three.inputs.items()} == {
        "ids": ((3,), "int32"),
        "position": ((1,), "int32"),
    }
    assert (three.states["cache"].shape, three.outputs["sums"].shape) == ((6, 8), (6,))
    cache = program.make_state("three")
    program.run("three", {"ids": [1, 2, 3], "position": [0]}, cache)
    sums = program.run("one", {"ids": [8], "position": [3]}, cache)["sums"]
    expected = np.zeros((6, 8), np.float16)
    expected[:4] = rows([1, 2, 3, 8])
    np.testing.assert_array_equal(cache["cache"], expected)
    np.testing.assert_array_equal(sums, expected.astype(np.float32).sum(1).astype(np.float16))
    cache["cache"][:2] = 0  # the caller writes, as an app does that swaps a memory
    expected[:2], expected[4] = 0, rows([5])[0]
    program.run("one", {"ids": [5], "position": [4]}, cache)
    np.testing.assert_array_equal(cache["cache"], expected)


def test_a_weight_of_two_functions_is_stored_once(package: pathlib.Path) -> None:
    """64 bytes of header, and for each tensor 64 of record and its values, aligned to 64."""
    assert (package / WEIGHTS).stat().st_size == 64 + (64 + 128) + (64 + 64)


def test_a_failed_run_leaves_the_state(package: pathlib.Path) -> None:
    program = Program.load(package)
    cache = program.make_state("three")
    program.run("three", {"ids": [1, 2, 3], "position": [0]}, cache)
    before = cache["cache"].copy()
    with pytest.raises(CoreMLError, match=r"slice_update 'slice_update_0': 4:7 is out of bounds for axis 0 of 6"):
        program.run("three", {"ids": [1, 2, 3], "position": [4]}, cache)
    with pytest.raises(CoreMLError, match=r"gather 'rows': index 9 is out of bounds for 9 rows"):
        program.run("three", {"ids": [1, 9, 3], "position": [0]}, cache)
    with pytest.raises(CoreMLError, match=r"gather 'rows': index -1 is out of bounds"):
        program.run("three", {"ids": [1, -1, 3], "position": [0]}, cache)
    np.testing.assert_array_equal(cache["cache"], before)


def test_inputs_are_checked(package: pathlib.Path) -> None:
    program = Program.load(package)
    cache = program.make_state("one")
    for inputs, message in (
        ({"ids": [1]}, r"the inputs \['ids'\] were given. Give \['ids', 'position'\]"),
        ({"ids": [1, 2], "position": [0]}, r"the input ids is int64 \[2\]. Give int32 \[1\]"),
        ({"ids": [1.5], "position": [0]}, r"the input ids is float64 \[1\]. Give int32 \[1\]"),
    ):
        with pytest.raises(CoreMLError, match=message):
            program.run("one", inputs, cache)
    given = {"ids": [1], "position": [0]}
    with pytest.raises(CoreMLError, match=r"the state cache is float16 \[6, 7\]"):
        program.run("one", given, {"cache": cache["cache"][:, :7]})
    with pytest.raises(CoreMLError, match=r"the states \[\] were given. Give \['cache'\]"):
        program.run("one", given)
    with pytest.raises(CoreMLError, match=r"no function 'two'. It has one, three"):
        program.run("two", given, cache)


def test_rounding_and_peaks(package: pathlib.Path) -> None:
    """float16 between operations, unless asked otherwise; peaks are of the values before that."""
    program = Program.load(package)
    exact = TABLE[[7]].astype(np.float32) @ PROJECTION.astype(np.float32).T
    cache, peaks = program.make_state("one"), {"projected": 0.5}
    given = {"ids": [7], "position": [0]}
    program.run("one", given, cache, fp16=False, peaks=peaks)
    np.testing.assert_allclose(cache["cache"][:1], exact, rtol=1e-6)
    assert peaks["projected"] == pytest.approx(float(np.abs(exact).max()), rel=1e-6)
    assert peaks["rows"] == np.abs(TABLE[7]).max()
    cache["cache"] = np.full((6, 8), 60_000, np.float16)
    sums = program.run("one", given, cache, peaks=peaks)["sums"]
    assert cache["cache"].dtype == np.float16
    assert sums[1] == np.inf
    assert peaks["sums"] == 480_000 - 480_000 % 32 * 8  # 59 968 is the next number to 60 000 that float16 has


def edit(package: pathlib.Path, change: Callable[[Any], Any]) -> None:
    """Changes the saved protobuf."""
    model = Model_pb2.Model()
    model.ParseFromString((package / MODEL).read_bytes())
    change(model)
    (package / MODEL).write_bytes(model.SerializeToString())


def operation(model: Any, kind: str) -> Any:
    (block,) = model.mlProgram.functions["three"].block_specializations.values()
    return next(op for op in block.operations if op.type == kind)


def declared(op: Any) -> Any:
    return op.outputs[0].type.tensorType


def weight(model: Any) -> Any:
    return operation(model, "const").attributes["val"]


def load_and_run(package: pathlib.Path) -> None:
    program = Program.load(package)
    program.run("three", {"ids": [1, 2, 3], "position": [0]}, program.make_state("three"))


DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (lambda m: declared(operation(m, "linear")).dimensions[1].constant.__setattr__("size", 9),
              r"linear 'projected': 'projected' is float16 \[3, 8\], declared is float16 \[3, 9\]"),
    "type": (lambda m: setattr(declared(operation(m, "linear")), "dataType", 11),
             r"linear 'projected': 'projected' is float16 \[3, 8\], declared is float32 \[3, 8\]"),
    "parameter": (lambda m: operation(m, "gather").inputs["rows"].CopyFrom(operation(m, "gather").inputs["x"]),
                  r"gather 'rows': .*unexpected keyword argument 'rows'"),
    "operation": (lambda m: setattr(operation(m, "linear"), "type", "conv"),
                  r"function three: the interpreter has no operation conv 'projected'"),
    "name": (lambda m: setattr(operation(m, "linear").inputs["x"].arguments[0], "name", "nowhere"),
             r"function three: linear 'projected' uses 'nowhere' before it is computed"),
    "blob type": (lambda m: setattr(weight(m).type.tensorType, "dataType", 22),
                  r"the blob at 64 .*is float16, declared is int16"),
    "blob size": (lambda m: weight(m).type.tensorType.dimensions[0].constant.__setattr__("size", 10),
                  r"the blob at 64 .*has 72 bytes, a float16 \[10, 4\] has 80"),
    "blob place": (lambda m: setattr(weight(m).blobFileValue, "offset", 80), r"the blob at 80 .*has no record"),
    "blob beyond": (lambda m: setattr(weight(m).blobFileValue, "offset", 1 << 40), r"is beyond its end"),
    "other file": (lambda m: setattr(weight(m).blobFileValue, "fileName", "@model_path/weights/0.bin"),
                   r"cannot read .*0\.bin"),
    "described": (lambda m: m.description.functions[1].input[0].type.multiArrayType.shape.__setitem__(0, 4),
                  r"input ids of three is int32 \[3\], described as int32 \[4\]"),
    "described state": (lambda m: m.description.functions[1].ClearField("state"),
                        r"function three has the states \['cache'\]"),
    "functions": (lambda m: m.description.functions.pop(), r"describes \['one'\] but has \['one', 'three'\]"),
    "kind": (lambda m: m.ClearField("mlProgram"), r"is no ML program"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_contradictions_are_found(name: str, copy: pathlib.Path) -> None:
    change, message = DAMAGES[name]
    edit(copy, change)
    with pytest.raises(CoreMLError, match=message) as caught:
        load_and_run(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [(WEIGHTS, "is cut off"), (MODEL, r"cannot read .*model\.mlmodel"), ("Manifest.json", "no .mlpackage")],
)
def test_truncated_files_are_found(name: str, message: str, copy: pathlib.Path) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) - 20])
    with pytest.raises(CoreMLError, match=message):
        Program.load(copy)
    (copy / name).unlink()
    with pytest.raises(CoreMLError, match=r"cannot read|no \.mlpackage"):
        Program.load(copy)
    with pytest.raises(CoreMLError, match=r"is no \.mlpackage"):
        Program.load(copy.parent)


def test_a_state_changed_twice_keeps_what_others_still_see(tmp_path: pathlib.Path) -> None:
    """An update may take the place of its state's old value, unless that is still looked at, as a part or whole."""

    def body(inputs: Any) -> list[Any]:
        kept = []
        for row in range(4):
            before = mb.read_state(input=inputs["cache"])
            kept.append(mb.slice_by_index(x=before, begin=[0, 0], end=[2, 2]) if row < 3 else before)
            after = mb.slice_update(x=before, update=inputs["x"], begin=[row % 2, 0], end=[row % 2 + 1, 2])
            mb.coreml_update_state(state=inputs["cache"], value=after)
        return [mb.mul(x=each, y=np.float16(row + 1), name=f"before_{row}") for row, each in enumerate(kept)]

    save({"main": function({"x": tensor([1, 2]), "cache": state([2, 2])}, body)}, tmp_path / "m.mlpackage")
    program = Program.load(tmp_path / "m.mlpackage")
    given = np.full((2, 2), 7, np.float16)
    cache = {"cache": given}
    found = program.run("main", {"x": np.float16([[1, 2]])}, cache)
    expected = np.float16([[[7, 7], [7, 7]], [[1, 2], [7, 7]], [[1, 2], [1, 2]], [[1, 2], [1, 2]]])
    for row in range(4):
        np.testing.assert_array_equal(found[f"before_{row}"], expected[row] * (row + 1))
    np.testing.assert_array_equal(cache["cache"], expected[3])
    assert (given == 7).all()
