"""Adapters beside a model: merged as PEFT and mlx-lm compute them, or refused by name."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from sources import hf_model, make_hf

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.convert import parity
from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.convert.verify import verify
from mlx_hiermem.errors import CheckpointError, HierMemError

IDS = parity.prompt(40, 260)
WIDTHS = {"q_proj": (64, 64), "v_proj": (64, 32), "down_proj": (128, 64)}  # inputs, outputs
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "tiny/llama", "bias": "none"}
MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0}}


def module(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"


def peft_adapter(folder: pathlib.Path, settings: dict[str, Any] | None = None, **extra: torch.Tensor) -> None:
    torch.manual_seed(1)
    tensors = {f"base_model.model.{name}": value for name, value in extra.items()}
    for layer in range(3):
        for name, (inputs, outputs) in WIDTHS.items():
            rank = 2 if name == "v_proj" else 4
            tensors[f"base_model.model.{module(layer, name)}.lora_A.weight"] = torch.randn(rank, inputs) * 0.2
            tensors[f"base_model.model.{module(layer, name)}.lora_B.weight"] = torch.randn(outputs, rank) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | (settings or {})))


def widened(folder: pathlib.Path, scale: Callable[[str, int], float]) -> torch.nn.Module:
    """The source in PyTorch, with low-rank layers beside its own, as PEFT runs it: nothing is merged."""
    model = hf_model("llama")
    tensors = load_file(folder / "adapter_model.safetensors")

    def beside(a: torch.Tensor, b: torch.Tensor, factor: float) -> Callable[..., torch.Tensor]:
        return lambda _, args, out: out + factor * (args[0] @ a.T) @ b.T

    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            hook = beside(a, tensors[name.replace("lora_A", "lora_B")], scale(path, a.shape[0]))
            model.get_submodule(path).register_forward_hook(hook)
    return model


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, lambda path, rank: 8 / rank),
        ({"use_rslora": True}, lambda path, rank: 8 / rank**0.5),
        (
            {"alpha_pattern": {"self_attn.v_proj": 2}, "rank_pattern": {"v_proj": 2}},
            lambda path, rank: (2 if path.endswith("v_proj") else 8) / rank,
        ),
    ],
    ids=["alpha over r", "rslora", "patterns"],
)
def test_peft_is_merged(
    tmp_path: pathlib.Path, settings: dict[str, Any], scale: Callable[[str, int], float]
) -> None:
    folder = make_hf(tmp_path / "source")
    peft_adapter(folder, settings)
    report = convert(folder, tmp_path / "model")
    assert report.warnings == ("the adapter beside the model (PEFT, 9 layers) is merged into it",)
    ours, _, _ = load_anchor(tmp_path / "model/anchor", mx.float32)
    expected = parity.TorchSide(widened(folder, scale)).run(IDS, "none")[1]
    plain = parity.TorchSide(hf_model("llama")).run(IDS, "none")[1]
    assert parity.difference(plain, expected) > 1e-2
    assert parity.difference(np.array(ours(mx.array(IDS))), expected) < 1e-5
    receipt = verify(tmp_path / "model", str(folder))
    assert receipt.passed, receipt.checks
    assert {file.name for file in find_source(str(folder)).files} == {
        "model.safetensors", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_peft_with_whole_tensors_and_embeddings(tmp_path: pathlib.Path) -> None:
    """modules_to_save replaces a head that is not tied; LoRA on the embeddings is the other way round."""
    folder = make_hf(tmp_path / "source", tie_word_embeddings=False)
    head, a, b = torch.randn(260, 64) * 0.1, torch.randn(4, 260) * 0.1, torch.randn(64, 4) * 0.1
    embeddings = {f"model.embed_tokens.lora_embedding_{side}": value for side, value in (("A", a), ("B", b))}
    peft_adapter(folder, **{"lm_head.modules_to_save.weight": head, **embeddings})
    assert "9 layers and 1 whole" not in convert(folder, tmp_path / "model").warnings[0]
    saved = load_file(tmp_path / "model/anchor/model.safetensors")
    source = load_file(folder / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], head)
    expected = source["model.embed_tokens.weight"] + 2 * (b @ a).T
    assert torch.allclose(saved["model.embed_tokens.weight"], expected, atol=1e-6)
    assert torch.equal(saved["model.norm.weight"], source["model.norm.weight"])


def test_half_precision_stays(tmp_path: pathlib.Path) -> None:
    folder = make_hf(tmp_path / "source", dtype=torch.bfloat16)
    peft_adapter(folder)
    convert(folder, tmp_path / "model")
    saved, source = load_file(tmp_path / "model/anchor/model.safetensors"), load_file(folder / "model.safetensors")
    name, adapter = f"{module(1, 'q_proj')}.weight", load_file(folder / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{module(1, 'q_proj')}.lora_{side}.weight"] for side in "AB")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert torch.equal(saved[name], (source[name].float() + 2 * b @ a).bfloat16())


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_mlx_is_merged(tmp_path: pathlib.Path, kind: str) -> None:
    """Against mlx-lm's own loading of the folder with its adapter."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    folder, adapter = make_hf(tmp_path / "source"), tmp_path / "adapter"
    convert(folder, tmp_path / "base")
    base = str(tmp_path / "base/anchor")
    model, _ = load(base)
    if kind != "full":
        linear_to_lora_layers(model, 2, MLX["lora_parameters"], use_dora=kind == "dora")  # type: ignore[arg-type]
    mx.random.seed(3)
    trained = {
        name: value + 0.1 * mx.random.normal(value.shape)
        for name, value in tree_flatten(model.parameters())
        if kind == "full" or name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")
    }
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), trained)
    (adapter / "adapter_config.json").write_text(json.dumps(MLX | {"fine_tune_type": kind}))
    plain = np.array(load(base)[0](mx.array(IDS)))
    expected = np.array(load(base, adapter_path=str(adapter))[0](mx.array(IDS)))
    assert parity.difference(plain, expected) > 1e-2
    for file in adapter.iterdir():
        file.rename(folder / file.name)
    report = convert(folder, tmp_path / "model")
    assert "adapters.safetensors, by mlx-lm" in report.warnings[0]
    ours, _, _ = load_anchor(tmp_path / "model/anchor", mx.float32)
    assert parity.difference(np.array(ours(mx.array(IDS))), expected) < 1e-5
    if kind == "dora":
        with pytest.raises(HierMemError, match="dora adapter cannot be compared"):
            verify(tmp_path / "model", str(folder))
    else:
        assert verify(tmp_path / "model", str(folder)).passed


