"""Every reader of files that others have made: how to make it a good file, and how to have it read.

`make` writes into an empty folder, with all that belongs to the file beside it, and returns the file that is made
hostile. `read` reads that file as the program does. It may raise a HierMemError and nothing else.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tiny import CONFIG, HashEmbedder, give_sources, make_anchor, make_model
from torture.texts import (
    HTML,
    JSON_LINES,
    KEYS,
    LEFT_OUT,
    MARKDOWN,
    NAMES,
    POLICY,
    PROMPTS,
    QUESTION,
    REMOTE,
    SETTINGS,
    TASKS,
    lines,
)

from mlx_hiermem.anchor import identify, load_anchor, read_config
from mlx_hiermem.bank import commit
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import read_block
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.bank.quantize import design, quantize
from mlx_hiermem.bank.receipt import Receipt
from mlx_hiermem.bank.remote import Origin
from mlx_hiermem.bank.sources import BankSources
from mlx_hiermem.config import Path
from mlx_hiermem.evaluate.examples import read_documents
from mlx_hiermem.evaluate.questions import read_questions
from mlx_hiermem.evaluate.results import read_runs
from mlx_hiermem.evaluate.tasks import read_tasks
from mlx_hiermem.files import read_json
from mlx_hiermem.learn.corpus import readers as corpus
from mlx_hiermem.learn.settings import read_settings
from mlx_hiermem.learn.study.prompts import read_prompts
from mlx_hiermem.tokenizer import encode_chat, encode_text, load_tokenizer
from mlx_hiermem.tree import ClusterTree

Make = Callable[[pathlib.Path], pathlib.Path]
Read = Callable[[pathlib.Path], object]


@dataclass(frozen=True)
class Reader:
    name: str
    kind: str  # see `mutate.mutated`
    make: Make
    read: Read
    speed: int = 5000  # inputs a second, roughly: a campaign takes as long with each reader


@functools.cache
def _model() -> pathlib.Path:
    """A whole model with sources, made once in each process."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="torture-")) / "model"
    make_model(folder)
    texts = {
        "0.1": [("gold", "A metal.")],
        "1.0": [("neon", "A gas."), ("argon", "Another.")],
        "2.2": [("iron", "Rust.")],
    }
    give_sources(folder / "bank", texts, HashEmbedder().embed)
    return folder


def _of_model(name: str) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(_model(), folder / "model")) / name

    return make


def _of_text(name: str, text: str | bytes) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return make


def _manifest(file: pathlib.Path) -> object:
    manifest = BankManifest.read(file)
    manifest.label(Path((0, 1)))
    return manifest.has_block(Path((2, 2))), list(manifest.blocks.items()), manifest.totals()


def _tree(file: pathlib.Path) -> object:
    tree = ClusterTree.load(file)
    vector = np.ones(tree.dim, np.float32)
    return tree.route(vector), [tree.nodes(level) for level in range(1, tree.depth + 1)]


def _block(level: int) -> Read:
    def read(file: pathlib.Path) -> object:
        read_block(file, CONFIG, level)
        return read_block(file, CONFIG, level, lambda data: None)

    return read


def _quantized(folder: pathlib.Path) -> pathlib.Path:
    """A bank whose blocks are of four bits."""
    bank = MemoryBank.open(_model() / "bank")
    quantize(bank, folder / "bank", design(bank.config, [4]))
    return folder / "bank/blocks/1/0.safetensors"


def _quantized_block(file: pathlib.Path) -> object:
    return read_block(file, design(CONFIG, [4]), 2, lambda data: None)


def _bank(file: pathlib.Path) -> object:
    """A bank whose manifest lies: everything that a chat asks of it."""
    bank = MemoryBank.open(file.parent)
    route = bank.tree.route(np.ones(bank.tree.dim, np.float32), bank.policy.blocked)[0]
    return [bank.read(node) for node in bank.nodes_on(route.path)], list(bank.problems())


def _sources(file: pathlib.Path) -> object:
    sources = BankSources(file.parent.parent)
    return [sources.read(leaf) for leaf in sources.leaves()], list(sources.all())


def _anchor(file: pathlib.Path) -> object:
    read_config(file.parent)
    identify(file.parent)
    return load_anchor(file.parent)


def _tokenizer(file: pathlib.Path) -> object:
    tokenizer = load_tokenizer(file.parent)
    if tokenizer is None:
        return None
    messages = [{"role": "user", "content": "What is gold? <eos>"}, {"role": "assistant", "content": "A metal."}]
    ids = encode_text(tokenizer, "What is gold?")
    if tokenizer.chat_template is not None:
        ids += encode_chat(tokenizer, messages)
    return ids


def _gone(file: pathlib.Path) -> object:
    return commit.finish(file.parent.parent)


def _gguf(folder: pathlib.Path) -> pathlib.Path:
    from sources import hf_model, make_gguf

    return make_gguf(folder / "m.gguf", hf_model("llama", num_hidden_layers=1))


