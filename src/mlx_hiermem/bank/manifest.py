"""bank.json, the manifest: which anchor, which memory design, which blocks, where they came from.

Format version 1. A reader refuses another version, and a bank whose anchor is not the one at hand.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_hiermem.bank.table import BlockEntry, Blocks, incomplete, order, split
from mlx_hiermem.config import AnchorIdentity, EmbedderIdentity, MemoryConfig, Path
from mlx_hiermem.errors import AnchorMismatchError, BankError

FORMAT, VERSION = "mlx-hiermem-bank", 1


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of a file that belongs to no cluster (the tree, the generic block)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class BankManifest:
    anchor: AnchorIdentity
    memory: MemoryConfig
    embedder: EmbedderIdentity
    blocks: Blocks
    tree: FileEntry
    generic: FileEntry | None = None
    labels: dict[Path, str] = field(default_factory=dict)  # of nodes that have no block of their own
    recipe: dict[str, Any] = field(default_factory=dict)
    licence: str = ""

    def has_block(self, node: Path) -> bool:
        """Whether a node has a block. The table is not asked for levels that have none."""
        sizes = self.memory.block_sizes
        return 0 < len(node) <= len(sizes) and sizes[len(node) - 1] > 0 and node in self.blocks

    def label(self, node: Path) -> str:
        return self.blocks[node].label if self.has_block(node) else self.labels.get(node, "")

    def totals(self) -> dict[str, int]:
        sizes = self.memory.block_sizes
        return {
            "blocks": len(self.blocks),
            "bytes": sum(entry.bytes for entry in self.blocks.values()),
            "parameters": sum(self.memory.parameters(sizes[len(path) - 1]) for path in self.blocks),
            "fetched_parameters": self.memory.fetched_parameters,
        }

    def check_anchor(self, anchor: AnchorIdentity) -> None:
        """Raises AnchorMismatchError unless `anchor` is the one the bank was made for."""
        ours, theirs = self.anchor, anchor
        for field_name in ("hidden", "layers", "config_digest", "weights_digest"):
            mine, other = getattr(ours, field_name), getattr(theirs, field_name)
            if mine != other:
                raise AnchorMismatchError(
                    f"the bank was made for the anchor {ours.name} ({field_name} {str(mine)[:12]}), "
                    f"not for {theirs.name} ({str(other)[:12]})",
                    "Attach it to that anchor, or convert or learn a bank for this one.",
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "anchor": self.anchor.to_json(),
            "memory": self.memory.to_json(),
            "embedder": self.embedder.to_json(),
            "tree": asdict(self.tree),
            "generic": asdict(self.generic) if self.generic else None,
            "totals": self.totals(),
            "recipe": self.recipe,
            "licence": self.licence,
            "labels": {str(path): label for path, label in self.labels.items()},
            "blocks": [self.blocks[path].to_json() for path in sorted(self.blocks, key=order)],
        }

    def write(self, file: pathlib.Path) -> None:
        """One block a line: the table stays readable, its diffs small, and a row is found quickly (see `table`)."""
        data = self.to_json()
        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in data.pop("blocks"))
        head = json.dumps(data, indent=1, ensure_ascii=False)[:-2]
        file.write_text(f'{head},\n "blocks": [\n{rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, file: pathlib.Path) -> BankManifest:
        """Raises BankError where the file is missing, damaged or of another version."""
        try:
            parts = split(file)
            data = json.loads(parts[0] if parts else file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise BankError(f"no bank.json in {file.parent}", "Is this the bank/ folder of a model?") from error
        except (OSError, ValueError) as error:
            raise BankError(f"cannot read {file}: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BankError(f"{file} is not the manifest of a memory bank")
        if data.get("version") != VERSION:
            raise BankError(
                f"{file} has format version {data.get('version')}, this version reads {VERSION}",
                "Install the mlx-hiermem that wrote it, or a newer one.",
            )
        try:
            return cls(
                anchor=AnchorIdentity(**data["anchor"]),
                memory=MemoryConfig.from_json(data["memory"]),
                embedder=EmbedderIdentity(**data["embedder"]),
                blocks=parts[1] if parts else {row.path: row for row in map(BlockEntry.from_json, data["blocks"])},
                tree=FileEntry(**data["tree"]),
                generic=FileEntry(**data["generic"]) if data.get("generic") else None,
                labels={Path.parse(path): label for path, label in data.get("labels", {}).items()},
                recipe=data.get("recipe", {}),
                licence=data.get("licence", ""),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise incomplete(file, error) from error
