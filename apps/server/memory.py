"""/v1/memory: the bank as a picture of it needs it, and what of it is where."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict
from typing import Any

from mlx_hiermem.apps.picture.icicle import block_row
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import GENERIC_NODE, Path
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.selection import Selection


def overview(name: str, model: MemoryModel) -> dict[str, Any]:
    """The model, its memory design and every block. Without a bank there are no nodes."""
    bank, cache = model.bank, model.cache
    data = {"model": name, "context": model.context, "cache": cache_json(cache)}
    if bank is None or cache is None:
        data["anchor"] = model.config.get("model_type", "")
        return data | {"memory": None, "sources": None, "branching": 0, "depth": 0, "generic": False, "nodes": []}
    kept = bank.manifest.sources
    return data | {
        "anchor": bank.manifest.anchor.name,
        "memory": bank.config.to_json(),
        "branching": bank.config.branching,
        "depth": bank.config.depth,
        "generic": bank.manifest.generic is not None,
        "sources": {"windows": kept.windows, "documents": kept.documents} if kept and bank.sources else None,
        "nodes": [block_row(entry, state(bank, cache, path)) for path, entry in bank.manifest.blocks.items()],
    }


def changing(engine: Engine, model: MemoryModel) -> dict[str, Any]:
    """What changes while the server runs, in little."""
    bank, cache = model.bank, model.cache
    stats, remote = cache.stats if cache else None, bank.remote if bank else None
    nodes = bank.manifest.blocks if bank else ()
    return {
        "states": {str(path): state(bank, cache, path) for path in nodes} if bank and cache else {},
        "cache": cache_json(cache),
        "generic_bytes": generic_bytes(model),
        "active": engine.active,
        "queued": engine.queued,
        "tokens_per_second": round(engine.rate, 2),
        "bytes_read": stats.bytes_read if stats else 0,
        "remote_bytes": remote.bytes if remote else 0,
    }


def passages(bank: MemoryBank, leaf: Path) -> dict[str, Any]:
    """What a leaf was learnt from, window after window. Raises ApiError where that is not known."""
    if bank.sources is None:
        raise ApiError(400, "this model's bank keeps no sources")
    found = bank.sources.read(leaf)
    if found is None:
        raise ApiError(404, f"the bank keeps no passages of {leaf}", "path")
    return {"path": str(leaf), "passages": [asdict(window) for window in found.windows]}


def state(bank: MemoryBank, cache: BlockCache, node: Path) -> str:
    """As `MemoryBank.state`, and `in memory` for what is cached. The policy's word counts most."""
    where = bank.state(node)
    return "in memory" if where != "blocked" and node in cache else where


def generic_bytes(model: MemoryModel) -> int:
    """Of the generic block, where that is among what is in memory: it is no node of the tree."""
    bank, cache = model.bank, model.cache
    held = bank is not None and cache is not None and GENERIC_NODE in cache
    return bank.manifest.generic.bytes if held and bank and bank.manifest.generic else 0


def cache_json(cache: BlockCache | None) -> dict[str, int]:
    if cache is None:
        return {"blocks": 0, "bytes": 0, "budget": 0}
    return {"blocks": cache.blocks, "bytes": cache.bytes, "budget": cache.budget}


def route(engine: Engine, model: MemoryModel, questions: Sequence[str], blocked: Set[Path]) -> dict[str, Any]:
    """Where a conversation's last question goes, in the bank as it is now; on the engine's thread."""
    engine.refresh(model)
    chosen = model.choose(MemoryChoice.FETCHED, questions, blocked)
    return routed(model.bank_for(chosen.memory), chosen)


def routed(bank: MemoryBank, chosen: Selection) -> dict[str, Any]:
    """Where a text goes; `nodes` are the blocks on the way."""
    route = chosen.route
    return {
        "path": str(route.path),
        "labels": list(chosen.labels),
        "distances": list(route.distances),
        "nodes": [str(node) for node in bank.nodes_on(route.path)],
        "avoided": [str(node) for node in route.avoided],
        "far": route.far,
        "milliseconds": round(route.milliseconds, 2),
    }
