"""`hiermem export coreml`: `exporter.py` with Core ML's packages."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mlx_hiermem.convert.coreml import compress, mil, package
from mlx_hiermem.convert.coreml.anchor import build
from mlx_hiermem.convert.coreml.architecture import Architecture, Linear
from mlx_hiermem.convert.coreml.exporter import Options as Options
from mlx_hiermem.convert.coreml.exporter import Report, Target, export_for
from mlx_hiermem.convert.coreml.limits import Measured, Memories, measure_package
from mlx_hiermem.convert.coreml.measure import Float32Anchor
from mlx_hiermem.convert.coreml.mixed_precision import Codec
from mlx_hiermem.convert.coreml.retriever import export_retriever
from mlx_hiermem.convert.coreml.shape import Export, matrices
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.progress import Progress


class CoreML(Target):
    format = package.FORMAT
    anchor, retriever = package.ANCHOR, package.RETRIEVER
    codec = Codec(compress.rounded, compress.size)

    def matrices(self, sizes: Architecture) -> list[Linear]:
        return matrices(sizes)

    def save(self, sizes: Architecture, shape: Export, formats: Mapping[str, str], package: pathlib.Path) -> None:
        mil.save(build(sizes, shape, formats), package)

    def describe(self, sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> dict[str, Any]:
        return package.describe_anchor(sizes, shape, formats)

    def measure(
        self,
        package: pathlib.Path,
        anchor: Mapping[str, Any],
        memory: Mapping[str, Any] | None,
        reference: Float32Anchor,
        memories: Memories,
        did: Callable[[], None],
    ) -> Measured:
        return measure_package(package, anchor, memory, reference, memories, did)

    def save_retriever(self, embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
        return export_retriever(embedder, package, tokenizer)


def export(
    model: pathlib.Path,
    out: pathlib.Path,
    options: Options | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """`exporter.export_for` Core ML."""
    return export_for(CoreML(), model, out, options, progress, say)
