"""An exported folder, opened as an app opens it: manifest, packages, bank, tokenizer."""

from __future__ import annotations

import pathlib
from functools import cached_property
from typing import Any

import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.convert.coreml.device import open_package
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.prompts import prompts
from mlx_hiermem.convert.coreml.runner import Runner
from mlx_hiermem.errors import CoreMLError
from mlx_hiermem.files import parse_json
from mlx_hiermem.tokenizer import encode_text, load_tokenizer

MANIFEST = "manifest.json"
# What is read of the manifest; its parts but the anchor may be null.
KEYS = {
    "anchor": (
        *("package", "functions", "load_block", "context", "vocabulary"),
        *("inputs", "outputs", "states", "logits", "compression"),
    ),
    "memory": ("mode", "layers", "units", "hidden"),
    "retriever": ("package", "tokenizer", "inputs", "outputs", "lengths"),
    "bank": ("folder", "download"),
}


class Exported:
    """An exported folder. Raises CoreMLError where it is none, or of another version; packages open when used."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.manifest = folder, _read_manifest(folder / MANIFEST)
        self.anchor, self.memory = self.manifest["anchor"], self.manifest["memory"]
        self.retriever = self.manifest["retriever"]

    @cached_property
    def program(self) -> Program:
        return open_package(self.folder / self.anchor["package"])

    @cached_property
    def bank(self) -> MemoryBank | None:
        return MemoryBank.open(self.folder / self.manifest["bank"]["folder"]) if self.memory else None

    def runner(self, *, fp16: bool = True) -> Runner:
        return Runner(self.program, self.anchor, self.memory, fp16=fp16)

    def memories(self) -> list[str]:
        """The first and the last of the longest paths whose blocks are all in the folder."""
        if self.bank is None:
            return []
        blocks, absent = self.bank.manifest.blocks, self.manifest["bank"]["download"]
        here = [path for path in blocks if not any(block_name(node) in absent for node in path.prefixes())]
        longest = sorted(path for path in here if len(path) == max(map(len, here)))
        return [str(path) for path in dict.fromkeys(longest[:1] + longest[-1:])]

    def prompts(self, count: int, generated: int) -> list[np.ndarray]:
        """Token ids of the first prompts, cut so that so many tokens fit behind them."""
        room = self.anchor["context"] - generated
        if self.tokenizer is None:
            return [
                np.arange(start, start + min(12, room)) * 7919 % self.anchor["vocabulary"] for start in range(count)
            ]
        return [np.array(encode_text(self.tokenizer, text)[:room]) for text in prompts()[:count]]

    @cached_property
    def tokenizer(self) -> Any:
        """None where the anchor has none."""
        return load_tokenizer(self.folder / self.manifest["tokenizer"])


def _read_manifest(file: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = parse_json(file.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CoreMLError(
            f"{file.parent} is no exported folder: {error}", "See `hiermem export coreml`."
        ) from error
    if found != ("mlx-hiermem-coreml", 1):
        raise CoreMLError(f"{file} is {found[0]} {found[1]}, known is mlx-hiermem-coreml 1")
    missing = [key for key in ("name", "files", "tokenizer", *KEYS) if key not in manifest]
    for part, keys in KEYS.items():
        if (row := manifest.get(part)) is not None or part == "anchor":
            missing += [f"{part}.{key}" for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise CoreMLError(f"{file} has no {missing[0]}", "Export the model again.")
    return manifest
