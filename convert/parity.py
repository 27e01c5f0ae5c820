"""PyTorch against MLX, layer by layer, on fixed prompts, with and without memory.

The PyTorch side shares no code with the converters: transformers reads Hugging Face folders and GGUF files, the
plain reference model OpenLM checkpoints, and memory rows come straight from their checkpoint. Both sides compute
in float32 on the CPU, so that what differs is the conversion and not the hardware.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx_lm.utils import dequantize_model

from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import GENERIC_LEVEL, MemoryConfig, Path, Quantization
from mlx_hiermem.convert import reference_memory
from mlx_hiermem.convert.anchors import adapters
from mlx_hiermem.convert.anchors.gguf import GGUF, ROPE_FACTORS
from mlx_hiermem.convert.anchors.huggingface import one_line
from mlx_hiermem.convert.checkpoint import TensorSource, open_checkpoint
from mlx_hiermem.convert.dcp_reader import METADATA
from mlx_hiermem.convert.memory_layout import MemoryLayout
from mlx_hiermem.convert.readers import plain_name
from mlx_hiermem.convert.reference import load_openlm, merge_adapter, to_torch
from mlx_hiermem.convert.source import Source
from mlx_hiermem.errors import CheckpointError
from mlx_hiermem.memory.attach import Attachment, attach
from mlx_hiermem.tokenizer import NO_CODE

SHORT, LONG = 24, 640  # tokens; the long prompt goes beyond Gemma's sliding window of 512
DECODED = 8  # tokens at the end of a prompt that the cached run takes one by one


@dataclass(frozen=True)
class Figures:
    """Relative differences max|ours - theirs| / max|theirs| of one prompt of so many tokens, under one memory.

    `memory` is `none`, `generic` or a path; `layers` are of the hidden states that leave each layer, `cached`
    of MLX with a KV cache against without. `effect` is how much the memory changes PyTorch's logits: were it
    0, the other figures would show nothing.
    """

    memory: str
    tokens: int
    layers: tuple[float, ...]
    logits: float
    cached: float
    effect: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prompt(length: int, vocabulary: int) -> np.ndarray:
    """[1, length] token ids, the same for ever: steps of a prime through the vocabulary."""
    return (np.arange(length, dtype=np.int64)[None] * 7919 + length) % vocabulary


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|ours - theirs| / max|theirs|; infinite where ours is not finite or has another shape."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))


MemoryReader = Callable[[str], dict[str, torch.Tensor]]


class TorchSide:
    """The source in PyTorch; `read` gives the tensors [L, R, width] of a memory by its name."""

    def __init__(self, model: Any, config: MemoryConfig | None = None, read: MemoryReader | None = None) -> None:
        self.model, self.read = model, read
        self.layers = reference_memory.layers_of(model)
        self.attachment = reference_memory.attach(model, config) if config else None
        self.vocabulary = getattr(model.config, "text_config", model.config).vocab_size

    def round(self, dtype: str, quantization: Mapping[str, Any] | None) -> None:
        """Rounds the parameters as the anchor's were: to its dtype, matrices to MLX's integers too.

        The arithmetic stays float32, so that afterwards nothing but the order of sums may differ.
        """
        for parameter in self.model.parameters():
            values = mx.array(parameter.detach().numpy()).astype(getattr(mx, dtype))
            if quantization and parameter.ndim == 2:
                group, bits = quantization["group_size"], quantization["bits"]
                integers, scales, biases = mx.quantize(values, group, bits)
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
                values = mx.dequantize(integers, scales, biases, group, bits)
            parameter.data = torch.from_numpy(np.array(values.astype(mx.float32)))

    def run(self, ids: np.ndarray, memory: str) -> tuple[list[np.ndarray], np.ndarray]:
        """(hidden states leaving each layer, logits) of token ids [1, T]."""
        if self.attachment and self.read:
            self.attachment.clear()
            if memory != "none":
                self.attachment.set(self.read(memory))
        seen: list[np.ndarray] = []

        def keep(_: Any, __: Any, out: Any) -> None:
            seen.append((out[0] if isinstance(out, tuple) else out).numpy())

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        with torch.no_grad():
            out = self.model(torch.from_numpy(ids))
        for handle in handles:
            handle.remove()
        return seen, (out if isinstance(out, torch.Tensor) else out.logits).numpy()


class MLXSide:
    """The converted model, read the way the runtime reads it."""

    def __init__(self, model: nn.Module, cache: BlockCache | None) -> None:
        # Quantised weights as the numbers they stand for: MLX's quantised products are a hundred times slower here.
        self.model, self.cache = dequantize_model(model), cache
        self.attachment: Attachment | None = attach(model, cache.bank.config) if cache else None

    def run(self, ids: np.ndarray, memory: str) -> tuple[list[np.ndarray], np.ndarray]:
        """(hidden states leaving each layer, logits) of token ids [1, T]."""
        self._select(memory)
        with recorded(self.model.layers) as seen:
            logits = np.array(self.model(mx.array(ids)))
            return [np.array(hidden) for hidden in seen], logits

    def run_cached(self, ids: np.ndarray, memory: str) -> np.ndarray:
        """The last logits [1, DECODED, V] by prefilling a KV cache and going on token by token."""
        from mlx_lm.models.cache import make_prompt_cache

        self._select(memory)
        cache, tokens = make_prompt_cache(self.model), mx.array(ids)
        start = tokens.shape[1] - DECODED
        self.model(tokens[:, :start], cache=cache)
        steps = [self.model(tokens[:, i : i + 1], cache=cache) for i in range(start, tokens.shape[1])]
        return np.array(mx.concatenate(steps, axis=1))

    def _select(self, memory: str) -> None:
        if self.attachment is None or self.cache is None:
            return
        if memory == "none":
            return self.attachment.clear()
        fetched = self.cache.fetch_generic() if memory == "generic" else self.cache.fetch(Path.parse(memory))
        self.attachment.set(fetched.memory)


@contextlib.contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[mx.array]]:
    """Keeps what the layers put out; inside, each is of a subclass of its own class that does so."""
    seen: list[mx.array] = []
    classes = [type(layer) for layer in layers]

    def recording(own: type) -> type:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
            out = own.__call__(self, *args, **kwargs)
            seen.append(out[0] if isinstance(out, tuple) else out)
            return out

        return type(own.__name__, (own,), {"__call__": call})

    for layer, own in zip(layers, classes, strict=True):
        layer.__class__ = recording(own)
    try:
        yield seen
    finally:
        for layer, own in zip(layers, classes, strict=True):
            layer.__class__ = own


def compare(theirs: TorchSide, ours: MLXSide, memory: str, tokens: int) -> Figures:
    """Runs one prompt under one memory on both sides."""
    ids = prompt(tokens, theirs.vocabulary)
    hidden, logits = theirs.run(ids, memory)
    plain = logits if memory == "none" else theirs.run(ids, "none")[1]
    our_hidden, our_logits = ours.run(ids, memory)
    layers = tuple(difference(a, b) for a, b in zip(our_hidden, hidden, strict=True))
    cached = difference(ours.run_cached(ids, memory), our_logits[:, -DECODED:])
    return Figures(memory, tokens, layers, difference(our_logits, logits), cached, difference(plain, logits))


def memory_reader(source: TensorSource, layout: MemoryLayout, bank: MemoryConfig) -> MemoryReader:
    """Reads a path's blocks, or `generic`, from the memory checkpoint and joins them in PyTorch.

    Where the bank is quantised, values are rounded as its are.
    """
    config = layout.config

    def block(level: int, row: int) -> dict[str, torch.Tensor]:
        tensors = {}
        for part, stored in layout.tensors[level].items():
            raw = source.rows(stored.name, row, row + 1) if level else source.read(stored.name)
            tensor = to_torch(raw).float()
            tensor = tensor[0] if level else tensor
            tensors[part] = tensor.mT if stored.swapped else tensor
        if how := bank.quantized(level):
            tensors = {part: rounded(tensor, bank.dtype, how) for part, tensor in tensors.items()}
        return tensors

    def read(memory: str) -> dict[str, torch.Tensor]:
        if memory == "generic":
            return reference_memory.join(config, [block(GENERIC_LEVEL, 0)])
        row, blocks = 0, []
        for level, child in enumerate(map(int, memory.split(".")), 1):
            row = row * config.branching + child
            if level in layout.tensors:
                blocks.append(block(level, row))
        return reference_memory.join(config, blocks)

    return read


def rounded(tensor: torch.Tensor, dtype: str, how: Quantization) -> torch.Tensor:
    """What a quantised bank gives back of these values."""
    values = mx.array(tensor.numpy()).astype(getattr(mx, dtype))
    integers, scales, biases = mx.quantize(values, how.group_size, how.bits)
    values = mx.dequantize(integers, scales, biases, how.group_size, how.bits)
    return torch.from_numpy(np.array(values.astype(mx.float32)))


def load_source(source: Source, config: pathlib.Path | None = None) -> Any:
    """The source's model in PyTorch, in float32."""
    if source.kind == "openlm":
        return load_openlm(source.path, config).float()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            model = _from_gguf(source.path) if source.kind == "gguf" else _from_folder(source.path)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"transformers cannot load {source.path}: {one_line(error)}") from error
    if model.config.model_type in ("gemma3_text", "gemma3"):
        # Gemma's embeddings are scaled by sqrt(hidden) as bfloat16 has it, in which it was trained; transformers
        # rounds it to the dtype at hand, float32 here.
        embeddings = model.get_input_embeddings()
        embeddings.embed_scale = embeddings.embed_scale.bfloat16().float()
    return model.eval()


