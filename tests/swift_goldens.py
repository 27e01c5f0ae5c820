"""Goldens for the Swift tests in apps/ios/HierMemKit: what the Python side makes of given inputs.

    python tests/swift_goldens.py              writes the goldens again; test_swift_goldens.py compares them
    python tests/swift_goldens.py --inputs     makes the inputs anew too: small tokenizers, embedded conversations
    python tests/swift_goldens.py --real OUT   what is too large to keep, for `make test-swift`: goldens of the real
                                               tokenizers, and an exported folder with what Python reads from it

Vectors come from a generator that both languages state (SplitMix64), so that a thousand of them take no space.
"""

# ruff: noqa: E402  (imports come after what must happen before MLX is imported)

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from mlx_hiermem import cpu

cpu.enable()

import mlx.core as mx
import numpy as np
from elements import BANK
from swift_session import Said, with_sources, write_session
from swift_sources import routed_with_words
from swift_texts import write_real_tokens, write_tokenizers, write_tokens

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.passages import PROBED
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.router import Router, Turn
from mlx_hiermem.tree import ClusterTree

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = ROOT / "apps/ios/HierMemKit/Tests/HierMemKitTests/Fixtures"
TALKS = {"conversations.jsonl": 8, "changes_of_subject.jsonl": 12}  # so many of each: those on the elements
EMBEDDED = "inputs/conversations"  # the texts that a router asks for (.json), and their vectors (.safetensors)
VECTORS = 1000
CLOSED = ("1", "2.0", "3.1.2")  # nodes of the ragged tree that the blocked routes may not enter


def splitmix(seed: int) -> Iterator[int]:
    """64-bit numbers; SplitMix64 in Sampler.swift."""
    mask = (1 << 64) - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        yield z ^ z >> 31


def uniform(seed: int, *shape: int) -> np.ndarray:
    """float32 in [-1, 1), exact in both languages."""
    numbers = splitmix(seed)
    values = [(next(numbers) >> 40) / 2**23 - 1 for _ in range(int(np.prod(shape)))]
    return np.array(values, dtype=np.float32).reshape(shape)