def drop(folder: pathlib.Path, name: str) -> None:
    (folder / name).unlink()


REFUSED: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "no weights": (lambda f: drop(f, "adapter_model.safetensors"), "but neither adapter_model.safetensors"),
    "no config": (lambda f: drop(f, "adapter_config.json"), "lies there without its adapter_config.json"),
    "a prompt": (lambda f: peft_adapter(f, {"peft_type": "PREFIX_TUNING"}), "of the kind PREFIX_TUNING"),
    "DoRA": (lambda f: peft_adapter(f, {"use_dora": True}), "use_dora cannot be merged. Merge it with"),
    "PiSSA": (lambda f: peft_adapter(f, {"init_lora_weights": "pissa_niter_4"}), "init_lora_weights pissa_niter_4"),
    "biases": (lambda f: peft_adapter(f, {"bias": "all"}), "bias all cannot be merged"),
    "of a deeper model": (
        lambda f: peft_adapter(f, **{"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}),
        "is for another model: it changes model.layers.9.mlp.up_proj.weight",
    ),
    "of a wider model": (
        lambda f: peft_adapter(
            f,
            **{
                f"model.layers.0.mlp.up_proj.lora_{s}.weight": torch.ones(*n)
                for s, n in (("A", (4, 9)), ("B", (9, 4)))
            },
        ),
        "model.layers.0.mlp.up_proj is (9, 9), the model's (128, 64)",
    ),
    "half a pair": (
        lambda f: peft_adapter(f, **{"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}),
        "is incomplete: model.layers.0.mlp.up_proj",
    ),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "is truncated or damaged",
    ),
    "of a tied model's head": (
        lambda f: peft_adapter(f, **{"model.embed_tokens.weight": torch.ones(260, 64)}),
        "changes model.embed_tokens.weight, and the model's embeddings are its head. Untie them",
    ),
    "halves of two ranks": (
        lambda f: peft_adapter(
            f,
            **{
                f"model.layers.0.mlp.up_proj.lora_{s}.weight": torch.ones(4 + n, 64 + 64 * n)
                for s, n in (("A", 0), ("B", 1))
            },
        ),
        "the two halves of the adapter's model.layers.0.mlp.up_proj do not fit",
    ),
    "a pattern that is none": (
        lambda f: peft_adapter(f, {"alpha_pattern": {"(": 3}}),
        "the adapter's alpha_pattern cannot be read",
    ),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: pathlib.Path, name: str) -> None:
    spoil, message = REFUSED[name]
    folder = make_hf(tmp_path / "source")
    peft_adapter(folder)
    spoil(folder)
    with pytest.raises(CheckpointError) as raised:
        convert(folder, tmp_path / "model")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_an_adapter_alone_names_its_model(tmp_path: pathlib.Path) -> None:
    peft_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"is an adapter for tiny/llama, .* into the model's folder"):
        find_source(str(tmp_path))
