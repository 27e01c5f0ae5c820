"""A model in parts: any layer is an entrance, and an anchor that is more than its layers is refused."""

from __future__ import annotations

import pathlib

import mlx.core as mx
import numpy as np
import pytest
from sources import KINDS as ARCHITECTURES
from sources import make_hf
from tiny import make_tokenizer
from tiny_openlm import random_openlm, save_openlm

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.partial import PartialAnchor

ALL = mx.arange(28)


# A model in parts


def check_parts(model: object) -> None:
    anchor = PartialAnchor(model)
    anchor.check()
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (2, 14)))  # longer than gemma's window of 6
    whole = anchor.model(tokens).reshape(28, -1)
    for layer in range(len(anchor.layers)):
        found = anchor.logits(tokens, ALL, None, layer, anchor.states(tokens, layer))
        assert float(mx.abs(found - whole).max()) < 1e-5
    top = anchor.states(tokens, len(anchor.layers)).reshape(28, -1)
    assert float(mx.abs(anchor.head(top) - whole).max()) < 1e-5
    some = anchor.logits(tokens, mx.array([3, 20]))
    assert float(mx.abs(some - whole[mx.array([3, 20])]).max()) < 1e-5
    for layer in (0, len(anchor.layers) - 1):
        states = anchor.states(tokens[:1], layer)
        begun = anchor.begin(tokens[:1, :8], 2, layer, states[:, :8])
        rest = anchor.logits(tokens[:1, 8:][[0, 0]], ALL[:12], None, layer, states[:, 8:][[0, 0]], begun)
        assert float(mx.abs(rest - whole[mx.array([*range(8, 14)] * 2)]).max()) < 1e-4
    joined, documents = tokens.reshape(1, 28), mx.array([[0] * 14 + [1] * 14])
    assert float(mx.abs(anchor.logits(joined, ALL, documents) - whole).max()) < 1e-4
    assert float(mx.abs(anchor.logits(joined, ALL) - whole).max()) > 1e-2  # without the mask they see each other


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_layer_is_an_entrance(architecture: str, tmp_path: pathlib.Path) -> None:
    convert_huggingface(make_hf(tmp_path / "source", architecture), tmp_path / "anchor")
    check_parts(load_anchor(tmp_path / "anchor", mx.float32)[0])


def test_any_layer_of_openlm_is_an_entrance(tmp_path: pathlib.Path) -> None:
    make_tokenizer(tmp_path)
    convert_openlm(save_openlm(random_openlm(qk_norm=True, rope_base=100_000.0), tmp_path), tmp_path / "anchor")
    check_parts(load_anchor(tmp_path / "anchor", mx.float32)[0])


def test_an_anchor_that_is_more_than_its_layers_is_refused(tmp_path: pathlib.Path) -> None:
    convert_huggingface(make_hf(tmp_path / "source", "llama"), tmp_path / "anchor")
    model = load_anchor(tmp_path / "anchor", mx.float32)[0]
    own = type(model.model)

    class Shifted(own):  # type: ignore[misc, valid-type]
        def __call__(self, inputs: mx.array, *args: object, **kwargs: object) -> mx.array:
            return mx.cumsum(own.__call__(self, inputs, *args, **kwargs), axis=1)  # sees across positions

    model.model.__class__ = Shifted
    with pytest.raises(AnchorError, match="by parts"):
        PartialAnchor(model).check()
