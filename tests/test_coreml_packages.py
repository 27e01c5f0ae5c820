"""The interpreter on packages that coremltools made by itself: converted from PyTorch, and compressed."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.mil import ct, function, mb, save, tensor, types
from mlx_hiermem.errors import CoreMLError

# coremltools 9 converts traced models, which newer PyTorch no longer likes.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "torch.jit.TracerWarning")
]
rng = np.random.default_rng(0)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.qkv = nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 96)
        self.inner, self.out = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part.reshape(1, -1, 4, 8).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 32)
        return x + self.out(nn.functional.gelu(self.inner(x + mixed)))


def converted(model: nn.Module, example: Tensor, path: pathlib.Path, **how: Any) -> Any:
    """A model by coremltools' own converter, in float16, saved."""
    made = ct.convert(torch.jit.trace(model.eval(), example), skip_model_load=True, **how)
    made.save(str(path))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("target", [ct.target.iOS16, ct.target.iOS18], ids=["iOS16", "iOS18"])
def test_the_converters_packages(target: Any, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model, ids = Encoder(), torch.arange(8)[None]
    shapes = ct.EnumeratedShapes([(1, 4), (1, 8)], default=(1, 8))
    inputs = [ct.TensorType("ids", shapes, np.int32)]
    outputs = [ct.TensorType("y")]
    converted(
        model, ids, tmp_path / "m.mlpackage", inputs=inputs, outputs=outputs, minimum_deployment_target=target
    )
    program = Program.load(tmp_path / "m.mlpackage")
    assert set(program.functions["main"].inputs["ids"].shapes) == {(1, 4), (1, 8)}
    for count in (4, 8):
        y = program.run("main", {"ids": ids[:, :count].numpy()})["y"]
        np.testing.assert_allclose(y, model(ids[:, :count]).detach().numpy(), atol=5e-3)
    with pytest.raises(CoreMLError, match=r"the input ids is int64 \[1, 6\]. Give int32 \[1, 8\] or \[1, 4\]"):
        program.run("main", {"ids": ids[:, :6].numpy()})


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.total[1:2] = self.total[1:2] + x
        return self.total.sum(1)


def test_the_converters_states(tmp_path: pathlib.Path) -> None:
    kind = ct.StateType(ct.TensorType(shape=(3, 4), dtype=np.float16), name="total")
    how = {"inputs": [ct.TensorType("x", (1, 4))], "states": [kind], "minimum_deployment_target": ct.target.iOS18}
    converted(Total(), torch.ones(1, 4), tmp_path / "m.mlpackage", outputs=[ct.TensorType("y")], **how)
    program = Program.load(tmp_path / "m.mlpackage")
    total = program.make_state("main")
    for times in (1, 2, 3):
        y = program.run("main", {"x": np.full((1, 4), 0.5)}, total)["y"]
        assert y.tolist() == [0, 2.0 * times, 0]
    assert total["total"].tolist() == [[0] * 4, [1.5] * 4, [0] * 4]


LINEAR, PALETTE, PRUNE = cto.OpLinearQuantizerConfig, cto.OpPalettizerConfig, cto.OpMagnitudePrunerConfig
BLOCKS = {"granularity": "per_block", "block_size": 16}
COMPRESSIONS: dict[str, tuple[Callable[..., Any], Any, float, str]] = {
    "int8": (cto.linear_quantize_weights, LINEAR(weight_threshold=1), 0.02, "both"),
    "uint8": (cto.linear_quantize_weights, LINEAR("linear", np.uint8, weight_threshold=1), 0.02, "both"),
    "palette": (cto.palettize_weights, PALETTE("uniform", nbits=6, weight_threshold=1), 0.1, "both"),
    "sparse": (cto.prune_weights, PRUNE(target_sparsity=0.3, weight_threshold=1), 0.3, "both"),
    "int4": (cto.linear_quantize_weights, LINEAR(dtype="int4", weight_threshold=1, **BLOCKS), 0.3, "iOS18"),
    "uint4": (cto.linear_quantize_weights, LINEAR("linear", "uint4", weight_threshold=1, **BLOCKS), 0.3, "iOS18"),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_compressed_packages(target: str, tmp_path: pathlib.Path) -> None:
    """The same as coremltools' own decompression of the same package, and near what was compressed."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)), torch.randn(3, 64)
    how = {"inputs": [ct.TensorType("x", (3, 64))], "outputs": [ct.TensorType("y")]}
    made = converted(
        model, x, tmp_path / "m.mlpackage", minimum_deployment_target=getattr(ct.target, target), **how
    )
    exact = model(x).detach().numpy()
    for name, (compress, how_to, bound, where) in COMPRESSIONS.items():
        if where not in ("both", target):
            continue
        small = compress(made, config=cto.OptimizationConfig(global_config=how_to))
        results = []
        for form in (small, cto.decompress_weights(small)):
            shutil.rmtree(tmp_path / "s.mlpackage", ignore_errors=True)
            form.save(str(tmp_path / "s.mlpackage"))
            program = Program.load(tmp_path / "s.mlpackage")
            compressed = any(op.type.startswith("constexpr_") for op in program.functions["main"].operations)
            assert compressed == (form is small), name
            results.append(program.run("main", {"x": x.numpy()})["y"].astype(np.float32))
        np.testing.assert_array_equal(*results, err_msg=name)
        assert 1e-4 < np.abs(results[0] - exact).max() < bound, name


def test_palettes_of_every_width_and_vectors(tmp_path: pathlib.Path) -> None:
    """Groups along both axes, sizes that fill no byte, and vectors, against coremltools' own materialisation."""
    expected = []

    def body(inputs: Any) -> list[Any]:
        outputs = []
        for bits in (1, 2, 3, 4, 6, 8):
            for vector, axis in ((1, None), (2, 0), (3, 1)):
                kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
                indices = rng.integers(0, 2**bits, (6, 5)).astype(kind)
                lut = rng.standard_normal((3, 5, 2**bits, vector)).astype(np.float16)
                where = {} if axis is None else {"vector_axis": axis}
                dense = mb.constexpr_lut_to_dense(indices=indices, lut=lut, **where)
                expected.append(dense.op.materialized_val_inference())
                outputs.append(mb.mul(x=dense, y=inputs["one"]))
        integers = np.array([-8, -1, 0, 3, 7, 5, -3], np.int8).reshape(1, 7)
        codes = integers.astype(types.nptype_from_builtin(types.int4))
        dense = mb.constexpr_blockwise_shift_scale(data=codes, scale=np.float16([[0.5]]))
        expected.append(integers * np.float16(0.5))
        return [*outputs, mb.mul(x=dense, y=inputs["one"])]

    save({"main": function({"one": tensor([1])}, body)}, tmp_path / "m.mlpackage")
    found = Program.load(tmp_path / "m.mlpackage").run("main", {"one": [1.0]})
    assert len(found) == len(expected) == 19
    for ours, theirs in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
