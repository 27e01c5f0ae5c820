"""The folder that an app bundles, and manifest.json, its table of contents.

    anchor.mlpackage  retriever.mlpackage     the two models
    tokenizer/        retriever/              their tokenizers' files
    bank/             bank.json, tree.safetensors, and the block files that are not left to be downloaded
    manifest.json     what follows; receipt.json: how it was made and what was measured

manifest.json, version 1 (a reader refuses another version):

    format, version, name
    anchor       package; architecture; functions {name: tokens a call takes}; load_block: the name of the
                 function that writes the memory states from inputs, or null; context; vocabulary (ids from there
                 on are padding); inputs, outputs, states {name: {shape, dtype}}, where -1 is the function's
                 tokens; logits: the outputs that, joined along the last axis, are the logits of every token;
                 compression {format: weights}
    memory       mode (state, input), layers, units R, hidden d, block_sizes; null for an anchor without bank.
                 `gate`, `up`, `down` [L, R, d] are states, or inputs of every function. Zeros are no memory.
                 A state may have longer axes, which zeros fill; what load_block is given is [L, R, d].
                 Level l's block fills the units from sum(block_sizes[:l-1]) on.
    retriever    package, tokenizer, inputs, outputs, lengths (allowed token counts), dim; null without bank
    tokenizer, chat_template (null where there is none), chat (the same taken apart, see chat.py; of a base model
                 the frame in which its bank has learnt questions), eos [ids],
    sampling     temperature, top_p, top_k, max_tokens
    bank         folder; remote {url} or null; download {name below the folder: {bytes, sha256}} of the files that
                 are not bundled and lie below that url; null without bank
    files        {name: {bytes, sha256}} of every bundled file but manifest.json and receipt.json

What the caller sees to: position + tokens <= context, where position is that of the call's first token. A call's
missing tokens are filled with any id; what they leave in the cache is never seen, and is written over by the tokens
that do stand there.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mlx_hiermem.anchor import read_config
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert.export.architecture import Architecture
from mlx_hiermem.convert.export.chat import Framed, chat_format
from mlx_hiermem.convert.export.shape import CACHES, LOAD, MEMORY, Export, matrices, parts
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.files import file_digest
from mlx_hiermem.template_bounds import bounded

FORMAT, VERSION = "mlx-hiermem-coreml", 1
MANIFEST, RECEIPT = "manifest.json", "receipt.json"
ANCHOR, RETRIEVER, BANK = "anchor.mlpackage", "retriever.mlpackage", "bank"
TOKENIZER, RETRIEVER_TOKENIZER = "tokenizer/", "retriever/tokenizer.json"
MAX_TOKENS = 256  # of a reply


def describe_anchor(sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> dict[str, Any]:
    """The manifest's `anchor`. `formats`: of the weights, by name."""
    memory, state = (
        {name: _tensor(of(sizes)) for name in MEMORY} if shape.units else {}
        for of in (shape.memory_shape, shape.memory_state)
    )
    heads = parts(sizes.head or sizes.embeddings)
    counts = Counter(formats.get(one.name, "fp16") for one in matrices(sizes))
    return {
        "package": ANCHOR,
        "architecture": sizes.kind,
        "functions": shape.functions,
        "load_block": LOAD if shape.load_block else None,
        "context": shape.context,
        "vocabulary": sizes.vocabulary,
        "inputs": {"input_ids": _tensor((1, -1), "int32"), "position": _tensor((1,), "int32")}
        | (memory if shape.mode == "input" else {}),
        "outputs": {f"logits_{i}": _tensor((1, -1, len(head.weight))) for i, head in enumerate(heads)},
        "logits": [f"logits_{i}" for i in range(len(heads))],
        "states": {name: _tensor(shape.cache_shape(sizes)) for name in CACHES}
        | (state if shape.mode == "state" else {}),
        "compression": dict(sorted(counts.items())),
    }


def describe_memory(config: MemoryConfig, mode: str) -> dict[str, Any]:
    """The manifest's `memory`."""
    return {
        "mode": mode,
        "layers": list(config.layers),
        "units": config.fetched_size,
        "hidden": config.hidden,
        "block_sizes": list(config.block_sizes),
    }


def describe_text(anchor: pathlib.Path, tokenizer: Any, knows_questions: bool = False) -> dict[str, Any]:
    """The manifest's tokenizer, chat_template, chat, eos and sampling, which takes the likeliest token as in chat.

    `knows_questions`: the bank's, see `BankManifest`.
    """
    config = read_config(anchor)
    template = getattr(tokenizer, "chat_template", None)
    speaker = tokenizer if template else Framed.of(tokenizer) if tokenizer is not None and knows_questions else None
    with bounded():
        chat = chat_format(speaker) if speaker else None
    stops = getattr(tokenizer, "eos_token_ids", None) or config.get("eos_token_id") or []
    return {
        "tokenizer": TOKENIZER,
        "chat_template": template if isinstance(template, str) else None,
        "chat": chat,
        "eos": sorted({stops} if isinstance(stops, int) else set(stops)),
        "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": MAX_TOKENS},
    }


def file_table(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The manifest's `files`: all there are in the folder so far."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in files
    }


def check_context(sizes: Architecture, context: int, prefill: int) -> None:
    """Raises AnchorError for a context that the anchor cannot have."""
    if context < prefill:
        raise AnchorError(f"a context of {context} tokens is too short", f"A call takes {prefill}.")
    if sizes.longest and context > sizes.longest:
        raise AnchorError(
            f"the anchor was made for {sizes.longest} tokens, not {context}", "Give a shorter --context."
        )


def _tensor(shape: tuple[int, ...], dtype: str = "float16") -> dict[str, Any]:
    return {"shape": list(shape), "dtype": dtype}
