"""KV caches in 8 and 4 bits: nearly the same text, with each turn's own memory; refused where they cannot be."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from tiny import LLAMA, load_aimed, make_anchor, make_bank
from typer.testing import CliRunner

from mlx_hiermem import load
from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, ArgumentError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling, check_quantizable
from mlx_hiermem.session import Session

A, B, C = Path((0, 1)), Path((2, 0)), Path((2, 2))
FAMILY = {
    "hidden_size": 128,
    "head_dim": 32,
    "layer_norm_eps": 1e-5,
    "logit_scale": 1.0,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "use_qkv_bias": False,
}
TURNS = ("about neon", "and its symbol?", "now iron", "and that?", "neon again", "iron again")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny model with heads of 64 values: mlx-lm quantises groups of no fewer than 32."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    make_bank(folder / "bank", make_anchor(folder / "anchor", config=LLAMA | {"head_dim": 64}))
    return folder


@pytest.fixture
def model(wide: pathlib.Path) -> MemoryModel:
    return load_aimed(wide, {"neon": A, "iron": B}, C)


def next_logprobs(model: MemoryModel, text: str, cache: list[Any] | None = None, **options: Any) -> mx.array:
    """Of the first token after a text, which sees the text's keys and values as the cache keeps them."""
    responses = model.responses(model.tokens(text), Sampling(1, **options), prompt_cache=cache)
    return next(iter(responses)).logprobs.astype(mx.float32)


def far(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(mx.softmax(a) - mx.softmax(b)).sum())


@pytest.mark.parametrize(("bits", "bytes_left"), [(8, 0.3), (4, 0.17)])
def test_it_takes_less_and_says_nearly_the_same(model: MemoryModel, bits: int, bytes_left: float) -> None:
    text = "The noble gases are helium, neon, argon, krypton and xenon. " * 4
    caches = [make_prompt_cache(model.anchor) for _ in range(2)]
    model.select("0.1", "")
    exact = next_logprobs(model, text, caches[0])
    few = next_logprobs(model, text, caches[1], kv_bits=bits, quantized_kv_start=0)
    assert {(type(entry), entry.bits) for entry in caches[1]} == {(QuantizedKVCache, bits)}
    assert sum(c.nbytes for c in caches[1]) < bytes_left * sum(c.nbytes for c in caches[0])
    model.select("2.0", "")
    other = next_logprobs(model, text)
    assert 0 < far(few, exact) < (0.02 if bits == 8 else 0.3) * far(other, exact)


def test_it_begins_where_it_is_told_to(model: MemoryModel) -> None:
    text, kinds = "x" * 40, []
    for start in (30, 50, 5000):
        cache = make_prompt_cache(model.anchor)
        next_logprobs(model, text, cache, kv_bits=8, quantized_kv_start=start)
        kinds.append(type(cache[0]))
    assert kinds == [QuantizedKVCache, KVCache, KVCache]


@pytest.mark.parametrize("start", [0, 60])
def test_each_turn_has_its_own_memory(model: MemoryModel, start: int) -> None:
    """Across changes of path and back, with caches kept, cut and gone on from; against an exact and empty cache."""
    session, same, reused = Session(model, history="all", max_tokens=8, kv_bits=8, quantized_kv_start=start), 0, 0
    for text in TURNS:
        said = "".join(session.ask(text))
        prompt = model.chat_tokens(session.messages[:-1])
        reused += session.prefilled < len(prompt)
        same += said == "".join(response.text for response in model.responses(prompt, Sampling(8)))
    assert {type(entry) for entry in session._cache} == {QuantizedKVCache}
    assert reused >= 4
    assert same >= 5


@pytest.mark.slow
def test_greedy_texts_mostly_agree(model: MemoryModel) -> None:
    prompts = [f"{word} and what is known of it: " for word in ("neon", "iron", "gold", "tin", "lead", "zinc")]
    exact = [model.generate(prompt, max_tokens=12).text for prompt in prompts]
    few = [model.generate(p, max_tokens=12, kv_bits=8, quantized_kv_start=0).text for p in prompts]
    assert sum(a == b for a, b in zip(exact, few, strict=True)) >= 5


def test_heads_that_no_group_fits_are_refused_before_a_word_is_said(folder: pathlib.Path) -> None:
    narrow = load(folder)
    with pytest.raises(AnchorError, match="cannot be quantised"):
        Session(narrow, kv_bits=8)
    with pytest.raises(AnchorError, match="another kv_group_size"):
        narrow.generate("abc", memory="none", kv_bits=4)


def family(name: str) -> nn.Module:
    """A random model of one of mlx-lm's architectures."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    return module.Model(module.ModelArgs.from_dict(LLAMA | FAMILY | {"model_type": name}))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "cohere", "olmo2", "phi3", "glm4"])
def test_families_go_on_nearly_as_with_exact_keys(name: str) -> None:
    anchor, found = family(name), []
    check_quantizable(anchor, 8, 32)
    for bits in (None, 8):
        cache = make_prompt_cache(anchor)
        anchor(mx.arange(1, 31)[None], cache=cache)
        if bits:
            cache = [entry.to_quantized(32, bits) for entry in cache]
        anchor(mx.arange(31, 39)[None], cache=cache)
        found.append(anchor(mx.array([[39]]), cache=cache)[0, -1])
    exact, few = found
    assert 0 < float(mx.abs(few - exact).max()) < 0.03 * float(mx.abs(exact - exact.mean()).max())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3_text", "no RotatingKVCache"),
        ("falcon_h1", "no CacheList"),
        ("gemma2", "attention of gemma2"),
        ("stablelm", "attention of stablelm"),
    ],
)
def test_families_that_mlx_lm_would_fail_on_are_refused(name: str, reason: str) -> None:
    with pytest.raises(AnchorError, match=reason):
        check_quantizable(family(name), 8, 32)


def test_a_batch_is_refused(model: MemoryModel) -> None:
    with pytest.raises(ArgumentError, match="cannot batch"):
        model.batch(["abc"], kv_bits=8)


@pytest.mark.parametrize(
    "wrong",
    [{"kv_bits": 3}, {"kv_bits": 8.0}, {"kv_bits": True}, {"kv_group_size": 16}, {"quantized_kv_start": -1}],
)
def test_what_cannot_be_is_named(model: MemoryModel, wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} is"):
        model.generate("abc", **wrong)


def test_the_commands_take_it(wide: pathlib.Path, folder: pathlib.Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, list(words))

    few = ["--kv-bits", "8", "--quantized-kv-start", "0"]
    asked = run("ask", "-m", str(wide), "--memory", "0.1", "-n", "4", "about neon", *few)
    assert asked.exit_code == 0
    assert asked.stdout
    refused = run("ask", "-m", str(folder), "--memory", "0.1", "-n", "4", "about neon", *few)
    assert refused.exit_code != 0
    assert isinstance(refused.exception, AnchorError)
    assert run("serve", str(wide), "--kv-bits", "8").exit_code == 2
