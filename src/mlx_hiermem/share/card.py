"""The model card of a shared memory model: what it is, how to use it, where its memories come from, its limits."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from mlx_hiermem.bank.manifest import BankManifest

MARK = "<!-- written by `hiermem bank push`; without this line the next push leaves your text alone -->"
SOURCES_SHOWN = 12
# The hub's identifiers of the licences that a bank is likely to name; anything else is "other" with its name.
LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "odc-by")
ALIASES = {"cc0": "cc0-1.0", "apache 2.0": "apache-2.0", "cc by 4.0": "cc-by-4.0", "cc by-sa 4.0": "cc-by-sa-4.0"}

CARD = """\
---
{metadata}
---
{mark}

# {name}

A language model with hierarchical memories: a small anchor that is always in use, and a bank of memory blocks of
which each question fetches a few ([arXiv:2510.02375](https://arxiv.org/abs/2510.02375)). It runs with
[MLX](https://github.com/ml-explore/mlx) on Apple silicon, and on Linux.

```
pip install mlx-hiermem
hiermem chat {repo}
```

Blocks are downloaded when a question first needs them. `hiermem bank pull {repo} FOLDER` brings all of
them, `--only LABEL` a subtree with what is above it.

```python
from mlx_hiermem import load

model = load("{repo}")
print(model.chat("What is the capital of Laos?"))
```

## Design

| | |
|---|---|
| anchor | {anchor.name}: {anchor.layers} layers, hidden size {anchor.hidden}, weights {anchor.weights_digest:.12} |
| memory | {memory.kind}, in {carriers} layers, {units} units a block at levels 1–{memory.depth} |
| stored as | {memory.precision} |
| tree | {memory.branching} children a node, {memory.depth} levels, routed by {embedder} |
| bank | {blocks} blocks, {parameters:,} parameters, {bytes:,} bytes |
| fetched | {fetched:,} parameters for a question that reaches the deepest level |

## Sources

{sources}

## Limits

- A memory raises the chance of a right answer; it is no lookup. What is generated must be checked.
- Sources say which documents a block was trained on. They are no citation of an answer.
- Routing sees the question alone, by an English sentence embedder: another language or an unusual wording may
  fetch the wrong blocks.
- Removing a block removes its bytes; blocks above it, and the anchor, may still know what it knew.
- Licence of the memories: {licence}. The anchor has its own, see `anchor/` and its publisher.
"""


def text(repo: str, manifest: BankManifest) -> str:
    """The whole README.md, metadata for the hub included."""
    memory, totals = manifest.memory, manifest.totals()
    return CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in _metadata(manifest).items()),
        mark=MARK,
        name=repo.rpartition("/")[2],
        repo=repo,
        anchor=manifest.anchor,
        memory=memory,
        carriers=len(memory.layers),
        units=", ".join(map(str, memory.block_sizes)),
        embedder=manifest.embedder.name,
        blocks=totals["blocks"],
        parameters=totals["parameters"],
        bytes=totals["bytes"],
        fetched=totals["fetched_parameters"],
        sources=_sources(manifest),
        licence=manifest.licence or "not stated",
    )


def _metadata(manifest: BankManifest) -> dict[str, Any]:
    """The card's YAML head. Values are JSON, which YAML includes."""
    licence = manifest.licence.strip().lower()
    licence = ALIASES.get(licence, licence)
    data: dict[str, Any] = {"library_name": "mlx-hiermem", "pipeline_tag": "text-generation"}
    data["tags"] = ["mlx", "mlx-hiermem", "hierarchical-memory"]
    if licence in LICENCES:
        data["license"] = licence
    elif licence:
        data |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence).strip("-")}
    if manifest.anchor.name.count("/") == 1:
        data["base_model"] = manifest.anchor.name
    return data


def _sources(manifest: BankManifest) -> str:
    """Documents and tokens of level 1 (every document is in one of its blocks), and the commonest sources."""
    top = min((len(node) for node in manifest.blocks), default=0)
    entries = [entry for node, entry in manifest.blocks.items() if len(node) == top]
    documents, tokens = sum(e.documents for e in entries), sum(e.tokens for e in entries)
    lines = [f"{number:,} {what}." for number, what in ((documents, "documents"), (tokens, "tokens")) if number]
    counts = Counter(source for entry in manifest.blocks.values() for source in entry.sources)
    if counts:
        shown = ", ".join(source for source, _ in counts.most_common(SOURCES_SHOWN))
        more = ", …" if len(counts) > SOURCES_SHOWN else ""
        lines.append(f"{len(counts):,} sources, all of them in `bank/bank.json`: {shown}{more}")
    if kept := manifest.sources:
        lines.append(f"{kept.windows:,} passages of them are in `bank/sources/`, by which an answer is traced.")
    return "\n".join(lines) or "The bank does not name its sources."
