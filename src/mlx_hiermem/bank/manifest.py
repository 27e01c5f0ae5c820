"""bank.json, the manifest: which anchor, which memory design, which blocks, where they came from.

Format version 1. A reader refuses another version, and a bank whose anchor is not the one at hand.

The table of blocks comes last, one row a line, sorted by level and path, and is read where it is asked: `bisect`
finds a row in the mapped file, so opening a bank of 70 000 blocks costs what 300 cost. A manifest laid out
otherwise is read whole: slower, with the same result. What was opened stays mapped: a file that replaces it does
not change it. Why no index is kept beside it: docs/decisions/2026-11-29-manifest-index.md.
"""

from __future__ import annotations

import bisect
import json
import mmap
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from mlx_hiermem.config import AnchorIdentity, EmbedderIdentity, MemoryConfig, Path
from mlx_hiermem.errors import AnchorMismatchError, BankError, HierMemError
from mlx_hiermem.files import MALFORMED, parse_json
from mlx_hiermem.printable import printable

FORMAT, VERSION = "mlx-hiermem-bank", 1
START, END = b',\n "blocks": [\n', b"\n ]\n}\n"  # no string in JSON has a line break
STEP = 4096  # bytes between the places that the search looks at: some twenty rows
ROW = re.compile(rb'  \{"path": "([0-9.]+)"')


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of a file that belongs to no cluster (the tree, the generic block)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourcesEntry:
    """The two files of the sources; see `bank.sources`."""

    windows: int
    documents: int
    texts: FileEntry
    index: FileEntry

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SourcesEntry:
        """Raises as `BlockEntry.from_json`."""
        files = counted(FileEntry(**data["texts"])), counted(FileEntry(**data["index"]))
        return cls(int(data["windows"]), int(data["documents"]), *files)


@dataclass(frozen=True)
class BlockEntry:
    """One row of the block table."""

    path: Path
    bytes: int
    sha256: str
    label: str = ""
    documents: int = 0
    tokens: int = 0
    sources: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path), "sources": list(self.sources)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> BlockEntry:
        """Raises KeyError, TypeError, ValueError, AttributeError or HierMemError for what is no row."""
        sources = tuple(map(printable, row.get("sources", ())))
        label = printable(row.get("label", ""))
        return counted(cls(**{**row, "path": Path.parse(row["path"]), "label": label, "sources": sources}))


Entry = TypeVar("Entry", FileEntry, BlockEntry)


def counted(row: Entry) -> Entry:
    """The row itself; ValueError unless its counts are whole numbers, 0 or more, and its digest a text."""
    counts = (row.bytes, row.documents, row.tokens) if isinstance(row, BlockEntry) else (row.bytes,)
    if any(type(count) is not int or count < 0 for count in counts) or not isinstance(row.sha256, str):
        raise ValueError(f"{row} is not a row of counts and a digest")
    return row


def order(path: Path) -> tuple[int, Path]:
    """What the table is sorted by: level, then path."""
    return len(path), path


def in_order(blocks: Mapping[Path, BlockEntry]) -> dict[Path, BlockEntry]:
    """Level by level, as the table lists them."""
    return {path: blocks[path] for path in sorted(blocks, key=order)}


class BlockTable(Mapping[Path, BlockEntry]):
    """Path -> row, from the lines of an open manifest. Errors in a row are found when it is read (BankError)."""

    def __init__(self, file: pathlib.Path, text: mmap.mmap, start: int, end: int) -> None:
        self._file, self._text, self._start, self._end = file, text, start, end
        self._found: dict[Path, BlockEntry] = {}
        self._orders: dict[int, tuple[int, Path]] = {}

    def __getitem__(self, path: Path) -> BlockEntry:
        if path not in self._found:
            row = self._search(path)
            # Of a table that is out of order the search misses rows; reading it all does not.
            self._found[path] = self._entry(row) if row else self._all[path]
        return self._found[path]

    def __contains__(self, path: object) -> bool:
        try:
            return isinstance(path, Path) and bool(self[path])
        except KeyError:
            return False

    def __iter__(self) -> Iterator[Path]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __or__(self, other: Mapping[Path, BlockEntry]) -> dict[Path, BlockEntry]:
        return {**self, **other}

    def _search(self, path: Path) -> bytes:
        """The line of a path, if the table is sorted: it ends in the first place whose row is not before it."""
        places = range(self._start, self._end, STEP)
        number = bisect.bisect_left(places, order(path), key=self._order_at)
        begins = b'\n  {"path": "%s"' % str(path).encode()
        low = places[number - 1] if number else self._start
        high = places[number] if number < len(places) else self._end
        at = self._text[low - 1 : high + len(begins)].find(begins)
        return self._line(low + at) if at >= 0 else b""

    def _order_at(self, place: int) -> tuple[int, Path]:
        """What the line that a place lies in is sorted by; kept, as all searches begin at the same places."""
        if place not in self._orders:
            self._orders[place] = order(self._path(self._line(place)))
        return self._orders[place]

    def _line(self, place: int) -> bytes:
        """The line that a byte lies in."""
        end = self._text.find(b"\n", place, self._end)
        return self._text[self._text.rfind(b"\n", 0, place) + 1 : end if end >= 0 else self._end]

    def _path(self, line: bytes) -> Path:
        match = ROW.match(line)
        return Path.parse(match[1].decode()) if match else self._entry(line).path

    def _entry(self, line: bytes) -> BlockEntry:
        try:
            return BlockEntry.from_json(parse_json(line.removesuffix(b",")))
        except (*MALFORMED, HierMemError) as error:
            raise _incomplete(self._file, error) from error

    @cached_property
    def _all(self) -> dict[Path, BlockEntry]:
        lines = self._text[self._start : self._end].split(b"\n")
        return {entry.path: entry for entry in map(self._entry, filter(None, lines))}


