"""OpenLM checkpoints in, mlx-lm anchors out: every variant, every way they are saved, every way they are broken."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from tiny import make_tokenizer
from tiny_openlm import SIZES, model_config, random_openlm, save_openlm

from mlx_hiermem import load, openlm
from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.convert.anchors.openlm_config import NORMS, POSITIONS
from mlx_hiermem.convert.reference import OpenLM, load_openlm
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.errors import AnchorError, CheckpointError
from mlx_hiermem.sampling import Sampling

TOKENS = np.arange(3, 23).reshape(2, 10)


def convert(checkpoint: pathlib.Path, **options: Any) -> pathlib.Path:
    """Converts with a tokenizer beside the checkpoint, so that the anchor opens like any other."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(folder)
    out = folder / "anchor"
    convert_openlm(checkpoint, out, **options)
    return out


def config_of(anchor: pathlib.Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((anchor / "config.json").read_text())
    return config


def assert_same(anchor: pathlib.Path, model: OpenLM, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(TOKENS)).numpy()
    found = np.array(load_anchor(anchor, mx.float32)[0](mx.array(TOKENS)))
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_variant(norm: str, position: str, tied: bool, tmp_path: pathlib.Path) -> None:
    """With q/k norms and a norm after the embeddings where the embeddings are tied."""
    model = random_openlm(
        norm=norm, position=position, tied=tied, qk_norm=tied, post_embed_norm=tied, rope_base=5e4
    )
    anchor = convert(save_openlm(model, tmp_path))
    assert_same(anchor, model)
    stock = NORMS[norm].rms and position in ("rotary", "llama_rotary") and not tied
    assert config_of(anchor)["model_type"] == ("llama" if stock else "openlm")
    assert (anchor / "openlm.py").exists() is not stock


@pytest.mark.parametrize("norm", ["rms_norm", "gain_only_layer_norm"])
def test_opens_with_plain_mlx_lm(norm: str, tmp_path: pathlib.Path) -> None:
    """A llama as it is, an OpenLM by its own file; our own loader never runs that file."""
    import mlx_lm

    model = random_openlm(norm=norm)
    anchor = convert(save_openlm(model, tmp_path))
    plain, tokenizer = mlx_lm.load(str(anchor), tokenizer_config={}, trust_remote_code=norm != "rms_norm")
    ours, _, _ = load_anchor(anchor, mx.float32)
    assert mx.array_equal(plain(mx.array(TOKENS)), ours(mx.array(TOKENS)))
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    if norm != "rms_norm":
        (anchor / "openlm.py").write_text("raise RuntimeError('executed')")
        assert isinstance(load_anchor(anchor)[0], openlm.Model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model."])
def test_prefixes(prefix: str, tmp_path: pathlib.Path) -> None:
    model = random_openlm()
    checkpoint = save_openlm(model, tmp_path, prefix)
    assert_same(convert(checkpoint), model)


@pytest.mark.parametrize("wrapper", ["av_model_sd", "bare", "safetensors"])
def test_ways_of_saving(wrapper: str, tmp_path: pathlib.Path) -> None:
    """Averages win over the last state; a bare state dict and safetensors need no epoch."""
    model, last = random_openlm(seed=1), random_openlm(seed=2)
    checkpoint = save_openlm(last, tmp_path)
    if wrapper == "safetensors":
        from safetensors.torch import save_file

        checkpoint = checkpoint.with_suffix(".safetensors")
        save_file(model.state_dict(), checkpoint)
    else:
        content = {"av_model_sd": model.state_dict(), "state_dict": last.state_dict(), "epoch": 3}
        torch.save(content if wrapper == "av_model_sd" else model.state_dict(), checkpoint)
    assert_same(convert(checkpoint), model)


def test_tied_embeddings_may_be_saved_once(tmp_path: pathlib.Path) -> None:
    model = random_openlm(tied=True)
    for number, gone in enumerate(("tok_embeddings.weight", "output.weight")):
        checkpoint = save_openlm(model, tmp_path / str(number), **{gone: None})
        anchor = convert(checkpoint)
        assert config_of(anchor)["tie_word_embeddings"] is True
        assert_same(anchor, model)
        assert torch.equal(load_openlm(checkpoint)(torch.from_numpy(TOKENS)), model(torch.from_numpy(TOKENS)))


def test_ties_are_recognised_without_settings(tmp_path: pathlib.Path) -> None:
    for tied in (False, True):
        model = random_openlm(tied=tied)
        settings = model_config(model.config)
        del settings["weight_tying"]
        anchor = convert(save_openlm(model, tmp_path / str(tied), settings=settings))
        assert config_of(anchor)["tie_word_embeddings"] is tied


def test_settings_of_the_run(tmp_path: pathlib.Path) -> None:
    """params.txt lies one folder up; what it says counts unless the model config says otherwise."""
    model = random_openlm(
        norm="gain_only_lp_layer_norm", qk_norm=True, position="llama_rotary", rope_base=100_000.0
    )
    run = tmp_path / "run"
    stock = {"hidden_dim": SIZES["hidden"], "n_layers": 3, "n_heads": 4, "seq_len": 512, "vocab_size": 288}
    checkpoint = save_openlm(model, run / "checkpoints", settings={})
    (run / "tiny.json").write_text(json.dumps(stock | {"post_embed_norm": False, "weight_tying": False}))
    (run / "other.json").write_text(json.dumps(stock | {"n_heads": 2}))
    (run / "params.txt").write_text(
        "batch_size: 8\nbeta1: 0.9\nmodel: configs/tiny.json\nmodel_norm: gain_only_lp_layer_norm\nname: a run: b\n"
        "positional_embedding_type: llama_rotary\nqk_norm: True\nrotary_base_frequency: 100000\n"
        "attn_name: auto\nffn_type: swiglu_torch\nmoe_freq: 0\n"
    )
    anchor = convert(checkpoint)
    assert_same(anchor, model)
    assert config_of(anchor)["max_position_embeddings"] == 512
    (run / "tiny.json").rename(run / "kept")
    with pytest.raises(CheckpointError, match=r"model config tiny\.json is not beside"):
        convert_openlm(checkpoint, tmp_path / "out")  # the other config is not the run's
    (run / "kept").rename(run / "tiny.json")
    (run / "params.txt").unlink()
    with pytest.raises(CheckpointError, match=r"several model configs: other\.json, tiny\.json"):
        convert_openlm(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_hugging_face_forms(form: str, tmp_path: pathlib.Path) -> None:
    """OpenLM's two ways onto the hub: config.json with its parameters' names, or its arguments one level down."""
    from safetensors.torch import save_file

    model = random_openlm(norm="gain_only_lp_layer_norm", qk_norm=True)
    settings = model_config(model.config)
    if form == "flat":
        names = {"hidden_dim": "dim", "model_norm": "norm_type", "qk_norm": "apply_qk_norm"}
        settings = {names.get(name, name): value for name, value in settings.items()} | {"norm_eps": 1e-5}
    else:
        settings = {"params": None, "params_args_dict": settings}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openlm", **settings}))
    save_file(
        {f"model.{name}": value for name, value in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    source = find_source(str(tmp_path))
    assert source.kind == "openlm"
    anchor = convert(source.path)
    assert_same(anchor, model)
    assert find_source(str(anchor)).kind != "openlm"


def test_settings_by_name(tmp_path: pathlib.Path) -> None:
    model = random_openlm(norm="no_wb_layer_norm", qk_norm=True)
    checkpoint = save_openlm(model, tmp_path, settings={})
    other = tmp_path / "elsewhere" / "m.json"
    other.parent.mkdir()
    other.write_text(json.dumps(model_config(model.config)))
    assert_same(convert(checkpoint, config=other), model)


def frequencies(base: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The buffers that stock OpenLM saves with either rotary kind."""
    inverse = base ** (-torch.arange(0, 8, 2) / 8)
    return {f"layers.{i}.attention.pos_embed.inv_freq": inverse.to(dtype) for i in range(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_base_in_the_checkpoint(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    """The buffer gives the base and the heads, or confirms what the settings say."""
    model = random_openlm(rope_base=100_000.0)
    settings = model_config(model.config)
    settings["rope_theta"] = settings["n_heads"] = None
    anchor = convert(save_openlm(model, tmp_path, settings=settings, **frequencies(1e5, dtype)))
    assert config_of(anchor)["rope_theta"] == 100_000.0
    assert_same(anchor, model)
    settings["rope_theta"] = 10_000.0
    wrong = save_openlm(model, tmp_path / "wrong", settings=settings, **frequencies(1e5, dtype))
    with pytest.raises(CheckpointError, match="rotary base 10000"):
        convert_openlm(wrong, tmp_path / "out")


def test_rotary_base_is_not_guessed(tmp_path: pathlib.Path) -> None:
    """bfloat16 has too few digits for an odd base; the settings say it."""
    model = random_openlm(rope_base=12_600.0)
    settings = model_config(model.config)
    checkpoint = save_openlm(model, tmp_path, settings=settings, **frequencies(12_600.0, torch.bfloat16))
    assert config_of(convert(checkpoint))["rope_theta"] == 12_600.0
    save_openlm(model, tmp_path, settings=settings | {"rope_theta": None}, **frequencies(12_600.0, torch.bfloat16))
    with pytest.raises(CheckpointError, match="Give the run's base frequency"):
        convert_openlm(checkpoint, tmp_path / "out")


def test_dtype_is_kept(tmp_path: pathlib.Path) -> None:
    model = random_openlm().bfloat16()
    anchor = convert(save_openlm(model, tmp_path))
    weights = mx.load(str(anchor / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}
    assert_same(anchor, model)


@pytest.mark.parametrize("norm", ["rms_norm", "default_layer_norm"])
def test_quantized(norm: str, tmp_path: pathlib.Path) -> None:
    model = random_openlm(norm=norm, hidden=64, head_dim=16, ffn_width=128)
    anchor = convert(save_openlm(model, tmp_path), quantize=8)
    assert config_of(anchor)["quantization"]["bits"] == 8
    assert_same(anchor, model, tolerance=0.05)


def test_padded_vocabulary(tmp_path: pathlib.Path) -> None:
    """The tokenizer's 260 tokens are in 288 rows: the model generates, and never one of the padding ids."""
    model = random_openlm(norm="gain_only_layer_norm", qk_norm=True, tied=True)
    with torch.no_grad():
        model.output.weight[260:] *= 50  # padding ids with the largest logits
    anchor = convert(save_openlm(model, tmp_path))
    assert config_of(anchor)["effective_vocab_size"] == 260
    loaded = load(anchor)
    assert loaded.anchor(mx.array([[1, 2]])).shape[-1] == 288
    sampling = Sampling(max_tokens=12, temperature=1.0)
    ids = [response.token for response in loaded.responses(loaded.tokens("hello"), sampling)]
    assert ids
    assert max(ids) < 260


def test_without_tokenizer(tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    convert_openlm(save_openlm(random_openlm(), tmp_path), tmp_path / "anchor", warn=said.append)
    assert len(said) == 1
    assert "--tokenizer" in said[0]
    loaded = load(tmp_path / "anchor")
    assert loaded.anchor(mx.array([[1, 2]])).shape == (1, 2, 288)
    with pytest.raises(AnchorError, match="no tokenizer"):
        loaded.generate("hello")
    make_tokenizer(tmp_path)
    convert_openlm(tmp_path / "epoch_1.pt", tmp_path / "again", tokenizer=tmp_path, warn=said.append)
    assert len(said) == 1
    assert (tmp_path / "again" / "tokenizer.json").exists()


def nan(shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.zeros(shape)
    values[-1] = float("nan")
    return values


CHECKPOINT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # what is wrong with a checkpoint or its settings -> (tensors, settings, in the message)
    "missing": ({"layers.1.ffn_norm.bias": None}, {}, r"lacks layers\.1\.ffn_norm\.bias"),
    "no layers": ({"layers.0.feed_forward.w3.weight": None}, {}, "not an OpenLM checkpoint"),
    "left over": ({"layers.1.extra.weight": torch.ones(2)}, {}, r"layers\.1\.extra\.weight left over"),
    "not finite": ({"layers.2.feed_forward.w3.weight": nan((48, 80))}, {}, r"2.*w3\.weight has non-finite"),
    "shape": ({"layers.1.attention.in_proj.weight": torch.ones(95, 48)}, {}, r"\(95, 48\), expected"),
    "norm": ({}, {"model_norm": "rms_norm"}, r"norm\.bias.* left over"),
    "no qk_norm": ({}, {"qk_norm": True}, r"lacks layers\.0\.attention\.q_norm\.weight"),
    "heads": ({}, {"n_heads": 5}, "number of heads"),
    "no heads": ({}, {"n_heads": None}, "number of heads is unknown"),
    "layers": ({}, {"n_layers": 4}, "n_layers 4, the checkpoint has 3"),
    "tie": ({}, {"weight_tying": True}, "tok_embeddings and output differ"),
}
FOREIGN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "moe": ({"layers.0.feed_forward.experts.mlp.w1": torch.ones(2)}, {}, r"mixture of experts \(MoE\)"),
    "moe settings": ({}, {"moe_freq": 2}, r"mixture of experts \(MoE\)"),
    "mamba": ({"model.backbone.layers.0.mixer.A_log": torch.ones(2)}, {}, "Mamba"),
    "mamba settings": ({}, {"d_model": 48, "n_layer": 3}, "Mamba"),
    "linear": ({"layers.0.attention._totrain_embed.weight": torch.ones(2)}, {}, "linear attention"),
    "linear settings": ({}, {"attn_name": "linear_attn"}, "linear attention"),
    "relu attention": ({}, {"attn_name": "custom_attn"}, "custom_attn"),
    "geglu": ({}, {"ffn_type": "gemma_geglu"}, "gemma_geglu"),
    "scaled positions": ({}, {"rotary_scale": 0.5}, "rotary_scale"),
    "odd norm": ({}, {"model_norm": "batch_norm"}, "unknown model_norm 'batch_norm'"),
    "odd position": ({}, {"positional_embedding_type": "alibi"}, "'alibi'"),
}
BROKEN = {case: (CheckpointError, *rest) for case, rest in CHECKPOINT.items()}
BROKEN |= {case: (AnchorError, *rest) for case, rest in FOREIGN.items()}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case: str, tmp_path: pathlib.Path) -> None:
    """One line that names the culprit, and nothing written."""
    error, tensors, settings, message = BROKEN[case]
    model = random_openlm()
    checkpoint = save_openlm(model, tmp_path, settings=model_config(model.config) | settings, **tensors)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert_openlm(checkpoint, tmp_path / "anchor", warn=lambda line: None)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_norm_kind_is_not_guessed(tmp_path: pathlib.Path) -> None:
    """A weight alone may be an RMS norm's or a gain-only LayerNorm's."""
    model = random_openlm(norm="rms_norm")
    settings = model_config(model.config)
    del settings["model_norm"]
    checkpoint = save_openlm(model, tmp_path, settings=settings)
    with pytest.raises(CheckpointError, match="gain-only LayerNorm from an RMS norm"):
        convert_openlm(checkpoint, tmp_path / "anchor")
    (tmp_path / "model.json").unlink()
    with pytest.raises(CheckpointError, match="norms and positions are unknown"):
        convert_openlm(save_openlm(model, tmp_path, settings={}, **frequencies(1e4)), tmp_path / "anchor")


def test_a_larger_tokenizer_is_not_this_models(tmp_path: pathlib.Path) -> None:
    checkpoint = save_openlm(random_openlm(vocab_size=256), tmp_path)
    make_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer has 260 tokens, the model only 256"):
        convert_openlm(checkpoint, tmp_path / "anchor")
