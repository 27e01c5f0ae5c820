"""The real SmolLM2-135M as a Core ML program: what float16, its tied head and its grouped heads would break."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlx_hiermem.convert.coreml import anchor, layers, mil
from mlx_hiermem.convert.coreml.anchor import build
from mlx_hiermem.convert.coreml.compress import rounded
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.mil import Var, Weights, half, mb
from mlx_hiermem.convert.export import package
from mlx_hiermem.convert.export.architecture import Norm
from mlx_hiermem.convert.export.distance import Distance, Float32Anchor
from mlx_hiermem.convert.export.exported import Runner
from mlx_hiermem.convert.export.limits import Overflow
from mlx_hiermem.convert.export.mixed_precision import uniform
from mlx_hiermem.convert.export.shape import PART, Export, matrices
from mlx_hiermem.errors import CoreMLError

CONTEXT, TEXTS = 192, 5
SHAPE = Export(CONTEXT, memory_layers=(20, 29), units=8)
MEMORY = {"mode": "state", "layers": [20, 29], "units": 8, "hidden": 576}
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@dataclasses.dataclass
class Made:
    """A saved package, opened; peaks of all that was run."""

    path: pathlib.Path
    program: Program
    runner: Runner
    peaks: dict[str, float]

    @property
    def weight_bytes(self) -> int:
        return (self.path / WEIGHTS).stat().st_size


@pytest.fixture(scope="module")
def reference(smollm2_anchor: pathlib.Path) -> Float32Anchor:
    """On the first texts only, to be quick."""
    made = Float32Anchor(smollm2_anchor, longest=CONTEXT)
    made.ids, made.logits = made.ids[:TEXTS], made.logits[:TEXTS]
    return made


Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(reference: Float32Anchor, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Made] = {}

    def get(form: str) -> Made:
        if form not in made:
            path = tmp_path_factory.mktemp("coreml") / f"{form}.mlpackage"
            plan = uniform(matrices(reference.sizes), form)
            mil.save(build(reference.sizes, SHAPE, plan), path)
            program, peaks = Program.load(path), dict[str, float]()
            described = package.describe_anchor(reference.sizes, SHAPE, plan)
            made[form] = Made(path, program, Runner(program, described, MEMORY, peaks), peaks)
        return made[form]

    return get


def test_the_same_choices_and_far_from_overflow(make: Make, reference: Float32Anchor) -> None:
    """The stream passes 22 560, so that squares are beyond float16; what is written stays the same."""
    made = make("fp16")
    distance = reference.measure(made.runner)
    assert distance.kl < 5e-4
    assert distance.logit < 0.4
    assert distance.agreement == 1
    report = Overflow.of(made.peaks)
    report.check()
    assert report.peaks["layers_11"] > 22_560  # of a square 5e8, float16 ends at 65 504
    assert report.highest[1] < 40_000
    assert not report.warnings()


def test_a_memory_changes_the_logits_and_goes_without_a_trace(make: Make, reference: Float32Anchor) -> None:
    runner, ids = make("fp16").runner, reference.ids[0]
    rng = np.random.default_rng(0)
    memory = {name: rng.standard_normal((2, 8, 576)) * 0.3 for name in ("gate", "up", "down")}
    found = []
    for tensors in (None, memory, None):
        runner.set_memory(tensors)
        found.append(runner.feed(ids))
    assert np.abs(found[0] - found[1]).max() > 0.1
    np.testing.assert_array_equal(found[0], found[2])


def test_decode_alone_equals_prefill(make: Make, reference: Float32Anchor) -> None:
    runner, ids = make("fp16").runner, reference.ids[0][:6]
    found = []
    for only in ("prefill", "decode"):
        runner.reset()
        found.append(runner.feed(ids, only=only))
    assert np.abs(found[0] - found[1]).max() < 0.2


def plain_norm(x: Var, of: Norm, weights: Weights, name: str) -> Var:
    """RMSNorm as it is written in float32."""
    mean = mb.reduce_mean(x=mb.mul(x=x, y=x, name=f"{name}_squared"), axes=[-1], keep_dims=True)
    x = mb.mul(x=x, y=mb.rsqrt(x=mb.add(x=mean, y=half(of.eps)), epsilon=half(1e-7)))
    return mb.mul(x=x, y=weights.constant(f"{name}_gain", of.gain))


def test_a_plain_norm_fails_the_export(
    reference: Float32Anchor, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """The report names the first tensor that float16 does not hold, at the layer where the stream becomes large."""
    monkeypatch.setattr(anchor, "norm", plain_norm)
    monkeypatch.setattr(layers, "norm", plain_norm)
    sizes = dataclasses.replace(reference.sizes, layers=reference.sizes.layers[:13])
    shape = Export(CONTEXT)
    mil.save(build(sizes, shape), tmp_path / "plain.mlpackage")
    program, peaks = Program.load(tmp_path / "plain.mlpackage"), dict[str, float]()
    runner = Runner(program, package.describe_anchor(sizes, shape, {}), None, peaks)
    runner.feed(reference.ids[0])
    with pytest.raises(CoreMLError, match=r"float16 would overflow: layers_\d+_before_\w+_squared reaches \d"):
        Overflow.of(peaks).check()


def test_every_weight_is_stored_once(make: Make, reference: Float32Anchor) -> None:
    """Both functions and both uses of the tied head; what is beyond the weights are tables and paddings."""
    sizes = reference.sizes
    weights = sum(one.weight.size for one in matrices(sizes))
    rotations = 2 * CONTEXT * sizes.head_dim
    norms = (2 * len(sizes.layers) + 1) * sizes.hidden
    expected = 2 * (weights + rotations + norms)
    assert expected <= make("fp16").weight_bytes <= expected + 300_000


def test_the_head_comes_in_parts(make: Make) -> None:
    outputs = make("fp16").program.functions["decode"].outputs
    assert [spec.shape for spec in outputs.values()] == [(1, 1, PART)] * 3
    assert PART * 3 == 49_152


def test_keys_are_not_repeated(make: Make, reference: Float32Anchor) -> None:
    """Nothing of a query head's share of the cache: 9 heads x context x 64, where 3 are kept."""
    sizes = reference.sizes
    for function in make("fp16").program.functions.values():
        assert not {op.type for op in function.operations} & {"tile", "repeat_interleave", "select"}
        for op in function.operations:
            for name, spec in op.outputs:
                shape = [size for size in spec.shape if size != 1]
                assert shape != [sizes.heads, CONTEXT, sizes.head_dim], name


