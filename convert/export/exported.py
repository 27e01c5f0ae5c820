"""An exported folder, opened and run as an app does it: manifest, packages, bank, tokenizer.

The anchor takes prompts in calls of 32 tokens, answers in calls of one, and its memory is swapped between them.
Here the interpreter does what Core ML does on a phone: it is how exports are measured and verified.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from functools import cached_property
from types import NoneType
from typing import Any

import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.convert.coreml.device import open_package
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.export.sample_texts import prompts
from mlx_hiermem.errors import CoreMLError
from mlx_hiermem.files import parse_json
from mlx_hiermem.tokenizer import encode_text, load_tokenizer

MANIFEST = "manifest.json"
COREML, COREAI = "mlx-hiermem-coreml", "mlx-hiermem-coreai"  # formats of folders
MEMORY = ("gate", "up", "down")


def _are_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(row, dict) and _are_ints(row.get("shape")) for row in value.values()
    )


def _are_functions(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(count) is int for count in value.values())


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# What is read of the manifest, and what it must be; its parts but the anchor may be null.
TOP = {"name": str, "files": dict, "tokenizer": str}
KEYS: dict[str, dict[str, type | tuple[type, ...] | Callable[[Any], bool]]] = {
    "anchor": {
        **{"package": str, "functions": _are_functions, "load_block": (str, NoneType), "context": int},
        **{"vocabulary": int, "inputs": _are_tensors, "outputs": _are_tensors, "states": _are_tensors},
        **{"logits": _are_names, "compression": (dict, NoneType)},
    },
    "memory": {"mode": str, "layers": _are_ints, "units": int, "hidden": int},
    "retriever": {
        "package": str,
        "tokenizer": str,
        "inputs": _are_tensors,
        "outputs": _are_tensors,
        "lengths": _are_ints,
    },
    "bank": {"folder": str, "download": dict},
}


class Exported:
    """An exported folder. Raises CoreMLError where it is none, or of another version; packages open when used."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.manifest = folder, _read_manifest(folder / MANIFEST)
        self.format = self.manifest["format"]
        self.anchor, self.memory = self.manifest["anchor"], self.manifest["memory"]
        self.retriever = self.manifest["retriever"]

    @cached_property
    def program(self) -> Program:
        return self.open(self.anchor["package"])

    def open(self, package: str) -> Program:
        """One of the folder's packages, by what runs such."""
        if self.format == COREAI:
            from mlx_hiermem.convert.coreai.interpreter import Runtime

            return Runtime(self.folder / package)
        return open_package(self.folder / package)

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
        raise CoreMLError(f"{file.parent} is no exported folder: {error}", "See `hiermem export`.") from error
    if found not in ((COREML, 1), (COREAI, 1)):
        raise CoreMLError(f"{file} is {found[0]} {found[1]}, known is {COREML} 1 or {COREAI} 1")
    if wrong := _wrong(manifest):
        raise CoreMLError(f"{file} has no {wrong}", "Export the model again.")
    return manifest


def _wrong(manifest: Mapping[str, Any]) -> str:
    """The first that is missing, or is of another type; empty where all is there."""
    for key in (*TOP, *KEYS):
        if key not in manifest or not isinstance(manifest[key], TOP.get(key, (dict, NoneType))):
            return key
    for part, keys in KEYS.items():
        row = manifest[part]
        if row is None and part != "anchor":
            continue
        for key, kind in keys.items():
            value = (row or {}).get(key, _wrong)
            if not (isinstance(value, kind) if isinstance(kind, type | tuple) else kind(value)):
                return f"{part}.{key}"
    return "bank" if manifest["memory"] and not manifest["bank"] else ""


class Runner:
    """`anchor` and `memory` are the manifest's. `peaks` and `fp16` are `Program.run`'s."""

    def __init__(
        self,
        program: Program,
        anchor: Mapping[str, Any],
        memory: Mapping[str, Any] | None = None,
        peaks: dict[str, float] | None = None,
        *,
        fp16: bool = True,
    ) -> None:
        self.program, self.anchor, self.memory, self.peaks, self.fp16 = program, anchor, memory, peaks, fp16
        self.calls = sorted(anchor["functions"].items(), key=lambda call: -call[1])  # longest first
        self.state = program.make_state(self.calls[0][0])
        self.inputs: dict[str, np.ndarray] = {}
        self.position = 0
        self.set_memory(None)

    def set_memory(self, tensors: Mapping[str, np.ndarray] | None, how: str = "direct") -> None:
        """Swaps the memory: gate, up, down [L, r, d] with r at most the units there are; None takes it out.

        `how` is `direct` (the states are written by the caller) or `load_block` (by that function). The tokens
        so far were computed under the old memory: begin again.
        """
        if self.memory is None:
            if tensors is not None:
                raise CoreMLError("this anchor was exported without memory")
            return
        shape = (len(self.memory["layers"]), self.memory["units"], self.memory["hidden"])
        arrays = {name: np.zeros(shape, np.float16) for name in MEMORY}
        for name, tensor in (tensors or {}).items():
            arrays[name][:, : tensor.shape[1]] = tensor
        self.reset()
        if self.memory["mode"] == "input":
            self.inputs = arrays
        elif how == "load_block":
            given = {f"new_{name}": array for name, array in arrays.items()}
            self.program.run(self.anchor["load_block"], given, self.state)
        else:
            self.state.update({name: self._filled(name, array) for name, array in arrays.items()})

    def _filled(self, name: str, array: np.ndarray) -> np.ndarray:
        """As the state has it, whose axes may be longer."""
        whole = np.zeros(self.anchor["states"][name]["shape"], array.dtype)
        whole[tuple(map(slice, array.shape))] = array
        return whole

    def reset(self) -> None:
        """Begins a new text. What the caches hold need not be cleared: it is not seen."""
        self.position = 0

    def feed(self, ids: np.ndarray, only: str = "") -> np.ndarray:
        """Token ids [T] that follow those so far -> logits [T, V] in float32.

        The longest calls that fit the context are taken, the last filled up; or those of the function `only`.
        """
        rows, ids = [], np.asarray(ids, np.int32)
        context, vocabulary = self.anchor["context"], self.anchor["vocabulary"]
        calls = [call for call in self.calls if only in ("", call[0])]
        while len(ids):
            fits = [call for call in calls if self.position + call[1] <= context]
            if not fits:
                raise CoreMLError(f"the text is longer than the context of {context} tokens")
            # A single token is a call of its own; more are worth a long call, even one that is not full.
            name, tokens = fits[-1] if len(ids) == 1 else fits[0]
            count = min(tokens, len(ids))
            padded = np.zeros((1, tokens), np.int32)
            padded[0, :count] = ids[:count]
            given = {"input_ids": padded, "position": np.array([self.position], np.int32)}
            out = self.program.run(name, given | self.inputs, self.state, fp16=self.fp16, peaks=self.peaks)
            logits = np.concatenate([out[part] for part in self.anchor["logits"]], axis=-1)
            rows.append(logits[0, :count, :vocabulary].astype(np.float32))
            self.position, ids = self.position + count, ids[count:]
        return np.concatenate(rows)

    def generate(self, ids: np.ndarray, tokens: int, stop: tuple[int, ...] = ()) -> list[int]:
        """The greedy continuation of a new text."""
        self.reset()
        logits, found = self.feed(ids)[-1], list[int]()
        while len(found) < tokens:
            found.append(int(logits.argmax()))
            if found[-1] in stop or len(found) == tokens:
                break
            logits = self.feed(np.array(found[-1:]))[-1]
        return found
