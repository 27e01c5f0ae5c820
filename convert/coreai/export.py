"""`hiermem export coreai`: the exporter (`export/exporter.py`) with Core AI's assets."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_hiermem.convert.coreai import asset, compress
from mlx_hiermem.convert.coreai.anchor import HEAD, Anchor
from mlx_hiermem.convert.coreai.interpreter import Runtime
from mlx_hiermem.convert.coreai.retriever import export_retriever
from mlx_hiermem.convert.export import package as folder
from mlx_hiermem.convert.export.architecture import Architecture, Linear
from mlx_hiermem.convert.export.exported import COREAI, Runner
from mlx_hiermem.convert.export.exporter import Options, Report, Target, export_for
from mlx_hiermem.convert.export.limits import WITH_MEMORY, Measured, Memories, Overflow, SavedAnchor, Trial
from mlx_hiermem.convert.export.mixed_precision import Codec
from mlx_hiermem.convert.export.shape import CACHES, Export
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.progress import Progress

LOGITS = "logits"
LONG = 2048  # from there on an iPhone is reported to write nonsense (apple/coreai-models #124)


class CoreAI(Target):
    format = COREAI
    anchor, retriever = "anchor.aimodel", "retriever.aimodel"
    codec = Codec(compress.rounded, compress.size)

    def matrices(self, sizes: Architecture) -> list[Linear]:
        """But for a table that is both head and embeddings: of packed rows a call would unpack all to read one."""
        found = [replace(sizes.head, part=0)] if sizes.head else []
        for layer in sizes.layers:
            found += [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
        return found

    def save(self, sizes: Architecture, shape: Export, formats: Mapping[str, str], package: pathlib.Path) -> None:
        anchor = Anchor(sizes, shape).eval()
        calls = {name: anchor.arguments(tokens) for name, tokens in shape.functions.items()}
        one = next(iter(calls.values()))
        heads = {of.name: HEAD for of in self.matrices(sizes) if of.part is not None}
        places = {f"products.{heads.get(name, name)}": form for name, form in formats.items()}
        module = compress.compress(anchor, places, tuple(one.values()))
        asset.save({name: asset.Function(module, call, [LOGITS], CACHES) for name, call in calls.items()}, package)

    def describe(self, sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> dict[str, Any]:
        described = folder.describe_anchor(sizes, shape, formats)
        counts = Counter(formats.values())
        if not sizes.head:
            counts["fp16"] += 1
        logits = {"shape": [1, -1, len((sizes.head or sizes.embeddings).weight)], "dtype": "float16"}
        return described | {
            "package": self.anchor,
            "outputs": {LOGITS: logits},
            "logits": [LOGITS],
            "compression": dict(sorted(counts.items())),
        }

    def measure(self, saved: SavedAnchor, trial: Trial) -> Measured:
        """What float16 has to hold is seen in PyTorch, as the runtime does not tell."""
        program = Runtime(saved.package)
        try:
            distance = trial.run(Runner(program, saved.anchor, saved.memory))
        finally:
            program.close()
        units = saved.memory or {"layers": (), "units": 0}
        shape = Export(saved.anchor["context"], tuple(units["layers"]), units["units"], "input")
        module = Anchor(trial.reference.sizes, shape, torch.float32).eval()
        return Measured(distance, Overflow.of(peaks(module, trial.reference.ids, trial.memories)))

    def save_retriever(self, embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
        return export_retriever(embedder, package, tokenizer)

    def warnings(self, sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> Sequence[str]:
        if shape.context < LONG:
            return ()
        return [
            f"a context of {LONG} or more is reported to come out corrupt on iPhones (apple/coreai-models #124)"
        ]


def export(
    model: pathlib.Path,
    out: pathlib.Path,
    options: Options | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """`exporter.export_for` Core AI; a memory is always an input."""
    return export_for(CoreAI(), model, out, replace(options or Options(), memory="input"), progress, say)


def peaks(anchor: Anchor, texts: Sequence[np.ndarray], memories: Memories) -> dict[str, float]:
    """The largest |x| by tensor, over all texts without memory and a few with each, computed in float32.

    float16 are the products' inputs and outputs, and with them what the caches keep; all else is float32.
    """
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def see(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            for what, value in (("in", given[0]), ("out", out)):
                found[f"{name}_{what}"] = max(found.get(f"{name}_{what}", 0.0), float(value.abs().max()))

        return see

    handles = [module.register_forward_hook(watch(name)) for name, module in anchor.products.items()]
    try:
        for ids in texts:
            _run(anchor, ids, {})
        for memory in memories.values():
            for ids in texts[:WITH_MEMORY]:
                _run(anchor, ids, memory)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run(anchor: Anchor, ids: np.ndarray, memory: Mapping[str, np.ndarray]) -> None:
    given = anchor.arguments(len(ids)) | {"input_ids": torch.from_numpy(ids.astype(np.int32))[None]}
    for name, tensor in memory.items():
        given[name][:, : tensor.shape[1]] = torch.from_numpy(tensor)
    with torch.no_grad():
        anchor(*(given[name] for name in given if name not in CACHES), *(given[name] for name in CACHES))
