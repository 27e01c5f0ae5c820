"""`hiermem export coreai`: the exporter (`export/exporter.py`) with Core AI's assets."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_hiermem.convert.coreai import asset, compress
from mlx_hiermem.convert.coreai.anchor import HEAD, Anchor, product
from mlx_hiermem.convert.coreai.interpreter import Runtime
from mlx_hiermem.convert.export import package as folder
from mlx_hiermem.convert.export.architecture import Architecture, Linear
from mlx_hiermem.convert.export.exported import COREAI, Runner
from mlx_hiermem.convert.export.exporter import Options, Report, Target, export_for
from mlx_hiermem.convert.export.limits import WITH_MEMORY, Measured, Memories, Overflow, SavedAnchor, Trial
from mlx_hiermem.convert.export.mixed_precision import Codec
from mlx_hiermem.convert.export.shape import CACHES, Export, lengths_of
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.progress import Progress

LOGITS = "logits"
LONG = 2048  # from there on an iPhone is reported to write nonsense (apple/coreai-models #124)
EPSILON = 1e-12  # BERT's
NAMES = ("input_ids", "attention_mask")


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


# The sentence embedder


def function_of(length: int) -> str:
    return f"embed_{length}"


def export_retriever(embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
    """Writes the asset, and the tokenizer with the embedder's truncation; returns what the manifest says."""
    lengths = lengths_of(embedder)
    encoder = Encoder(embedder).eval()
    calls = {length: {name: torch.ones(1, length, dtype=torch.int32) for name in NAMES} for length in lengths}
    asset.save(
        {function_of(length): asset.Function(encoder, call, ["embedding"]) for length, call in calls.items()},
        package,
    )
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    embedder.tokenizer.save(str(tokenizer))
    return {
        "inputs": {name: {"shape": [1, -1], "dtype": "int32"} for name in NAMES},
        "outputs": {"embedding": {"shape": [1, embedder.dim], "dtype": "float32"}},
        "functions": {function_of(length): length for length in lengths},
        "lengths": list(lengths),
        "dim": embedder.dim,
    }


class Encoder(nn.Module):
    """BERT with mean pooling."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.layers, self.heads = (embedder.config[key] for key in ("num_hidden_layers", "num_attention_heads"))
        tensors = {name: np.array(value, np.float32) for name, value in embedder.weights.items()}
        self.products = nn.ModuleDict()
        for index in range(self.layers):
            layer = f"encoder.layer.{index}"
            for part in (
                *(f"attention.self.{one}" for one in ("query", "key", "value")),
                *("attention.output.dense", "intermediate.dense", "output.dense"),
            ):
                name = f"{layer}.{part}"
                of = Linear(name, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
                self.products[of.name] = product(of, torch.float16)
        place = tensors["embeddings.position_embeddings.weight"]
        self.register_buffer("word", torch.from_numpy(tensors["embeddings.word_embeddings.weight"]).half())
        place = place + tensors["embeddings.token_type_embeddings.weight"][0]
        self.register_buffer("place", torch.from_numpy(place))
        for name, value in tensors.items():
            if ".LayerNorm." in name:
                self.register_buffer(name.replace(".", "_"), torch.from_numpy(value))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[1, T] ids and mask -> [1, dim]."""
        mask = attention_mask[0].float()
        x = F.embedding(input_ids[0], self.get_buffer("word")).float()
        x = self._norm(x + self.get_buffer("place")[: x.shape[0]], "embeddings")
        hidden = (1 - mask)[None] * -1e9
        for index in range(self.layers):
            layer = f"encoder.layer.{index}"
            x = self._norm(x + self._attend(x, hidden, f"{layer}.attention"), f"{layer}.attention.output")
            inner = F.gelu(self._product(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._product(inner, f"{layer}.output.dense"), f"{layer}.output")
        pooled = (mask / mask.sum()) @ x
        return (pooled / pooled.norm())[None]

    def _attend(self, x: Tensor, hidden: Tensor, name: str) -> Tensor:
        q, k, v = (
            self._product(x, f"{name}.self.{part}").view(x.shape[0], self.heads, -1).transpose(0, 1)[None]
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
        return self._product(mixed[0].transpose(0, 1).reshape(x.shape[0], -1), f"{name}.output.dense")

    def _product(self, x: Tensor, name: str) -> Tensor:
        """[T, in] -> [T, out]."""
        columns = x.half().T[None, :, None]
        out: Tensor = self.products[name.replace(".", "_")](columns)[0, :, 0].T.float()
        return out

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gain, bias = (self.get_buffer(f"{name}.LayerNorm.{part}".replace(".", "_")) for part in ("weight", "bias"))
        return F.layer_norm(x, (x.shape[-1],), gain, bias, EPSILON)
