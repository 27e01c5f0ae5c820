"""`hiermem export coreml`: the exporter (`export/exporter.py`) with Core ML's packages."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_hiermem.convert.coreml import compress, mil
from mlx_hiermem.convert.coreml.anchor import build
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.retriever import export_retriever
from mlx_hiermem.convert.export import package
from mlx_hiermem.convert.export.architecture import Architecture, Linear
from mlx_hiermem.convert.export.exported import Runner
from mlx_hiermem.convert.export.exporter import Options as Options
from mlx_hiermem.convert.export.exporter import Report, Target, export_for
from mlx_hiermem.convert.export.limits import Measured, Overflow, SavedAnchor, Trial
from mlx_hiermem.convert.export.mixed_precision import Codec
from mlx_hiermem.convert.export.shape import STEP, Export, matrices
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.progress import Progress


class CoreML(Target):
    format = package.FORMAT
    anchor, retriever = package.ANCHOR, package.RETRIEVER
    codec = Codec(compress.rounded, compress.size)
    step = STEP

    def matrices(self, sizes: Architecture) -> list[Linear]:
        return matrices(sizes)

    def save(self, sizes: Architecture, shape: Export, formats: Mapping[str, str], package: pathlib.Path) -> None:
        mil.save(build(sizes, shape, formats), package)

    def describe(self, sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> dict[str, Any]:
        return package.describe_anchor(sizes, shape, formats)

    def measure(self, saved: SavedAnchor, trial: Trial) -> Measured:
        peaks: dict[str, float] = {}
        distance = trial.run(Runner(Program.load(saved.package), saved.anchor, saved.memory, peaks))
        return Measured(distance, Overflow.of(peaks))

    def save_retriever(self, embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
        return export_retriever(embedder, package, tokenizer)

    def warnings(self, sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> Sequence[str]:
        """Of what is reported of devices, and has not been seen here."""
        if "lut4" not in formats.values():
            return ()
        return [
            "stateful models with lut4 weights are reported to crash after 100 to 200 calls (coremltools #2716)"
        ]


def export(
    model: pathlib.Path,
    out: pathlib.Path,
    options: Options | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """`exporter.export_for` Core ML."""
    return export_for(CoreML(), model, out, options, progress, say)
