"""Adapters in plain PyTorch: what PEFT and mlx-lm add to a model's weights when it runs with their LoRA.

Shares no code with `anchors.adapters`, which merges them for a conversion.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from torch import Tensor

from mlx_hiermem.errors import CheckpointError


def merge(model: Any, folder: pathlib.Path) -> Any:
    """The model with the adapter in `folder`, if there is one, in its weights."""
    file = folder / "adapter_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        with torch.no_grad():
            _peft(model, folder, settings) if "peft_type" in settings else _mlx(model, folder, settings)
    return model


def _peft(model: Any, folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """W + s · B A for every pair, s = alpha / r (or / sqrt r); other tensors replace the model's."""
    tensors = {
        name.removeprefix("base_model.model."): value for name, value in _read(folder, "adapter_model").items()
    }
    for name, value in tensors.items():
        if name.endswith("lora_A.weight"):
            module, rank = name.removesuffix(".lora_A.weight"), value.shape[0]
            own = [a for key, a in (settings.get("alpha_pattern") or {}).items() if module.endswith(key)]
            scale = (own or [settings["lora_alpha"]])[0] / (rank**0.5 if settings.get("use_rslora") else rank)
            model.get_submodule(module).weight += scale * tensors[f"{module}.lora_B.weight"] @ value
        elif name.endswith("lora_embedding_A"):
            module, rank = name.removesuffix(".lora_embedding_A"), value.shape[0]
            embeddings = model.get_submodule(module)
            embeddings.weight += (settings["lora_alpha"] / rank * tensors[f"{module}.lora_embedding_B"] @ value).T
        elif "lora_" not in name:
            model.get_parameter(name).copy_(value)


def _mlx(model: Any, folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """W + s · (a b)^T, with a [inputs, r] and b [r, outputs]."""
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "full"):
        raise CheckpointError(f"an anchor with mlx-lm's {kind} adapter cannot be compared with PyTorch")
    tensors = _read(folder, "adapters")
    for name, value in tensors.items():
        if kind == "full":
            model.get_parameter(name).copy_(value)
        elif name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            product = settings["lora_parameters"]["scale"] * value @ tensors[f"{module}.lora_b"]
            model.get_submodule(module).weight += product.T


def _read(folder: pathlib.Path, stem: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = folder / f"{stem}.safetensors"
    tensors = load_file(file) if file.is_file() else torch.load(folder / f"{stem}.bin", weights_only=True)
    return {name: value.float() for name, value in tensors.items()}
