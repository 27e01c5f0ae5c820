"""The blocks in training, each with its own optimiser state, of which only the latest used are in memory.

A block's file holds float32 weights, AdamW's two moments and its number of updates. Files are never overwritten:
what changed since the last `commit` goes to files of new names, and `commit` renames one list of the names that
count. So a killed process leaves the state of its last commit, to the bit, and nothing of what came after it.
"""

from __future__ import annotations

import json
import pathlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_hiermem.config import GENERIC_NODE, Path
from mlx_hiermem.errors import HierMemError, OutputError
from mlx_hiermem.files import reason, write_json

LIST = "blocks.json"
Tensors = dict[str, mx.array]
MOMENTS = ("m", "v")  # AdamW's, in mlx.optimizers' names
GO_ON = "Free some space; learning goes on where it stopped."


@dataclass
class TrainedBlock:
    """One block: weights [L, r, width], and per tensor what the optimiser keeps. `updates` counts its steps."""

    weights: Tensors
    moments: dict[str, Tensors]  # tensor name -> m, v
    updates: int = 0

    @classmethod
    def fresh(cls, weights: Tensors) -> TrainedBlock:
        moments = {name: {key: mx.zeros_like(value) for key in MOMENTS} for name, value in weights.items()}
        return cls(weights, moments)

    @property
    def arrays(self) -> Tensors:
        """Everything under one name each, as in the file."""
        kept = {f"{key}.{name}": value for name, own in self.moments.items() for key, value in own.items()}
        return self.weights | kept

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class TrainedBlocks:
    """The blocks of one job by node; the empty path is the generic block."""

    def __init__(
        self,
        folder: pathlib.Path,
        budget: int,
        start: Callable[[Path], Tensors],
    ) -> None:
        """`budget`: bytes of blocks in memory, more only for those of one step. `start` gives a new block's
        weights.

        Goes on with what was committed in `folder` before; `progress` is what was committed with it.
        """
        self.folder, self.budget, self._start = folder, budget, start
        self.progress: dict[str, Any] = {}
        self._files: dict[Path, str] = {}  # where each block's latest state is
        self._held: OrderedDict[Path, TrainedBlock] = OrderedDict()  # least recently used first
        self._changed: set[Path] = set()  # among the held
        self._in_use: frozenset[Path] = frozenset()
        self._version = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LIST).is_file():
            saved = json.loads((folder / LIST).read_text(encoding="utf-8"))
            self.progress, self._version = saved["progress"], saved["version"] + 1
            self._files = {_node(name): file for name, file in saved["files"].items()}
        self._drop_strays()

    def use(self, nodes: frozenset[Path]) -> None:
        """Makes room and brings these blocks in; until the next call they stay."""
        self._in_use = nodes
        for node in sorted(nodes):
            if node not in self._held:
                self._held[node] = self._read(node)
            self._held.move_to_end(node)
        total = sum(block.nbytes for block in self._held.values())
        for node in [node for node in self._held if node not in nodes]:
            if total <= self.budget:
                break
            total -= self._held[node].nbytes
            if node in self._changed:
                self._write(node)
            del self._held[node]

    def __getitem__(self, node: Path) -> TrainedBlock:
        """A block in use."""
        return self._held[node]

    def touch(self, node: Path) -> None:
        """Says that a block in use was changed."""
        self._changed.add(node)

    def commit(self, progress: Mapping[str, Any]) -> None:
        """Makes the present state of all blocks the one that a killed run goes on from. Raises OutputError."""
        for node in sorted(self._changed):
            self._write(node)
        self.progress = dict(progress)
        files = {_name(node): file for node, file in self._files.items()}
        content = {"version": self._version, "progress": self.progress, "files": files}
        write_json(self.folder / LIST, content, None, GO_ON)
        self._version += 1
        self._drop_strays()

    def __contains__(self, node: Path) -> bool:
        """Whether a node's block has been trained, or is in use."""
        return node in self._files or node in self._held

    @property
    def nodes(self) -> list[Path]:
        """The nodes whose blocks are committed."""
        return sorted(self._files)

    def read(self, node: Path) -> TrainedBlock:
        """A committed block, from disk."""
        return self._read(node)

    def _read(self, node: Path) -> TrainedBlock:
        if node not in self._files:
            return TrainedBlock.fresh(self._start(node))
        file = self.folder / self._files[node]
        try:
            loaded: Any = mx.load(str(file), return_metadata=True)
            arrays, metadata = loaded
            mx.eval(arrays)
        except (OSError, RuntimeError, ValueError) as error:
            raise HierMemError(
                f"cannot read {file}: {error}", "Remove that folder to learn its blocks again."
            ) from error
        names = [name for name in arrays if f"m.{name}" in arrays]
        moments = {name: {key: arrays[f"{key}.{name}"] for key in MOMENTS} for name in names}
        return TrainedBlock({name: arrays[name] for name in names}, moments, int(metadata["updates"]))

    def _write(self, node: Path) -> None:
        block = self._held[node]
        name = f"{_name(node)}@{self._version}.safetensors"
        try:
            mx.save_safetensors(str(self.folder / name), block.arrays, {"updates": str(block.updates)})
        except (OSError, RuntimeError) as error:
            raise _failed(self.folder, error) from error
        self._files[node] = name
        self._changed.discard(node)

    def _drop_strays(self) -> None:
        """Deletes states that no list names: older ones, and a killed run's later ones."""
        known = set(self._files.values())
        for file in self.folder.glob("*.safetensors"):
            if file.name not in known:
                file.unlink()


def _name(node: Path) -> str:
    return str(node) if node else "generic"


def _node(name: str) -> Path:
    return GENERIC_NODE if name == "generic" else Path.parse(name)


def _failed(folder: pathlib.Path, error: Exception) -> OutputError:
    return OutputError(f"cannot write {folder}: {reason(error)}", GO_ON)
