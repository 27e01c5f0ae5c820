"""Tiny random OpenLM models, and checkpoints of them as OpenLM's training code leaves them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch

from mlx_hiermem.convert.anchors.openlm_config import OpenLMConfig
from mlx_hiermem.convert.reference import OpenLM

torch.set_num_threads(1)  # on tensors this small threads only wait for each other

# heads x head dim is not the hidden size, as in the paper's 160M; the FFN width follows no formula
SIZES = {"vocab_size": 288, "hidden": 48, "layers": 3, "heads": 4, "head_dim": 8, "ffn_width": 80}


def random_openlm(seed: int = 0, **kinds: Any) -> OpenLM:
    """A random model whose norms, too, are not what they start as."""
    torch.manual_seed(seed)
    model = OpenLM(OpenLMConfig(**{**SIZES, **kinds}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(value + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def model_config(config: OpenLMConfig) -> dict[str, Any]:
    """The JSON that OpenLM is configured by; `rope_theta` is not stock."""
    return {
        "hidden_dim": config.hidden,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "seq_len": config.seq_len,
        "vocab_size": config.vocab_size,
        "post_embed_norm": config.post_embed_norm,
        "weight_tying": config.tied,
        "model_norm": config.norm,
        "qk_norm": config.qk_norm,
        "positional_embedding_type": config.position,
        "rope_theta": config.rope_base,
    }


def save_openlm(
    model: OpenLM, folder: pathlib.Path, prefix: str = "", settings: dict[str, Any] | None = None, **changes: Any
) -> pathlib.Path:
    """Writes epoch_1.pt and its model config; `changes` replace tensors of the state dict (None removes one)."""
    state = {**model.state_dict(), **changes}
    state = {prefix + name: value for name, value in state.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "evaluation_loss": 2.5}, folder / "epoch_1.pt")
    config = model_config(model.config) if settings is None else settings
    if config:
        (folder / "model.json").write_text(json.dumps(config))
    return folder / "epoch_1.pt"
