"""The interpreter's operations, each against its definition in PyTorch, through a package on disk.

All of them are in one package: one function in float16, one in float32, built by coremltools, which also checks
that they are used as Core ML allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mil_cases import CASES

from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.mil import function, mb, save, types
from mlx_hiermem.convert.coreml.ops import OPS

DTYPES = {"float16": types.fp16, "float32": types.fp32}


def build(dtype: str) -> Any:
    """All cases as one function; case n has the inputs n_0, n_1, …"""
    placeholders = {
        f"in_{n}_{k}": mb.placeholder(x.shape, DTYPES[dtype] if x.dtype == np.float32 else types.int32)
        for n, case in enumerate(CASES)
        for k, x in enumerate(case.inputs)
    }

    def cast(value: Any) -> Any:
        return np.asarray(value).astype(dtype)

    def body(inputs: Any) -> list[Any]:
        outputs = []
        for n, case in enumerate(CASES):
            made = case.build(cast, *(inputs[f"in_{n}_{k}"] for k in range(len(case.inputs))))
            for k, value in enumerate(made if isinstance(made, (list, tuple)) else (made,)):
                if value.dtype == types.bool:
                    value = mb.cast(x=value, dtype="int32")  # no type of an output
                outputs.append(mb.identity(x=value, name=f"out_{n}_{k}"))
        return outputs

    return function(placeholders, body)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    package = tmp_path_factory.mktemp("ops") / "ops.mlpackage"
    save({dtype: build(dtype) for dtype in DTYPES}, package)
    program = Program.load(package)
    inputs = {f"in_{n}_{k}": x for n, case in enumerate(CASES) for k, x in enumerate(case.inputs)}
    return {dtype: program.run(dtype, inputs) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(len(CASES)), ids=[f"{n}-{case.name}" for n, case in enumerate(CASES)])
def test_operation(results: dict[str, dict[str, np.ndarray]], n: int, dtype: str) -> None:
    case = CASES[n]
    tensors = [torch.from_numpy(x.astype(np.float64) if x.dtype == np.float32 else x) for x in case.inputs]
    expected = case.expected(*tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = [results[dtype][f"out_{n}_{k}"] for k in range(len(expected))]
    assert f"out_{n}_{len(expected)}" not in results[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == tuple(theirs.shape)
        if theirs.dtype.is_floating_point:
            # float16: two units in the last place; of values near 0 that of a number like 0.02
            with np.errstate(over="ignore"):
                theirs = theirs.numpy().astype(ours.dtype)
            rtol, atol = (2e-3, 2e-5) if ours.dtype == np.float16 else (3e-6, 3e-7)
            np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol, atol)
        else:
            np.testing.assert_array_equal(ours, theirs.numpy())


def test_every_operation_has_a_case() -> None:
    """Those of compressed constants are in test_coreml_interpreter.py."""
    assert {name for name in OPS if not name.startswith("constexpr_")} == {case.name for case in CASES}