def _read_gguf(file: pathlib.Path) -> object:
    from mlx_hiermem.convert.anchors.gguf import convert_gguf

    out = file.with_suffix(".out")
    shutil.rmtree(out, ignore_errors=True)
    return convert_gguf(file, out, warn=lambda line: None)


def _pickle(folder: pathlib.Path) -> pathlib.Path:
    import torch

    torch.save({"state_dict": {"a.weight": torch.ones(3, 4), "b": torch.zeros(2)}, "step": 7}, folder / "m.pt")
    return folder / "m.pt"


def _safetensors(folder: pathlib.Path) -> pathlib.Path:
    from safetensors.numpy import save_file

    tensors = {f"layers.{layer}.gate": np.ones((9, 4, 8), np.float32) for layer in range(2)}
    save_file(tensors, folder / "m.safetensors", {"config": json.dumps({"branching": 3, "layers": [0, 1]})})
    return folder / "m.safetensors"


def _settings(folder: pathlib.Path) -> pathlib.Path:
    _safetensors(folder)
    table = {"kind": "ffn", "branching": 3, "block_sizes": [4, 2], "layers": [1, 3], "labels": {"0.1": "gold"}}
    more = {
        "embedder": {"name": "all-MiniLM-L6-v2"},
        "documents": {"0": 3},
        "sources": {"0": ["a"]},
        "licence": "CC0",
    }
    (folder / "m.json").write_text(json.dumps(table | more))
    return folder / "m.json"


def _checkpoint(file: pathlib.Path) -> object:
    from mlx_hiermem.convert.checkpoint import open_checkpoint
    from mlx_hiermem.convert.memory_settings import read_settings as read_memory_settings

    given = next(one for one in sorted(file.parent.iterdir()) if one.suffix in (".pt", ".safetensors"))
    with open_checkpoint(given) as source:
        read_memory_settings(given, source)
        return [source.read(name).shape for name in source.names()]


def _key_map(file: pathlib.Path) -> object:
    from mlx_hiermem.convert.key_map import KeyMap

    found = KeyMap.read(file)
    names = ["memory.3.1.w1", "bank.0.up.weight", "other"]
    return found.documented(names), [found.transposed(name) for name in names]


def _exported(file: pathlib.Path) -> object:
    """What verifies a folder, and what says before how much memory it takes."""
    from mlx_hiermem.convert.export.exported import Exported
    from mlx_hiermem.plan import _exported as size_of_export

    found = size_of_export(file.parent)
    return found, Exported(file.parent).memories()


def _export(folder: pathlib.Path) -> pathlib.Path:
    """An exported folder without its packages and tokenizers. Swift reads the same manifest."""
    shutil.copytree(_model() / "bank", folder / "bank")
    state = {name: {"shape": [2, 1, 64, 8]} for name in ("k_cache", "v_cache")}
    anchor = {"package": "anchor.mlpackage", "functions": {"decode": 1, "prefill": 8}, "load_block": None}
    anchor |= {"context": 64, "vocabulary": 400, "inputs": {}, "outputs": {}, "states": state, "logits": ["logits"]}
    memory = {"mode": "input", "layers": [1, 3], "units": 6, "hidden": 32, "block_sizes": [4, 2]}
    retriever = {"package": "retriever.mlpackage", "tokenizer": "retriever/tokenizer.json", "inputs": {}}
    marks = {"start>user": "<|user|>", "user>reply": "<|reply|>", "user>assistant": "<|reply|>"}
    whole = {
        "format": "mlx-hiermem-coreml",
        "version": 1,
        "name": "tiny",
        "anchor": anchor | {"compression": None},
        "memory": memory,
        "retriever": retriever | {"outputs": {}, "lengths": [8, 16, 32], "dim": 16},
        "tokenizer": "tokenizer",
        "chat": {"marks": marks, "trim": False, "thoughts": ""},
        "eos": [2],
        "sampling": {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 24},
        "bank": {"folder": "bank", "remote": {"url": "https://example.org/bank/"}, "download": {}},
        "files": {"anchor.mlpackage/weight.bin": {"bytes": 1, "sha256": "0" * 64}},
    }
    (folder / "manifest.json").write_text(json.dumps(whole))
    return folder / "manifest.json"


@functools.cache
def _session() -> object:
    from mlx_hiermem.model_folder import load
    from mlx_hiermem.session import Session

    return Session(load(_model()), "none")


def _chat(file: pathlib.Path) -> object:
    session = _session()
    return session.restore(read_json(file))  # type: ignore[attr-defined]


def _chat_text() -> str:
    said = [{"role": "user", "content": "What is gold?"}, {"role": "assistant", "content": "A metal."}]
    head = {"format": "mlx-hiermem-chat", "version": 1, "memory": "none", "system": "Be kind."}
    return json.dumps(head | {"topic": {"path": "0.1", "decided": 0.5}, "messages": said})


