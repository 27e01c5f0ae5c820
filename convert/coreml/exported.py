"""An exported folder, opened as an app opens it: manifest, packages, bank, tokenizer."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from mlx_hiermem.anchor import load_tokenizer
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.convert.coreml.device import open_package
from mlx_hiermem.convert.coreml.prompts import prompts
from mlx_hiermem.convert.coreml.runner import Runner
from mlx_hiermem.errors import CoreMLError

MANIFEST = "manifest.json"


class Exported:
    """An exported folder. Raises CoreMLError where it is none, or of another version."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            found = (self.manifest["format"], self.manifest["version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CoreMLError(f"{folder} is no exported folder: {error}", "See `hiermem export coreml`.") from error
        if found != ("mlx-hiermem-coreml", 1):
            raise CoreMLError(f"{folder / MANIFEST} is {found[0]} {found[1]}, known is mlx-hiermem-coreml 1")
        self.anchor, self.memory = self.manifest["anchor"], self.manifest.get("memory")
        self.program = open_package(folder / self.anchor["package"])
        self.bank = MemoryBank.open(folder / self.manifest["bank"]["folder"]) if self.memory else None

    def runner(self) -> Runner:
        return Runner(self.program, self.anchor, self.memory)

    def memories(self) -> list[str]:
        """The first and the last of the longest paths whose blocks are all in the folder."""
        if self.bank is None:
            return []
        absent = self.manifest["bank"]["download"]
        here = [path for path in self.bank.manifest.blocks if block_name(path) not in absent]
        longest = sorted(path for path in here if len(path) == max(map(len, here)))
        return [str(path) for path in dict.fromkeys((longest[0], longest[-1]))]

    def prompts(self, count: int, generated: int) -> list[np.ndarray]:
        """Token ids of the first prompts, cut so that so many tokens fit behind them."""
        tokenizer = load_tokenizer(self.folder / self.manifest["tokenizer"])
        room = self.anchor["context"] - generated
        if tokenizer is None:
            return [
                np.arange(start, start + min(12, room)) * 7919 % self.anchor["vocabulary"] for start in range(count)
            ]
        return [np.array(tokenizer.encode(text)[:room]) for text in prompts()[:count]]