def test_select_declares_a_wrong_shape_and_is_found_out(tmp_path: pathlib.Path) -> None:
    """coremltools' `select` with scalars says it gives a scalar: the reason why masks are computed."""

    def body(given: Any) -> list[Var]:
        chosen = mb.select(cond=mb.less(x=given["x"], y=half(0)), a=half(1), b=half(2), name="chosen")
        return [mb.mul(x=given["x"], y=chosen, name="y")]

    mil.save({"main": mil.function({"x": mil.tensor([2, 3])}, body)}, tmp_path / "m.mlpackage")
    with pytest.raises(
        CoreMLError, match=r"select 'chosen': 'chosen' is float16 \[2, 3\], declared is float16 \[\]"
    ):
        Program.load(tmp_path / "m.mlpackage").run("main", {"x": np.ones((2, 3))})


def test_eight_bits(make: Make, reference: Float32Anchor) -> None:
    """Two thirds of the size with the head in float16, and the same choices."""
    assert make("int8").weight_bytes < 0.66 * make("fp16").weight_bytes
    distance = reference.measure(make("int8").runner)
    assert distance.kl < 2e-4
    assert distance.agreement >= 0.99


def test_the_layer_of_massive_activations(reference: Float32Anchor) -> None:
    """Four bits in the down projection of layer 11 alone do more harm than in its neighbours together."""

    def harm(*layers: int) -> Distance:
        downs = [reference.sizes.layers[layer].down for layer in layers]
        return reference.with_weights([(down, rounded(down.weight, "int4")) for down in downs], 2)

    assert harm(11).kl > 2 * harm(9, 10, 12, 13).kl