def _corpus(file: pathlib.Path) -> object:
    return list(corpus.read([str(file.parent)]))


def _office(name: str) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        from test_readers import BOOK, WORD

        with zipfile.ZipFile(folder / name, "w") as archive:
            for part, content in (WORD if name.endswith("docx") else BOOK).items():
                archive.writestr(part, content)
        return folder / name

    return make


def _pdf(folder: pathlib.Path) -> pathlib.Path:
    from test_learn_corpus import pdf

    (folder / "a.pdf").write_bytes(pdf("Copper conducts heat."))
    return folder / "a.pdf"


def _runs(folder: pathlib.Path) -> pathlib.Path:
    head = {"format": "mlx-hiermem-eval", "version": 1, "memory": "none", "task": {"name": "a"}, "model": "m"}
    (folder / "a.jsonl").write_text(lines(head, {"id": "1", "right": True, "score": 0.5}))
    return folder / "a.jsonl"


def _anchor_folder(folder: pathlib.Path) -> pathlib.Path:
    return make_anchor(folder / "anchor")


READERS = (
    Reader("manifest", "json", _of_model("bank/bank.json"), _manifest, 1000),
    Reader("bank", "json", _of_model("bank/bank.json"), _bank, 800),
    Reader("tree", "header", _of_model("bank/tree.safetensors"), _tree, 2500),
    Reader("block", "header", _of_model("bank/blocks/1/0.safetensors"), _block(2), 2500),
    Reader("quantized", "header", _quantized, _quantized_block, 2500),
    Reader("generic", "header", _of_model("bank/generic.safetensors"), _block(0), 2500),
    Reader("sources-index", "header", _of_model("bank/sources/index.safetensors"), _sources, 2500),
    Reader("sources-texts", "lines", _of_model("bank/sources/windows.jsonl"), _sources, 2000),
    Reader("policy", "json", _of_text("policy.json", json.dumps(POLICY)), BankPolicy.read),
    Reader("remote", "json", _of_text("remote.json", json.dumps(REMOTE)), lambda file: Origin.read(file.parent)),
    Reader("receipt", "json", _of_text("without.json", LEFT_OUT), lambda file: Receipt.read(file.parent)),
    Reader("edit", "json", _of_text("bank/edit/gone.json", '["0.1", "2"]'), _gone),
    Reader("anchor-config", "json", lambda folder: _anchor_folder(folder) / "config.json", _anchor, 600),
    Reader("anchor-weights", "header", lambda folder: _anchor_folder(folder) / "model.safetensors", _anchor, 300),
    Reader("tokenizer", "json", lambda folder: _anchor_folder(folder) / "tokenizer.json", _tokenizer, 600),
    Reader("template", "json", lambda folder: _anchor_folder(folder) / "tokenizer_config.json", _tokenizer, 300),
    Reader("gguf", "bytes", _gguf, _read_gguf, 80),
    Reader("pickle", "zip", _pickle, _checkpoint, 40),
    Reader("checkpoint", "header", _safetensors, _checkpoint, 2500),
    Reader("memory-settings", "json", _settings, _checkpoint, 2500),
    Reader("key-map", "bytes", _of_text("keys.toml", KEYS), _key_map),
    Reader("questions", "lines", _of_text("q.jsonl", lines(QUESTION, QUESTION)), read_questions),
    Reader("prompts", "lines", _of_text("p.jsonl", lines(*PROMPTS)), read_prompts),
    Reader("documents", "lines", _of_text("d.jsonl", lines({"text": "Gold."}, {"text": "Neon."})), read_documents),
    Reader("tasks", "bytes", _of_text("tasks.toml", TASKS), read_tasks),
    Reader("results", "lines", _runs, lambda file: read_runs(file)),
    Reader("learn-settings", "bytes", _of_text("s.toml", SETTINGS.read_bytes()), read_settings, 3000),
    Reader("chat", "json", _of_text("chat.json", _chat_text()), _chat),
    Reader("export", "json", _export, _exported),
    Reader("text", "bytes", _of_text("a/a.txt", "Bread rises.\n\nIt browns.\n"), _corpus),
    Reader("markdown", "bytes", _of_text("a/a.md", MARKDOWN), _corpus, 1500),
    Reader("html", "bytes", _of_text("a/a.html", HTML), _corpus, 60),
    Reader("csv", "bytes", _of_text("a/a.csv", NAMES), _corpus, 200),
    Reader("jsonl", "lines", _of_text("a/a.jsonl", JSON_LINES), _corpus, 2500),
    Reader("pdf", "bytes", _pdf, _corpus, 1200),
    Reader("word", "zip", _office("a.docx"), _corpus, 40),
    Reader("epub", "zip", _office("a.epub"), _corpus, 40),
)
BY_NAME = {reader.name: reader for reader in READERS}
