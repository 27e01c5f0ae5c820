"""Which memory a text gets: what was wanted, where the text went, and what was fetched and attached for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mlx_hiermem.bank.sources import SourceWindow
from mlx_hiermem.cache import Fetch
from mlx_hiermem.config import Path
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.tree import Route

UNROUTED = Route()


@dataclass(frozen=True)
class Selection:
    """One text's memory. What is below the labels is known once the blocks are fetched."""

    memory: MemoryChoice = MemoryChoice.NONE
    route: Route = UNROUTED
    labels: tuple[str, ...] = ()  # of the path's nodes
    passage: SourceWindow | None = None  # what goes into the prompt, where that was wanted and there is one
    blocks: tuple[str, ...] = ()  # what is attached: equal blocks mean equal weights
    memory_bytes: int = 0
    bytes_read: int = 0  # from disk
    fetch_ms: float = 0.0
    attach_ms: float = 0.0

    @property
    def path(self) -> Path:
        return self.route.path

    @property
    def key(self) -> tuple[str, ...]:
        """Of a KV cache: keys and values are shared under equal keys alone."""
        return (self.memory, *self.blocks) if self.memory.has_passage else self.blocks

    def attached(self, fetch: Fetch | None, fetch_ms: float, attach_ms: float) -> Selection:
        """The same, now that it is fetched and attached."""
        return replace(
            self,
            blocks=fetch.blocks if fetch else (),
            memory_bytes=fetch.memory.nbytes if fetch and fetch.memory else 0,
            bytes_read=fetch.bytes_read if fetch else 0,
            fetch_ms=fetch_ms,
            attach_ms=attach_ms,
        )

    def to_json(self) -> dict[str, Any]:
        route, passage = self.route, self.passage
        return {
            "memory": self.memory,
            "path": str(route.path),
            "labels": list(self.labels),
            "distances": list(route.distances),
            "passage_distance": route.passage,
            "avoided": [str(node) for node in route.avoided],
            "stayed": route.stayed,
            "turns": route.turns,
            "far": route.far,
            "blocks": list(self.blocks),
            "passage": {"document": passage.document, "title": passage.title, "place": passage.place}
            if passage
            else None,
            "memory_bytes": self.memory_bytes,
            "bytes_read": self.bytes_read,
            "route_ms": route.milliseconds,
            "fetch_ms": self.fetch_ms,
            "attach_ms": self.attach_ms,
        }
