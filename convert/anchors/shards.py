"""Weights written in shards, so that a conversion that was killed goes on after the last whole one.

A shard gets its name once it is whole; what has its name is not made again. Whoever continues makes sure that the
source and the options are the same (`pipeline.convert` compares source.json).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_hiermem.errors import HierMemError
from mlx_hiermem.files import write_json

SHARD = 1 << 30  # bytes at most, or one tensor; mlx-lm writes five times as much, which would all be lost
INDEX = "model.safetensors.index.json"


@contextlib.contextmanager
def staging_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder beside `out` for what it is made from.

    It stays where the process is interrupted or the disk is full, and goes where the source is at fault.
    """
    folder = staging_name(out)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except HierMemError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def staging_name(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f".staging-{out.name}")


def write_shards(
    folder: pathlib.Path, sizes: Mapping[str, int], read: Callable[[str], Mapping[str, mx.array]]
) -> None:
    """Writes what `read` makes of each name (one tensor or several) into files model*.safetensors."""
    for number, names in enumerate(_groups(sizes)):
        file = folder / f"model-{number:05d}.safetensors"
        if not file.exists():
            tensors: dict[str, mx.array] = {}
            for name in names:
                tensors |= read(name)
                mx.eval(list(tensors.values()))  # else what they are computed from stays in memory
            _save(file, tensors)


def save_weights(out: pathlib.Path, model: nn.Module) -> None:
    """Writes the weights that are not there yet, and their index, as mlx-lm does."""
    from mlx_lm.utils import get_total_parameters

    weights, total = dict(tree_flatten(model.parameters())), 0
    index: dict[str, str] = {}
    for file, names in _files(out, weights).items():
        if not file.exists():
            _save(file, {name: weights[name] for name in names})
        index |= dict.fromkeys(names, file.name)
        total += sum(weights[name].nbytes for name in names)
    metadata = {"total_size": total, "total_parameters": get_total_parameters(model)}
    write_json(out / INDEX, {"metadata": metadata, "weight_map": dict(sorted(index.items()))}, indent=4)


def is_begun(out: pathlib.Path) -> bool:
    """Whether an interrupted run has written shards of `out`: it had read and checked every value before."""
    return any(out.glob("model*.safetensors"))


def _files(out: pathlib.Path, weights: Mapping[str, mx.array]) -> dict[pathlib.Path, list[str]]:
    groups = _groups({name: value.nbytes for name, value in weights.items()})
    if len(groups) == 1:
        return {out / "model.safetensors": groups[0]}
    return {out / f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = SHARD
        groups[-1].append(name)
        room -= size
    return groups


def _save(file: pathlib.Path, tensors: dict[str, mx.array]) -> None:
    partial = file.with_name(f"unfinished-{file.name}")  # MLX insists on the ending; nobody reads it by this name
    try:
        mx.save_safetensors(str(partial), tensors, metadata={"format": "mlx"})
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