def _from_folder(folder: pathlib.Path) -> Any:
    """transformers' own reading; of a distributed checkpoint its class, filled by PyTorch's reader."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
    known = AutoModelForCausalLM._model_mapping  # a model that also sees is one of the other kind, or of both
    kind = AutoModelForCausalLM if type(config) in known else AutoModelForImageTextToText
    how = {"dtype": torch.float32, "attn_implementation": "eager", **NO_CODE}
    with open_checkpoint(folder) as weights:
        if weights.files[0].name == METADATA:
            model = kind.from_config(config, **how)
            tensors = {plain_name(name): to_torch(weights.read(name)).float() for name in weights.names()}
            _fill(model, tensors, folder)
            return model
    with tempfile.TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            if file.name != adapters.CONFIG:  # PEFT, if it is installed, would load the adapter
                (pathlib.Path(temporary) / file.name).symlink_to(file.resolve())
        model = kind.from_pretrained(temporary, local_files_only=True, **how)
    return merge_adapter(model, folder)


def _fill(model: Any, tensors: dict[str, torch.Tensor], where: pathlib.Path) -> None:
    """Gives a model all its tensors; CheckpointError where some are missing or left over."""
    left = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    if left.unexpected_keys or set(left.missing_keys) - tied:
        raise CheckpointError(f"transformers does not read all of {where}: {left.missing_keys[:4]}")
    model.tie_weights()


def _from_gguf(file: pathlib.Path) -> Any:
    """transformers' own reading of GGUF, and llama.cpp's frequency factors, which it leaves out."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    # It is asked for its names only, but of every submodule again, which takes minutes for a large model.
    names = SimpleNamespace(config=config, state_dict=model.state_dict, named_children=tuple)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=names)["tensors"]
    _fill(model, tensors, file)
    source = GGUF(file)
    if ROPE_FACTORS in source.tensors:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(np.array(source.dequantised(ROPE_FACTORS)))
    return model
