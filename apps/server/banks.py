"""/v1/banks and /v1/learning: what the server has loaded, what it can load, and what is being learnt."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mlx_hiermem.assets import cache_folder
from mlx_hiermem.bank.bank import MANIFEST
from mlx_hiermem.learn.stages import read_status
from mlx_hiermem.model import MemoryModel

MARKS = ("anchor", f"bank/{MANIFEST}", MANIFEST)  # one of them is in the folder of a model or a bank
LISTED = 100  # folders


def banks(models: Mapping[str, MemoryModel], loading: bool) -> dict[str, Any]:
    """`found` names folders of this machine, and so is there only where a client may load them."""
    data = [_row(name, model) for name, model in models.items()]
    served = {folder for model in models.values() if (folder := _folder(model))}
    found = sorted(set(_beside(served)) - served)[:LISTED] if loading else []
    return {
        "allow_loading": loading,
        "data": data,
        "found": [{"name": folder.name, "path": str(folder)} for folder in found],
    }


def _row(name: str, model: MemoryModel) -> dict[str, Any]:
    blocks = model.bank.manifest.blocks.values() if model.bank else ()
    return {"name": name, "blocks": len(blocks), "bytes": sum(block.bytes for block in blocks)}


def _folder(model: MemoryModel) -> pathlib.Path | None:
    """Of a model with a bank, or of a bank alone."""
    if model.bank is None:
        return None
    root = model.bank.root.resolve()
    return root.parent if root.name == "bank" else root


def _beside(served: set[pathlib.Path]) -> Iterator[pathlib.Path]:
    """Models and banks in the folders that the served ones lie in, and those that came from the hub."""
    pulled = cache_folder() / "models"  # NAME, or OWNER/NAME
    owners = (folder for folder in _folders(pulled) if not _is_one(folder))
    for shelf in {*(folder.parent for folder in served), pulled, *owners}:
        yield from (folder.resolve() for folder in _folders(shelf) if _is_one(folder))


def _is_one(folder: pathlib.Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def _folders(place: pathlib.Path) -> list[pathlib.Path]:
    with contextlib.suppress(OSError):  # it is not there, or may not be read
        return [entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return []


def learning(folders: Sequence[pathlib.Path], served: Collection[str], loading: bool) -> dict[str, Any]:
    """How far `hiermem learn` is in the folders that the server was told to watch.

    `path` is there where a client may load what was learnt (`/v1/banks/load`).
    """
    return {"runs": [_learning_row(folder, served, loading) for folder in folders]}


def _learning_row(folder: pathlib.Path, served: Collection[str], loading: bool) -> dict[str, Any]:
    status = {name: value for name, value in read_status(folder).items() if name != "pid"}
    row = {"name": folder.name, "served": folder.name in served} | status
    return row | ({"path": str(folder)} if loading and row["state"] == "done" and not row["served"] else {})
