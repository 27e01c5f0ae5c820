"""Options of every command that writes text: how its tokens are drawn, and how many bits its KV cache has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from mlx_hiermem.files import parse_json

TEMPERATURE = typer.Option(0.0, "--temperature", "-t", min=0.0, help="0 takes the likeliest token.")
TOP_P = typer.Option(1.0, min=0.0, max=1.0, help="Draws from the likeliest tokens that have this share together.")
TOP_K = typer.Option(0, min=0, help="Draws from so many of the likeliest tokens; 0: from all.")
MIN_P = typer.Option(0.0, min=0.0, max=1.0, help="Leaves out tokens less likely than this share of the likeliest.")
REPETITION_PENALTY = typer.Option(
    1.0, min=0.0, help="Divides the logits of the last 20 tokens, those of the prompt too; 1: no penalty."
)
PRESENCE_PENALTY = typer.Option(0.0, help="Is taken from the logits of tokens that the reply has already.")
FREQUENCY_PENALTY = typer.Option(0.0, help="The same, times how often the reply has them.")
TEMPLATE = typer.Option(
    "", "--chat-template-args", help="Variables of the chat template, as JSON: '{\"enable_thinking\": false}'."
)
KV_BITS = typer.Option(
    None, "--kv-bits", help="Bits of each number in the KV cache, 4 or 8: less memory, nearly the same text."
)
KV_GROUP_SIZE = typer.Option(64, "--kv-group-size", help="Numbers of it that share a scale: 32, 64 or 128.")
QUANTIZED_KV_START = typer.Option(
    5000, "--quantized-kv-start", min=0, help="Quantise it once it has so many tokens; 0: from the start."
)

NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "kv_bits": None,
    "kv_group_size": 64,
    "quantized_kv_start": 5000,
}


def changed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's options those named above, where they are not what they are anyway."""
    return {name: options[name] for name, value in NEUTRAL.items() if options.get(name, value) != value}


def template_args(text: str) -> dict[str, Any]:
    """The option `--chat-template-args`. Raises BadParameter."""
    try:
        found = parse_json(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"it is not JSON: {error}", param_hint="--chat-template-args") from error
    if not isinstance(found, dict):
        raise typer.BadParameter("it is not a JSON object", param_hint="--chat-template-args")
    return found
