"""policy.json: which nodes of a bank are closed to everyone who asks, and which questions it has no memory for.

It lies beside the manifest and is no part of it: blocking changes neither a block nor a digest, and is undone
in a moment. Blocking is no removal: whoever has the folder has the bytes.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError
from mlx_hiermem.files import MALFORMED, read_json, write_json
from mlx_hiermem.tree import ON_BLOCKED, ClusterTree, Route

POLICY = "policy.json"
REACHES = ("reach", "passage_reach")


@dataclass(frozen=True)
class BankPolicy:
    """Blocked nodes stand for all that is below them.

    `on_blocked`: a text whose nearest child is blocked goes to the nearest allowed `sibling`, or stops at the
    `parent` (see `ClusterTree.route`). `reach`: how far from the last node of its path a text may be (L2, between
    embeddings of length 1: 0 to about 2) and still be given memory; a bank of everything needs none.
    `passage_reach` is the same from the nearest passage, for a bank that is routed by its passages.
    """

    blocked: frozenset[Path] = frozenset()
    on_blocked: str = "sibling"
    reach: float = math.inf
    passage_reach: float = math.inf

    def __post_init__(self) -> None:
        if self.on_blocked not in ON_BLOCKED:
            raise BankError(f"on_blocked is '{self.on_blocked}'", f"Use {' or '.join(ON_BLOCKED)}.")
        for name in REACHES:
            if not getattr(self, name) > 0:
                raise BankError(f"{name} is {getattr(self, name)}", "It is a distance, more than 0.")

    @property
    def has_reach(self) -> bool:
        """Whether there are texts for which the bank has no memory."""
        return min(self.reach, self.passage_reach) < math.inf

    def measured_by(self, passages: bool) -> float:
        """The reach that is in force: in a bank that is routed by its passages the one from the nearest of them."""
        return self.passage_reach if passages and self.passage_reach < math.inf else self.reach

    def route(self, tree: ClusterTree, embeddings: np.ndarray, blocked: Collection[Path] = ()) -> list[Route]:
        """`ClusterTree.route` under this policy; `blocked` nodes are closed beside its own."""
        return tree.route(embeddings, self.blocked.union(blocked), self.on_blocked, self.reach)

    def blocker(self, path: Path) -> Path | None:
        """The node that closes this path: itself or the highest blocked node above; None where it is open."""
        return next((node for node in path.prefixes() if node in self.blocked), None)

    def check_open(self, path: Path, tree: ClusterTree, blocked: Iterable[Path] = ()) -> None:
        """Raises BankError for a path that the tree does not have, or that is closed here or by `blocked`."""
        if path:
            tree.check([path])
            closed = self.block(blocked).blocker(path)
            if closed is not None:
                raise BankError(f"the memory {path} is blocked (at {closed})", "Take another path, or unblock it.")

    def block(self, nodes: Iterable[Path]) -> BankPolicy:
        """Closes nodes and all below them. What a blocked node covers need not be listed any more."""
        wanted = self.blocked.union(nodes)
        tops = frozenset(node for node in wanted if not wanted.intersection(node.prefixes()[:-1]))
        return replace(self, blocked=tops)

    def unblock(self, nodes: Iterable[Path]) -> BankPolicy:
        """Opens nodes and all below them. Raises BankError where one is open, or closed by a node above."""
        kept = set(self.blocked)
        for node in nodes:
            above = self.blocker(node)
            if above is not None and above != node:
                raise BankError(f"{node} is blocked by {above}", f"Unblock {above}.")
            opened = {other for other in self.blocked if node in other.prefixes()}
            if not opened:
                raise BankError(f"{node} is not blocked", "`hiermem bank ls` shows what is.")
            kept -= opened
        return replace(self, blocked=frozenset(kept))

    def to_json(self) -> dict[str, Any]:
        found = {"blocked": [str(node) for node in sorted(self.blocked)], "on_blocked": self.on_blocked}
        return found | {name: getattr(self, name) for name in REACHES if getattr(self, name) < math.inf}

    def write(self, file: pathlib.Path) -> None:
        write_json(file, self.to_json(), indent=1)

    @classmethod
    def read(cls, file: pathlib.Path) -> BankPolicy:
        """No file blocks nothing. Raises BankError for a damaged one: what it blocked must not come open."""
        if not file.exists():
            return cls()
        mend = "Mend it, or remove it to block nothing."
        data = read_json(file, BankError, mend)
        try:
            if not isinstance(data["blocked"], list):
                raise ValueError("blocked is not a list")
            extra = data.keys() - {"blocked", "on_blocked", *REACHES}
            if extra:
                raise ValueError(f"unknown settings {', '.join(sorted(extra))}")
            blocked = frozenset(map(Path.parse, data["blocked"]))
            reaches = (float(data.get(name, math.inf)) for name in REACHES)
            return cls(blocked, data.get("on_blocked", "sibling"), *reaches)
        except (*MALFORMED, HierMemError) as error:
            raise BankError(f"cannot read {file}: {error}", mend) from error


OPEN = BankPolicy()  # blocks nothing
