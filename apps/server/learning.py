"""/v1/learning: how far `hiermem learn` is in the folders that the server was told to watch."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from mlx_hiermem.learn.status import read_status


def runs(folders: Sequence[pathlib.Path], served: Collection[str], loading: bool) -> dict[str, Any]:
    """Of each folder a run. `path` is there where a client may load what was learnt (`/v1/banks/load`)."""
    return {"runs": [_run(folder, served, loading) for folder in folders]}


def _run(folder: pathlib.Path, served: Collection[str], loading: bool) -> dict[str, Any]:
    status = {name: value for name, value in read_status(folder).items() if name != "pid"}
    row = {"name": folder.name, "served": folder.name in served} | status
    return row | ({"path": str(folder)} if loading and row["state"] == "done" and not row["served"] else {})
