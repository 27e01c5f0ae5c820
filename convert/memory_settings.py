"""The settings of a memory checkpoint: a JSON file beside it, or the metadata inside it.

Only what shapes cannot tell is needed: which of the anchor's layers carry memory, unless all do. What this
version does not know is kept in the bank's recipe rather than lost.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_hiermem.assets import ASSETS
from mlx_hiermem.config import EmbedderIdentity, Path
from mlx_hiermem.convert.checkpoint import TensorSource
from mlx_hiermem.errors import CheckpointError, HierMemError
from mlx_hiermem.files import MALFORMED, parse_json, read_json

MINILM = EmbedderIdentity("all-MiniLM-L6-v2", ASSETS["all-minilm-l6-v2"].files["model.safetensors"], 256)
TELLING = {"kind", "branching", "block_sizes", "layers"}  # a JSON file with none of these is about something else


@dataclass(frozen=True)
class CheckpointSettings:
    """None where the settings do not say. `layers` may be a count; `anchor` what they tell of the anchor."""

    kind: str | None = None
    branching: int | None = None
    block_sizes: tuple[int, ...] | None = None
    layers: tuple[int, ...] | int | None = None
    anchor: Mapping[str, Any] = field(default_factory=dict)
    embedder: EmbedderIdentity = MINILM
    alpha: float = 2.0
    labels: Mapping[Path, str] = field(default_factory=dict)
    documents: Mapping[Path, int] = field(default_factory=dict)
    tokens: Mapping[Path, int] = field(default_factory=dict)
    sources: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CheckpointSettings:
        """Raises TypeError, ValueError, KeyError or HierMemError for values that do not fit."""
        known = {key: data[key] for key in cls.__dataclass_fields__ if data.get(key) is not None}
        other = {key: value for key, value in data.items() if key not in cls.__dataclass_fields__}
        licence, recipe = other.pop("license", ""), known.pop("recipe", {})
        if not isinstance(recipe, Mapping):
            recipe = {"description": recipe}
        readers: dict[str, Callable[[Any], Any]] = {
            "kind": lambda kind: str(kind).lower().replace("_", "-"),
            "branching": int,
            "block_sizes": lambda sizes: tuple(map(int, sizes)),
            "layers": lambda layers: layers if isinstance(layers, int) else tuple(map(int, layers)),
            "anchor": lambda anchor: dict(anchor) if isinstance(anchor, Mapping) else {"name": str(anchor)},
            "embedder": _embedder,
            "alpha": float,
            "labels": lambda table: _by_path(table, str),
            "documents": lambda table: _by_path(table, int),
            "tokens": lambda table: _by_path(table, int),
            "sources": lambda table: _by_path(table, lambda names: tuple(map(str, names))),
            "licence": str,
        }
        values = {"licence": str(licence)} | {key: readers[key](value) for key, value in known.items()}
        return cls(**values, recipe=dict(recipe) | ({"settings": other} if other else {}))


def read_settings(checkpoint: pathlib.Path, source: TensorSource) -> CheckpointSettings:
    """The settings beside the checkpoint, else those inside it, else none. Raises CheckpointError."""
    where, data = _find(checkpoint, source)
    plain = {str(key).strip().lower().replace(" ", "_").replace("-", "_"): value for key, value in data.items()}
    try:
        return CheckpointSettings.from_json(plain)
    except (*MALFORMED, HierMemError) as error:
        raise CheckpointError(f"the settings in {where} do not fit: {error}", "See docs/convert.md.") from error


def _find(checkpoint: pathlib.Path, source: TensorSource) -> tuple[pathlib.Path, Mapping[str, Any]]:
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    own = [] if checkpoint.is_dir() else [checkpoint.with_suffix(".json")]
    for file in (*own, folder / "memory.json", folder / "config.json"):
        if file.is_file():
            data = _read_json(file)
            if file in own or TELLING & set(data):
                return file, data
    inside = {key: _parse(value) for key, value in (source.extras | source.metadata).items()}
    config = inside.get("config")
    return source.files[0], config if isinstance(config, Mapping) else inside if TELLING & set(inside) else {}


def _read_json(file: pathlib.Path) -> Mapping[str, Any]:
    data = read_json(file, CheckpointError, "Correct the settings, or name others.")
    if not isinstance(data, Mapping):
        raise CheckpointError(f"the settings {file} are not a table of names and values")
    return data


def _parse(value: Any) -> Any:
    """Metadata values are texts; those that are JSON are read as such."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _embedder(value: Any) -> EmbedderIdentity:
    """A name or a table; all-MiniLM-L6-v2 fills in what is left out, if it is that one."""
    table = dict(value) if isinstance(value, Mapping) else {"name": str(value)}
    name = str(table.get("name", MINILM.name))
    same = name.lower().rsplit("/", 1)[-1] == MINILM.name.lower()
    digest, tokens = (MINILM.digest, MINILM.max_tokens) if same else ("", 0)
    return EmbedderIdentity(
        MINILM.name if same else name, str(table.get("digest") or digest), int(table.get("max_tokens") or tokens)
    )


def _by_path(table: Mapping[str, Any], read: Callable[[Any], Any]) -> dict[Path, Any]:
    return {Path.parse(path): read(value) for path, value in table.items()}
