"""Weights in fewer bits: what each format keeps, and the search for where they may be fewer."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from tiny import make_anchor

from mlx_hiermem.convert.coreml import mil
from mlx_hiermem.convert.coreml.anchor import build
from mlx_hiermem.convert.coreml.compress import check_half, encode, group_of, rounded, size
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.export import package
from mlx_hiermem.convert.export.distance import Distance, Float32Anchor
from mlx_hiermem.convert.export.exported import Runner
from mlx_hiermem.convert.export.mixed_precision import Codec, find_plan
from mlx_hiermem.convert.export.shape import Export, matrices
from mlx_hiermem.errors import CoreMLError, HierMemError

BITS = {"int8": 8, "int8_channel": 8, "int4": 4, "lut4": 4}
CONTEXT = 48
CODEC = Codec(rounded, size)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Float32Anchor:
    """A tiny llama, on the first texts."""
    folder = make_anchor(tmp_path_factory.mktemp("tiny") / "anchor")
    made = Float32Anchor(folder, longest=CONTEXT)
    made.ids, made.logits = made.ids[:6], made.logits[:6]
    return made


@pytest.mark.parametrize("form", BITS)
@pytest.mark.parametrize("shape", [(64, 96), (48, 40), (33, 7)])
def test_formats(form: str, shape: tuple[int, int]) -> None:
    """Errors below half a step of the range that shares a scale, sizes as announced."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values[0], values[1, 0] = 0, 30  # a row of zeros, and an outlier
    encoded, found = encode(values, form), rounded(values, form)
    assert encoded.nbytes == size(shape, form) or shape[0] * shape[1] % 2
    if form != "lut4":  # which has no entry for a row of zeros
        assert not found[0].any()
    steps = 2 ** BITS[form] - 1
    if form == "lut4":
        assert len(np.unique(found[: group_of(shape[0])])) <= 16
        assert abs(found[1, 0] - 30) < 0.1
        assert np.square(found[2:] - values[2:]).mean() < 0.02
    else:
        span = np.ptp(values, axis=1) if form != "int8_channel" else 2 * np.abs(values).max(1)
        assert (np.abs(found - values).max(1) <= 0.51 * span / steps + 2e-3 * np.abs(values).max(1)).all()


def test_unknown_formats_and_large_weights() -> None:
    with pytest.raises(HierMemError, match="unknown weight format 'int2'"):
        encode(np.ones((2, 2)), "int2")
    with pytest.raises(CoreMLError, match="the weight w has the value 70000, which float16 does not hold"):
        check_half("w", np.array([[1.0, -70_000.0]]))


def test_what_may_be_compressed(reference: Float32Anchor) -> None:
    """Matrices that are multiplied with; neither norms, rotary tables, nor embeddings that no head shares."""
    names = {one.name for one in matrices(reference.sizes)}
    assert len(names) == 4 * 7 + 1
    assert "embed_tokens_0" in names  # the tied head
    assert not [name for name in names if "norm" in name or "rope" in name]


@pytest.mark.parametrize("form", ["int8_channel", "int4", "lut4"])
@pytest.mark.slow
def test_a_package_computes_with_what_the_format_leaves(
    form: str, reference: Float32Anchor, tmp_path: pathlib.Path
) -> None:
    """In the package and in the search the same weights mean the same."""
    plan = {one.name: form for one in matrices(reference.sizes)}
    mil.save(build(reference.sizes, Export(CONTEXT), plan), tmp_path / "a.mlpackage")
    program = Program.load(tmp_path / "a.mlpackage")
    described = package.describe_anchor(reference.sizes, Export(CONTEXT), plan)
    assert described["compression"] == {form: 29}
    kinds = {op.type for op in program.functions["decode"].operations}
    assert ("constexpr_lut_to_dense" in kinds) == (form == "lut4")
    assert ("constexpr_blockwise_shift_scale" in kinds) == (form != "lut4")
    runner, changed = (
        Runner(program, described),
        [(one, rounded(one.weight, form)) for one in matrices(reference.sizes)],
    )
    expected, found = reference.with_weights(changed), reference.measure(runner)
    assert found.kl == pytest.approx(expected.kl, rel=0.2, abs=2e-5)


def test_the_search_leaves_the_dearest_alone(reference: Float32Anchor) -> None:
    weights = matrices(reference.sizes)
    whole = reference.with_weights((one, rounded(one.weight, "int4")) for one in weights)
    seen: list[tuple[int, int]] = []
    said: list[str] = []
    plan = find_plan(reference, weights, "int4", whole.kl / 5, CODEC, lambda *step: seen.append(step), said.append)
    assert plan.distance.kl <= whole.kl / 5
    dearest, alone, by_size = plan.dearest[0]
    assert by_size == max(cost for _, _, cost in plan.dearest)
    assert plan.formats[dearest] != "int4"
    assert 0 < alone < whole.kl
    assert list(plan.formats.values()).count("int4") >= 10
    assert (29, 34) in seen
    assert said[2] == "comparing 29 matrices in int4, then at most 5 mixtures"
    assert 4 <= len(said) <= 8
    assert json.loads(json.dumps(plan.to_json()))["formats"]["int4"] >= 10
    assert reference.with_weights([]).kl < 1e-9  # what was tried is undone; sums may be rounded in another order


def test_bounds(reference: Float32Anchor) -> None:
    """All coarse where that is near enough, and an error where not even float16 is."""
    weights = matrices(reference.sizes)
    assert set(find_plan(reference, weights, "int4", 10.0, CODEC).formats.values()) == {"int4"}
    with pytest.raises(HierMemError, match=r"in float16 the KL is .* already\. The bound is 0"):
        find_plan(reference, weights, "int8", 0.0, CODEC)


def test_distances() -> None:
    ours = np.array([[0.0, 0.0], [2.0, 0.0]], np.float32)
    theirs = np.array([[0.0, np.log(3.0)], [1.0, 0.0]], np.float32)
    found = Distance.between([ours], [theirs])
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    p, q = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))
    second = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found.kl == pytest.approx((first + second) / 2)
    assert found.kl_max == pytest.approx(max(first, second))
    assert (found.tokens, found.agreement) == (2, 0.5)
    assert found.logit == pytest.approx(np.log(3.0))
    assert Distance.between([ours], [theirs * np.nan]).kl == np.inf