def write_safetensors(file: pathlib.Path, tensors: dict[str, mx.array]) -> None:
    """In the order given, so that equal tensors are equal files."""
    names = {mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32", mx.uint32: "U32"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(memoryview(tensor.view(mx.uint8)))
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def write_routes(folder: pathlib.Path) -> None:
    """Where the vectors go: down the elements' tree, and down a ragged one with and without blocked nodes."""
    ragged = ClusterTree(
        [uniform(11, 1, 4, 16), uniform(12, 4, 4, 16), uniform(13, 16, 4, 16)],
        [np.ones((1, 4), bool), uniform(14, 4, 4) > -0.5, uniform(15, 16, 4) > -0.5],
    )
    ragged.save(folder / "ragged-tree.safetensors")
    vectors = uniform(2, VECTORS, 16)
    cases = {"elements": (ClusterTree.load(BANK / "tree.safetensors"), uniform(1, VECTORS, 384) / 16, BankPolicy())}
    blocked, goldens = frozenset(map(Path.parse, CLOSED)), {}
    for name, policy in (
        ("ragged", BankPolicy()),
        ("sibling", BankPolicy(blocked, "sibling")),
        ("parent", BankPolicy(blocked, "parent")),
        ("reach", BankPolicy(blocked, reach=2.9)),
    ):
        cases[name] = (ragged, vectors, policy)
    for name, (tree, embeddings, policy) in cases.items():
        routes = policy.route(tree, embeddings)
        golden = {
            "paths": [str(route.path) for route in routes],
            "avoided": [" ".join(map(str, route.avoided)) for route in routes],
            "distances": [route.distances for route in routes[:50]],
            "beams": [" ".join(map(str, tree.beam(vector, PROBED))) for vector in embeddings[:50]],
        }
        goldens[name] = golden | policy.to_json()
    goldens |= passage_routes(folder)
    text = json.dumps(goldens, separators=(",", ":")).replace("]]", "]]\n")
    (folder / "routes.json").write_text(text + "\n")
    bank = with_sources(MemoryBank.open(folder / "bank"))
    assert bank.sources
    words = json.dumps(routed_with_words(bank.tree, bank.sources, 1.0), ensure_ascii=False)
    (folder / "words.json").write_text(words + "\n", encoding="utf-8")


def passage_routes(folder: pathlib.Path) -> dict[str, Any]:
    """Where vectors go in the tiny bank with its sources."""
    bank = with_sources(MemoryBank.open(folder / "bank"))
    vectors = uniform(5, 60, bank.tree.dim)
    vectors /= np.sqrt((vectors**2).sum(1, keepdims=True))
    assert bank.sources
    some, goldens = frozenset(map(Path.parse, ("0", "1.2", "2.0"))), {}
    for name, policy in {
        "open": BankPolicy(),
        "passage reach": BankPolicy(passage_reach=1.05),
        "reach": BankPolicy(reach=2.2),
        "both": BankPolicy(reach=2.2, passage_reach=1.05),
        "sibling": BankPolicy(some, passage_reach=1.2),
        "parent": BankPolicy(some, "parent"),
        "closed": BankPolicy(frozenset(bank.sources.leaves()), "sibling"),
    }.items():
        routes = Router(bank.tree, Said(bank.tree), policy, bank.sources).route_vectors([""] * 60, vectors)
        golden = {
            "paths": [str(route.path) for route in routes],
            "avoided": [" ".join(map(str, route.avoided)) for route in routes],
            "distances": [route.distances for route in routes],
            "passages": [route.passage for route in routes],
            "far": [route.far for route in routes],
        }
        goldens[f"passages, {name}"] = golden | policy.to_json()
    return goldens


class Recorded:
    """An embedder of texts that were embedded before."""

    def __init__(self, folder: pathlib.Path) -> None:
        tensors = mx.load(str(folder / f"{EMBEDDED}.safetensors"))
        assert isinstance(tensors, dict)
        vectors = np.array(tensors["vectors"].astype(mx.float32))
        texts = json.loads((folder / f"{EMBEDDED}.json").read_text(encoding="utf-8"))
        self.vectors = dict(zip(texts, vectors, strict=True))

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.stack([self.vectors[text] for text in texts])


def conversations() -> list[list[str]]:
    return [
        [turn["user"] for turn in json.loads(line)["turns"]]
        for name, count in TALKS.items()
        for line in (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()[:count]
    ]


def play(router: Router) -> Iterator[list[Turn]]:
    """Every turn of real conversations."""
    for talk in conversations():
        topic, turns = None, []
        for text in talk:
            turns.append(router.turn(text, topic))
            topic = turns[-1].topic
        yield turns


def write_turns(folder: pathlib.Path) -> None:
    """The path of every turn of real conversations, with real embeddings, on the elements' bank."""
    tree, policy = ClusterTree.load(BANK / "tree.safetensors"), BankPolicy.read(BANK / "policy.json")
    talks = [
        [
            {
                "text": turn.text,
                "alone": str(turn.alone.path),
                "path": str(turn.route.path),
                "topic": str(turn.topic.path),
                "stayed": turn.route.stayed,
                "far": turn.route.far,
                "decided": turn.decided,
                "needed": turn.needed,
                "belongs": turn.belongs,
            }
            for turn in turns
        ]
        for turns in play(Router(tree, Recorded(folder), policy))
    ]
    golden = {"reach": policy.reach, "talks": talks}
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace("],", "],\n")
    (folder / "turns.json").write_text(text + "\n", encoding="utf-8")


def write_quantized(folder: pathlib.Path) -> None:
    """Quantised tensors of every kind a bank may have, and their values in float16."""
    tensors: dict[str, mx.array] = {}
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        for bits in (2, 4, 8):
            for group in (32, 64, 128):
                seed = 100 * bits + group
                # rows of very different sizes, down to where float16 has few bits left
                scale = np.float32([1e-6, 1e-4, 1e-2, 1, 30, 4000])[:, None]
                values = mx.array(uniform(seed, 6, 128) * scale).astype(dtype)
                packed, scales, biases = mx.quantize(values, group, bits, stream=mx.cpu)
                expected = mx.dequantize(packed, scales, biases, group, bits, stream=mx.cpu).astype(mx.float16)
                name = f"{str(dtype).removeprefix('mlx.core.')}-{bits}-{group}"
                parts = {"packed": packed, "scales": scales, "biases": biases, "values": expected}
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    mx.eval(tensors)
    write_safetensors(folder / "quantized.safetensors", tensors)


def write_samples(folder: pathlib.Path) -> None:
    """What the sampler takes: mlx-lm's candidates, and the draws of SplitMix64 among them."""
    from mlx_lm.sample_utils import apply_top_k, apply_top_p

    logits = uniform(21, 40) * 4
    logits[7] = logits[3]  # a tie
    logprobs = mx.array(logits) - mx.logsumexp(mx.array(logits))
    cases = []
    for temperature, top_p, top_k in ((0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 5), (0.8, 0.8, 3)):
        kept = logprobs[None]
        kept = apply_top_p(kept, top_p) if top_p < 1 else kept
        kept = apply_top_k(kept, top_k) if top_k else kept
        candidates = np.flatnonzero(np.isfinite(np.array(kept[0])))
        numbers, tokens = splitmix(5), []
        for _ in range(200):
            if not temperature:
                tokens.append(int(logits.argmax()))
                continue
            weights = np.exp((logits[candidates].astype(float) - float(logits.max())) / temperature)
            left = (next(numbers) >> 11) * 2.0**-53 * weights.sum()
            tokens.append(int(candidates[min(np.searchsorted(weights.cumsum(), left, "right"), len(weights) - 1)]))
        cases.append({"temperature": temperature, "topP": top_p, "topK": top_k, "tokens": tokens})
    (folder / "samples.json").write_text(json.dumps(cases, separators=(",", ":")).replace("},", "},\n") + "\n")


class Recording:
    """The real MiniLM in float16, which is near enough for a test's input; it keeps what it was asked for."""

    def __init__(self) -> None:
        from mlx_hiermem.embedder import Embedder

        self.embedder = Embedder.load()
        self.vectors: dict[str, np.ndarray] = {}

    def embed(self, texts: list[str]) -> np.ndarray:
        vectors = self.embedder.embed(texts).astype(np.float16)
        self.vectors |= dict(zip(texts, vectors, strict=True))
        return vectors.astype(np.float32)


def write_embedded(folder: pathlib.Path) -> None:
    """Embeds the conversations' questions, and follow-ups behind their questions."""
    tree, policy = ClusterTree.load(BANK / "tree.safetensors"), BankPolicy.read(BANK / "policy.json")
    for _ in play(Router(tree, recording := Recording(), policy)):
        pass
    vectors = mx.array(np.stack(list(recording.vectors.values())))
    write_safetensors(folder / f"{EMBEDDED}.safetensors", {"vectors": vectors})
    text = json.dumps(list(recording.vectors), ensure_ascii=False, indent=0)
    (folder / f"{EMBEDDED}.json").write_text(text + "\n", encoding="utf-8")


def write_goldens(folder: pathlib.Path) -> None:
    """Everything but the inputs, which must be in the folder."""
    write_session(folder)  # first: the routes need its bank
    write_routes(folder)
    write_turns(folder)
    write_quantized(folder)
    write_samples(folder)
    write_tokens(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", action="store_true")
    parser.add_argument("--real", type=pathlib.Path)
    parser.add_argument("--export", type=pathlib.Path, help="with --real: this exported folder, not a tiny model's")
    arguments = parser.parse_args()
    if arguments.real:
        from swift_export import write_export

        write_real_tokens(arguments.real)
        write_export(arguments.real, arguments.export)
    else:
        if arguments.inputs:
            write_embedded(FIXTURES)
            write_tokenizers(FIXTURES)
        write_goldens(FIXTURES)
