"""MIL operations in numpy, by family; importing this fills the table `OPS`."""

from mlx_hiermem.convert.coreml.ops import compressed, elementwise, indexing, layout, reductions
from mlx_hiermem.convert.coreml.ops.registry import OPS

__all__ = ["OPS", "compressed", "elementwise", "indexing", "layout", "products", "reductions"]
