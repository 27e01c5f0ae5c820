"""A bank's block as the pages take it: an entry of `/v1/memory`, and of the file of `hiermem bank show`."""

from __future__ import annotations

from typing import Any

from mlx_hiermem.bank.manifest import BlockEntry

SOURCES = 8  # named of each block


def row(entry: BlockEntry, state: str) -> dict[str, Any]:
    """What is known of a block, ready for JSON."""
    return {
        "path": str(entry.path),
        "label": entry.label,
        "level": len(entry.path),
        "bytes": entry.bytes,
        "documents": entry.documents,
        "tokens": entry.tokens,
        "sources": list(entry.sources[:SOURCES]),
        "more_sources": max(len(entry.sources) - SOURCES, 0),
        "state": state,
    }
