"""The shape of an OpenLM model: sizes read from its tensors, everything else from the run's settings.

OpenLM keeps the settings apart from the weights: a model config (JSON) and the run's `params.txt`. Neither
holds the FFN width or the head dimension, which stock OpenLM computes by formulae that its forks change (the
paper's 160M has 12 heads of 32 at hidden size 512). So sizes come from the tensors, never from a formula.
"""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_hiermem.errors import AnchorError, CheckpointError
from mlx_hiermem.files import read_json

Settings = dict[str, Any]


class Norm(NamedTuple):
    """A norm kind by what it computes and which parameters it has."""

    rms: bool
    weight: bool
    bias: bool


# "lp" (low precision) kinds differ only in what autocast does to their inputs during training.
NORMS = {
    "default_layer_norm": Norm(rms=False, weight=True, bias=True),
    "lp_layer_norm": Norm(rms=False, weight=True, bias=True),
    "gain_only_layer_norm": Norm(rms=False, weight=True, bias=False),
    "gain_only_lp_layer_norm": Norm(rms=False, weight=True, bias=False),
    "no_wb_layer_norm": Norm(rms=False, weight=False, bias=False),
    "rms_norm": Norm(rms=True, weight=True, bias=False),
    "fused_rms_norm": Norm(rms=True, weight=True, bias=False),
}
POSITIONS = ("rotary", "llama_rotary", "head_rotary", "none")
FFN_KINDS = ("swiglu", "swiglu_torch")  # the same function by two libraries
ATTENTION_KINDS = ("auto", "xformers_attn", "xformers_attn_variable_length", "torch_attn", "flash_attn")
ROPE_BASES = (  # stock OpenLM has no name for it; its forks have several
    *("rotary_base_frequency", "rotary_base", "rope_theta", "rope_base", "rope_freq", "rope_frequency"),
    *("rotary_frequency", "rotary_freq", "base_frequency", "rotary_theta"),
)
SIZE_KEYS = {"n_heads", "n_layers", "hidden_dim"}  # any of them makes a JSON file a model config
ALIASES = {
    "hidden_dim": ("hidden_dim", "dim"),
    "model_norm": ("model_norm", "norm_type"),
    "qk_norm": ("qk_norm", "apply_qk_norm"),
    "rope_base": ROPE_BASES,
}
FOREIGN = (  # what a tensor's name gives away -> which architecture it belongs to
    (re.compile(r"\.(router|experts|moe_layer|gate\.wg)\b|\bmoe\b"), "a mixture of experts (MoE)"),
    (re.compile(r"\.mixer\.|\bA_log$"), "a Mamba model"),
    (re.compile(r"attention\._totrain_|\blinear_attn\b"), "a linear attention model"),
    (re.compile(r"feed_forward\.(gate_proj|up_proj)\."), "an OpenLM model with ffn_type gemma_geglu"),
    (re.compile(r"\._ff_w1\.|feed_forward\.0\."), "an OpenLM model with ffn_type gelu, which has no gate"),
)


