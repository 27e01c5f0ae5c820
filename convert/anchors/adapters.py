"""Adapters beside a model: PEFT's LoRA and mlx-lm's, merged into its weights.

A folder with adapter_config.json holds a fine-tuned model in two parts; transformers and mlx-lm load both. The
anchor gets one set of weights. What cannot be merged exactly is refused by name.
"""

from __future__ import annotations

import math
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_hiermem.convert.checkpoint import TensorSource, open_checkpoint
from mlx_hiermem.convert.readers import RawTensor, some
from mlx_hiermem.errors import CheckpointError
from mlx_hiermem.files import read_json

CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MLX_FILE = "adapters.safetensors"
LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
WRAPPED = re.compile(r"\.(base_layer|modules_to_save|original_module)(\.default)?(?=\.)")
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin that change the model's own weights too
ELSEWHERE = "Merge it with the tool that made it (PEFT: merge_and_unload), save the model and convert that."


def adapter_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The files of the adapter in a folder, its config first; none where there is no adapter."""
    weights = [folder / name for name in (*PEFT_FILES, MLX_FILE) if (folder / name).is_file()][:1]
    config = folder / CONFIG
    if weights and not config.is_file():
        raise CheckpointError(
            f"{weights[0]} lies there without its {CONFIG}", "Copy it too, or remove the adapter."
        )
    if config.is_file() and not weights:
        raise CheckpointError(
            f"{folder} has an {CONFIG}, but neither {', '.join((*PEFT_FILES, MLX_FILE))}",
            "Copy the adapter's weights too, or remove its config.",
        )
    return (config, *weights) if weights else ()


def refuse_alone(folder: pathlib.Path) -> None:
    """Raises CheckpointError where a folder is an adapter without its model."""
    if files := adapter_files(folder):
        base = read_json(files[0], CheckpointError)
        name = (base.get("base_model_name_or_path") or base.get("model")) if isinstance(base, dict) else None
        raise CheckpointError(
            f"{folder} is an adapter for {name or 'a model that it does not name'}, without that model's weights",
            f"Copy {', '.join(file.name for file in files)} into the model's folder and convert that.",
        )


class PeftAdapter:
    """PEFT's LoRA: to W of a layer comes alpha / r · B A. Use it as a context manager."""

    def __init__(self, config: pathlib.Path, weights: pathlib.Path, rename: Callable[[str], str]) -> None:
        self.settings = _peft_settings(config)
        self.tensors: TensorSource = open_checkpoint(weights)
        self.lora: dict[str, dict[str, str]] = {}  # module -> side -> name in the file
        self.whole: dict[str, str] = {}  # tensor that the adapter replaces -> name in the file
        for name in self.tensors.names():
            plain = rename(WRAPPED.sub("", name.removeprefix("base_model.model.")))
            if found := LORA.fullmatch(plain):
                self.lora.setdefault(found["module"], {})[(found["embedding"] or "") + found["side"]] = name
            elif "lora_" in plain:
                raise CheckpointError(f"{weights}: {name} is no plain LoRA", ELSEWHERE)
            else:
                self.whole[plain] = name
        halves = [module for module, sides in self.lora.items() if len(sides) != 2]
        if halves or not (self.lora or self.whole):
            raise CheckpointError(f"{weights} is incomplete: {some(halves) or 'no tensors'}", "Copy it again.")

    def check(self, names: set[str], folder: pathlib.Path, tied: bool = False) -> None:
        """Raises CheckpointError where the adapter changes tensors that the model does not have, or only one of the
        two ends that are `tied`: one tensor could not be both any more."""
        changed = {f"{module}.weight" for module in self.lora} | set(self.whole)
        if ends := sorted(changed & {"lm_head.weight", "model.embed_tokens.weight"}) if tied else []:
            raise CheckpointError(
                f"the adapter in {folder} changes {some(ends)}, and the model's embeddings are its head",
                "Untie them in PyTorch, merge it there (PEFT: merge_and_unload), save the model and convert that.",
            )
        missing = sorted(changed - names)
        if missing:
            raise CheckpointError(
                f"the adapter in {folder} is for another model: it changes {some(missing)}", "Check its base model."
            )

    def merged(self, name: str, value: mx.array) -> mx.array:
        """A tensor of the model with what the adapter does to it, in its own dtype."""
        if name in self.whole:
            return _mlx(self.tensors.read(self.whole[name])).astype(value.dtype)
        module = name.removesuffix(".weight")
        sides = self.lora.get(module)
        if sides is None or module == name:
            return value
        if not mx.issubdtype(value.dtype, mx.floating):
            raise CheckpointError(f"{name} is quantised, and an adapter is beside it", "Use the original weights.")
        a, b = (_mlx(self.tensors.read(sides[side])) for side in sorted(sides))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(f"the two halves of the adapter's {module} do not fit", "Copy it again.")
        delta = self.scale(module, a.shape[0]) * (b @ a)
        if "embedding_A" in sides:
            delta = delta.T
        if delta.shape != value.shape:
            raise CheckpointError(f"the adapter's {module} is {delta.shape}, the model's {value.shape}", ELSEWHERE)
        return (value.astype(mx.float32) + delta).astype(value.dtype)

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt r with rsLoRA; PEFT gives modules whose name ends so an alpha of their own."""
        patterns = self.settings.get("alpha_pattern") or {}
        try:
            own = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
            alpha = float(own[0] if own else self.settings["lora_alpha"])
        except (re.error, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the adapter's alpha_pattern cannot be read: {error}", ELSEWHERE) from error
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def __str__(self) -> str:
        return f"PEFT, {len(self.lora)} layers" + (f" and {len(self.whole)} whole tensors" if self.whole else "")

    def __enter__(self) -> PeftAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.close()


def _peft_settings(config: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json, unless it asks for what is more than W + alpha / r · B A."""
    settings = read_json(config, CheckpointError)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else "no settings"
        raise CheckpointError(f"{config}: an adapter of the kind {kind} cannot be merged, only LORA", ELSEWHERE)
    begun = str(settings.get("init_lora_weights")).lower()
    odd = [key for key in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora") if settings.get(key)]
    odd += [f"init_lora_weights {begun}"] * begun.startswith(CHANGES_THE_BASE)
    if (bias := settings.get("bias", "none")) != "none":
        odd.append(f"bias {bias}")
    if odd or not isinstance(settings.get("lora_alpha"), int | float):
        raise CheckpointError(f"{config}: {', '.join(odd) or 'no lora_alpha'} cannot be merged", ELSEWHERE)
    return settings


def _mlx(raw: RawTensor) -> mx.array:
    return mx.array(raw.float32())


def merge_mlx(model: nn.Module, folder: pathlib.Path) -> nn.Module:
    """The model with mlx-lm's adapter (LoRA, DoRA or full weights) merged into it, by mlx-lm's own code."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        settings = types.SimpleNamespace(**read_json(folder / CONFIG, CheckpointError))
        model = load_adapters(model, str(folder))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the adapter in {folder} does not fit the model: {why}", "Check its model."
        ) from error
    if getattr(settings, "fine_tune_type", "lora") != "full":
        fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
        model.update_modules(tree_unflatten(fused))
    return model
