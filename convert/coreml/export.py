"""`hiermem export coreml`: the exporter (`export/exporter.py`) with Core ML's packages."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml import compress, mil
from mlx_hiermem.convert.coreml.anchor import build
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.mil import Var, Weights, ct, function, get_new_symbol, half, mb, save, types
from mlx_hiermem.convert.export import package
from mlx_hiermem.convert.export.architecture import Architecture, Linear
from mlx_hiermem.convert.export.exported import Runner
from mlx_hiermem.convert.export.exporter import Options as Options
from mlx_hiermem.convert.export.exporter import Report, Target, export_for
from mlx_hiermem.convert.export.limits import Measured, Overflow, SavedAnchor, Trial
from mlx_hiermem.convert.export.mixed_precision import Codec
from mlx_hiermem.convert.export.shape import STEP, Export, lengths_of, matrices
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.progress import Progress

MASKED = -30_000.0  # added to the score of a masked token; float16 reaches to 65 504
EPSILON = 1e-7  # BERT's 1e-12 would be 0 in float16


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


# The sentence embedder


def export_retriever(embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
    """Writes the package, and the tokenizer with the embedder's truncation; returns what the manifest says."""
    lengths = lengths_of(embedder)
    tokens = get_new_symbol()
    graph = _Encoder(embedder)
    names = ("input_ids", "attention_mask")
    main = function(
        {name: mb.placeholder((1, tokens), types.int32) for name in names}, lambda inputs: [graph.embed(**inputs)]
    )
    shapes = ct.EnumeratedShapes([(1, length) for length in lengths], default=(1, lengths[0]))
    main.set_input_types(tuple(ct.TensorType(name=name, shape=shapes, dtype=types.int32) for name in names))
    save({"main": main}, package)
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    embedder.tokenizer.save(str(tokenizer))
    return {
        "inputs": {name: {"shape": [1, -1], "dtype": "int32"} for name in names},
        "outputs": {"embedding": {"shape": [1, embedder.dim], "dtype": "float16"}},
        "lengths": list(lengths),
        "dim": embedder.dim,
    }


class _Encoder:
    """`Embedder._encode` and its pooling, operation by operation."""

    def __init__(self, embedder: Embedder) -> None:
        self.tensors = {name: np.array(value) for name, value in embedder.weights.items()}
        self.layers, self.heads = (embedder.config[key] for key in ("num_hidden_layers", "num_attention_heads"))
        self.weights = Weights()

    def embed(self, input_ids: Var, attention_mask: Var) -> Var:
        """[1, T] ids and mask -> [1, dim]."""
        mask = mb.cast(x=attention_mask, dtype="fp16")
        x = self.embeddings(input_ids, attention_mask)
        hidden = mb.mul(x=mb.sub(x=half(1), y=mb.expand_dims(x=mask, axes=[1, 2])), y=half(MASKED))
        for index in range(self.layers):
            layer = f"encoder.layer.{index}"
            mixed = self.attention(x, hidden, f"{layer}.attention")
            x = self.norm(mb.add(x=x, y=mixed), f"{layer}.attention.output")
            inner = mb.gelu(x=self.linear(x, f"{layer}.intermediate.dense"), mode="EXACT")
            x = self.norm(mb.add(x=x, y=self.linear(inner, f"{layer}.output.dense")), f"{layer}.output")
        share = mb.real_div(x=mask, y=mb.reduce_sum(x=mask, axes=[1], keep_dims=True))
        pooled = mb.squeeze(x=mb.matmul(x=mb.expand_dims(x=share, axes=[1]), y=x), axes=[1])
        return mb.real_div(x=pooled, y=mb.reduce_l2_norm(x=pooled, axes=[1], keep_dims=True), name="embedding")

    def embeddings(self, input_ids: Var, attention_mask: Var) -> Var:
        """Positions count the real tokens, so that no shape enters the graph; a masked token has some position."""
        counted = mb.sub(x=mb.cumsum(x=attention_mask, axis=1), y=np.int32(1))
        word = self.constant("embeddings.word_embeddings.weight")
        place = self.tensors["embeddings.position_embeddings.weight"]
        place = place + self.tensors["embeddings.token_type_embeddings.weight"][0]
        rows = mb.gather(x=self.weights.constant("positions", place), indices=mb.maximum(x=counted, y=np.int32(0)))
        return self.norm(mb.add(x=mb.gather(x=word, indices=input_ids), y=rows), "embeddings")

    def attention(self, x: Var, hidden: Var, name: str) -> Var:
        width = x.shape[-1]
        head = width // self.heads
        q, k, v = (
            mb.transpose(
                x=mb.reshape(x=self.linear(x, f"{name}.self.{part}"), shape=[1, -1, self.heads, head]),
                perm=[0, 2, 1, 3],
            )
            for part in ("query", "key", "value")
        )
        mixed = mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=hidden)
        joined = mb.reshape(x=mb.transpose(x=mixed, perm=[0, 2, 1, 3]), shape=[1, -1, width])
        return self.linear(joined, f"{name}.output.dense")

    def linear(self, x: Var, name: str) -> Var:
        return mb.linear(x=x, weight=self.constant(f"{name}.weight"), bias=self.constant(f"{name}.bias"))

    def norm(self, x: Var, name: str) -> Var:
        gamma, beta = (self.constant(f"{name}.LayerNorm.{part}") for part in ("weight", "bias"))
        return mb.layer_norm(x=x, axes=[-1], gamma=gamma, beta=beta, epsilon=half(EPSILON))

    def constant(self, name: str) -> Var:
        return self.weights.constant(name.replace(".", "_"), self.tensors[name])