@dataclass(frozen=True)
class OpenLMConfig:
    """Sizes and kinds of one OpenLM transformer. `norm` and `position` have OpenLM's own names."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    ffn_width: int
    norm: str = "default_layer_norm"
    position: str = "rotary"
    rope_base: float = 10_000.0
    qk_norm: bool = False
    post_embed_norm: bool = False
    tied: bool = False
    eps: float = 1e-5
    seq_len: int = 2048

    @property
    def attention_width(self) -> int:
        """Heads x head dimension; need not be the hidden size."""
        return self.heads * self.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """State-dict name -> shape of every tensor that the model must have (tied: without `output`)."""
        d, f, a = self.hidden, self.ffn_width, self.attention_width
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, d)}
        norms = {"norm": d}
        if self.post_embed_norm:
            norms["post_embed_norm"] = d
        for index in range(self.layers):
            layer = f"layers.{index}"
            shapes[f"{layer}.attention.in_proj.weight"] = (3 * a, d)
            shapes[f"{layer}.attention.out_proj.weight"] = (d, a)
            shapes[f"{layer}.feed_forward.w12.weight"] = (2 * f, d)
            shapes[f"{layer}.feed_forward.w3.weight"] = (d, f)
            norms |= {f"{layer}.attention_norm": d, f"{layer}.ffn_norm": d}
            if self.qk_norm:
                norms |= {f"{layer}.attention.q_norm": a, f"{layer}.attention.k_norm": a}
        for name, width in norms.items():
            shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias") if getattr(NORMS[self.norm], part)}
        if not self.tied:
            shapes["output.weight"] = (self.vocab_size, d)
        return shapes


def read_settings(source: pathlib.Path, config: pathlib.Path | None = None) -> Settings:
    """The run's settings: `params.txt`, overridden by the model config as OpenLM itself does it.

    Looked for beside the checkpoint and one folder up (a run keeps its checkpoints in a subfolder), unless
    `config` names the file. Raises CheckpointError where a file is not what it should be.
    """
    folder = source if source.is_dir() else source.parent
    folders = [folder, folder.resolve().parent]
    settings: Settings = {}
    if params := next((f / "params.txt" for f in folders if (f / "params.txt").is_file()), None):
        settings = _read_params(params)
    if config is None:
        config = _find_config(folders, str(settings.get("model", "")))
    if config is not None:
        settings |= _read_params(config) if config.suffix == ".txt" else _read_json(config)
    if settings.get("model") and not SIZE_KEYS & settings.keys():
        name = pathlib.PurePath(str(settings["model"])).name.removesuffix(".json") + ".json"
        raise CheckpointError(
            f"the run's model config {name} is not beside the checkpoint; it decides on norms and positions",
            f"Put {name} there, or name it by --config.",
        )
    return settings


def _find_config(folders: Sequence[pathlib.Path], model: str) -> pathlib.Path | None:
    """The model config that the run names (a path, or a name without .json), else the only one there is."""
    name = pathlib.PurePath(model).name.removesuffix(".json") + ".json"
    for folder in folders:
        if model and (folder / name).is_file():
            return folder / name
    if model:
        return None
    for folder in folders:
        files = sorted(folder.glob("*.json"))
        found = [file for file in files if SIZE_KEYS & _read_json(file, strict=False).keys()]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{folder} holds several model configs: {names}", "Name one with --config.")
        if found:
            return found[0]
    return None


def _read_json(file: pathlib.Path, strict: bool = True) -> Settings:
    """A model config; the Hugging Face form keeps it below `params_args_dict`."""
    try:
        data = read_json(file, CheckpointError)
    except CheckpointError:
        if strict:
            raise
        return {}
    if not isinstance(data, dict):
        if strict:
            raise CheckpointError(f"{file} is not an OpenLM model config")
        return {}
    return _canonical(data | (data.get("params_args_dict") or {}))


def _read_params(file: pathlib.Path) -> Settings:
    """`name: value` lines as OpenLM's main.py prints its arguments."""
    settings: Settings = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    for line in lines:
        name, colon, text = line.partition(": ")
        if not colon:
            continue
        try:
            settings[name.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # an unquoted string
            settings[name.strip()] = text.strip()
    return _canonical(settings)


def _canonical(settings: Settings) -> Settings:
    """Adds OpenLM's own name of a setting where the file has it under another."""
    found = {
        name: next((settings[alias] for alias in aliases if settings.get(alias) is not None), None)
        for name, aliases in ALIASES.items()
    }
    return settings | {name: value for name, value in found.items() if value is not None}


def reject_foreign(names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """AnchorError for OpenLM's other architectures, by the names of their tensors or settings."""
    for pattern, what in FOREIGN:
        if found := next((name for name in names if pattern.search(name)), None):
            raise _unsupported(what, found)
    model = pathlib.PurePath(str(settings.get("model", ""))).name
    ffn, attention = settings.get("ffn_type") or "swiglu", settings.get("attn_name") or "auto"
    if "mamba" in model.lower() or {"d_model", "n_layer"} <= settings.keys():
        raise _unsupported("a Mamba model", f"model {model}" if model else "d_model")
    if ffn == "moe" or (settings.get("moe_freq") or 0) > 0:
        raise _unsupported("a mixture of experts (MoE)", f"moe_freq {settings.get('moe_freq')}")
    if "linear" in str(attention) or settings.get("use_retnet_slopes") or settings.get("use_decay"):
        raise _unsupported("a linear attention model", f"attn_name {attention}")
    if attention not in ATTENTION_KINDS:
        raise _unsupported("an OpenLM model with attention of its own", f"attn_name {attention}")
    if ffn not in FFN_KINDS:
        raise _unsupported("an OpenLM model with another FFN", f"ffn_type {ffn}")
    if (scale := settings.get("rotary_scale") or 1.0) != 1.0:
        raise _unsupported("an OpenLM model with scaled positions", f"rotary_scale {scale}")


def _unsupported(what: str, where: str) -> AnchorError:
    return AnchorError(
        f"the checkpoint is {what} ({where})", "Only OpenLM's dense SwiGLU transformers can become an anchor."
    )
