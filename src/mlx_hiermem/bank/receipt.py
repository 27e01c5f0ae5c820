"""without.json: what was left out of a bank before it was shared (see `subset`), and whether it is not there.

It names what was left out by path and digest, and the bank that it was left out of by the digest of its manifest:
whoever has that bank can make the same folder and receipt again, and whoever has the folder can see that none of
these bytes is in it (`absent`, which `hiermem bank verify` asks). It says nothing of what the blocks above, the
generic block and the anchor have learnt of the same texts; they are named as what may retain something.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import MALFORMED, file_digest, read_json

RECEIPT = "without.json"
FORMAT, VERSION = "mlx-hiermem-without", 1
AGAIN = "Get the bank again from whoever made it."


@dataclass(frozen=True)
class LeftOut:
    """A block that is not in the bank."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """What without.json says. `made_of` and `bank` are digests of the manifests before and after."""

    made_of: str
    bank: str
    nodes: tuple[str, ...]  # each with all below it
    blocks: tuple[LeftOut, ...]
    windows: int
    may_retain: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION} | asdict(self)

    @classmethod
    def read(cls, root: pathlib.Path) -> Receipt | None:
        """A bank's receipt; None where nothing was left out. Raises BankError for a damaged one."""
        file = root / RECEIPT
        if not file.is_file():
            return None
        data = read_json(file, BankError, AGAIN)
        try:
            if (data.pop("format"), data.pop("version")) != (FORMAT, VERSION):
                raise ValueError("it is of another format or version")
            blocks = tuple(LeftOut(**row) for row in data.pop("blocks"))
            nodes, may_retain = tuple(map(str, data.pop("nodes"))), tuple(map(str, data.pop("may_retain")))
            return cls(nodes=nodes, blocks=blocks, may_retain=may_retain, **data)
        except MALFORMED as error:
            raise BankError(f"{file} is no receipt: {error}", AGAIN) from error


def absent(bank: MemoryBank) -> Iterator[str]:
    """One line for each thing that a bank's receipt says is not in it, and is. Blocks may have come since."""
    receipt = Receipt.read(bank.root)
    if receipt is None:
        return
    out = {row.sha256 for row in receipt.blocks}
    names = {name: digest for name, _, digest in bank.files()}
    for file in sorted(bank.root.rglob("*")):
        name = file.relative_to(bank.root).as_posix()
        if file.is_file() and (names.get(name) or file_digest(file)) in out:
            yield f"{name} is a block that {RECEIPT} says was left out"
    if file_digest(bank.root / MANIFEST) != receipt.bank:  # it was changed since, by whoever has it now
        return
    for node in map(Path.parse, receipt.nodes):
        if bank.tree.has(node) or any(node in path.prefixes() for path in bank.manifest.blocks):
            yield f"{node} is in the bank, and {RECEIPT} says it was left out"
        if bank.sources and any(node in leaf.prefixes() for leaf in bank.sources.leaves()):
            yield f"texts of {node} are in the bank, and {RECEIPT} says they were left out"