Blocks = BlockTable | dict[Path, BlockEntry]


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
    sources: SourcesEntry | None = None

    def has_block(self, node: Path) -> bool:
        """Whether a node has a block. The table is not asked for levels that have none."""
        sizes = self.memory.block_sizes
        return 0 < len(node) <= len(sizes) and sizes[len(node) - 1] > 0 and node in self.blocks

    def label(self, node: Path) -> str:
        return self.blocks[node].label if self.has_block(node) else self.labels.get(node, "")

    @property
    def knows_questions(self) -> bool:
        """Whether `hiermem learn` made the bank, which teaches questions in `tokenizer.FRAME`."""
        recipes = self.recipe.get("merged", [self.recipe])
        return any(isinstance(one, dict) and one.get("name") == "learn" for one in recipes)

    def totals(self) -> dict[str, int]:
        """Raises BankError where the table has a block of a level that the memory does not have."""
        sizes = self.memory.block_sizes
        if lost := [str(path) for path in self.blocks if not 0 < len(path) <= len(sizes)]:
            raise BankError(
                f"the manifest has a block {lost[0]}, but its memory {len(sizes)} levels",
                "Convert or pull the bank again.",
            )
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
            **({"sources": asdict(self.sources)} if self.sources else {}),
            "totals": self.totals(),
            "recipe": self.recipe,
            "licence": self.licence,
            "labels": {str(path): label for path, label in self.labels.items()},
            "blocks": [self.blocks[path].to_json() for path in sorted(self.blocks, key=order)],
        }

    def write(self, file: pathlib.Path) -> None:
        """One block a line: the table stays readable, its diffs small, and a row is found quickly."""
        data = self.to_json()
        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in data.pop("blocks"))
        head = json.dumps(data, indent=1, ensure_ascii=False)[:-2]
        file.write_text(f'{head},\n "blocks": [\n{rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, file: pathlib.Path) -> BankManifest:
        """Raises BankError where the file is missing, damaged or of another version."""
        try:
            parts = _split(file)
            data = parse_json(parts[0] if parts else file.read_text(encoding="utf-8"))
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
                anchor=AnchorIdentity.from_json(data["anchor"]),
                memory=MemoryConfig.from_json(data["memory"]),
                embedder=EmbedderIdentity.from_json(data["embedder"]),
                blocks=parts[1] if parts else {row.path: row for row in map(BlockEntry.from_json, data["blocks"])},
                tree=counted(FileEntry(**data["tree"])),
                generic=counted(FileEntry(**data["generic"])) if data.get("generic") else None,
                labels={Path.parse(path): printable(label) for path, label in data.get("labels", {}).items()},
                recipe=dict(data.get("recipe", {})),
                licence=printable(data.get("licence", "")),
                sources=SourcesEntry.from_json(data["sources"]) if data.get("sources") else None,
            )
        except MALFORMED as error:
            raise _incomplete(file, error) from error


def _split(file: pathlib.Path) -> tuple[bytes, BlockTable] | None:
    """The manifest's JSON without its table, and the table; None where the file is laid out otherwise."""
    with file.open("rb") as stream:
        text = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    found, end = text.find(START), len(text) - len(END)
    start = found + len(START)
    if found < 0 or start > end or text[end:] != END:
        return None
    return text[:found] + b"}", BlockTable(file, text, start, end)


def _incomplete(file: object, error: Exception) -> BankError:
    """What a manifest that lacks something is refused with."""
    return BankError(f"{file} is incomplete: {error!r}", "Convert or pull the bank again.")
