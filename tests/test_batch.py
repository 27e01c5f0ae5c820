"""MemoryBatch: sequences with different memories in one decode step get what each gets alone."""

from __future__ import annotations

import dataclasses
import pathlib

import mlx.core as mx
import numpy as np
import pytest
from tiny import CONFIG, load_tiny, make_anchor, make_bank, make_model

from mlx_hiermem import load
from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import FetchedMemory
from mlx_hiermem.batch import MemoryBatch, Token
from mlx_hiermem.config import KINDS, Path
from mlx_hiermem.errors import BankError, HierMemError
from mlx_hiermem.memory.table import MemoryTable
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.selection import Selection

MEMORIES = ("0.1", "none", "2.2", "generic", "0.1", "1", "2.0", "0.1")
PROMPTS = ("short", "another prompt that is longer", "a", "of four", "five five five", "6", "seven?", "eight")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> MemoryModel:
    """Path 2.0 is ragged: its leaf has no block, so its memory is shorter than the others."""
    config = dataclasses.replace(CONFIG, kind=request.param)
    return load_tiny(make_model(tmp_path / "model", config, absent=("2.0",)))


@pytest.fixture
def ffn(tmp_path: pathlib.Path) -> MemoryModel:
    return load_tiny(make_model(tmp_path / "model"))


def run(batch: MemoryBatch, steps: int = 1000) -> dict[int, list[Token]]:
    """Steps until all have ended."""
    tokens: dict[int, list[Token]] = {}
    while batch and steps:
        steps -= 1
        for token in batch.step():
            tokens.setdefault(token.uid, []).append(token)
    return tokens


def alone(model: MemoryModel, memory: str, prompt: str, length: int) -> list[int]:
    model.select(memory, "")
    return [response.token for response in model.responses(model.tokens(prompt), Sampling(length))]


def add(batch: MemoryBatch, memory: str, prompt: str, **sampling: object) -> int:
    choice = batch.model.choose(memory, [prompt])
    return batch.add(batch.model.tokens(prompt), choice, Sampling(**sampling))[0]  # type: ignore[arg-type]


def ids(tokens: list[Token]) -> list[int]:
    return [token.token for token in tokens]


def known(memory: str) -> str:
    return "2" if memory == "2.0" else memory


def test_a_batch_gives_what_each_sequence_gets_alone(model: MemoryModel) -> None:
    lengths = (9, 3, 12, 1, 5, 7, 4, 10)
    requests = [(known(memory), prompt) for memory, prompt in zip(MEMORIES, PROMPTS, strict=True)]
    expected = [alone(model, *request, length) for request, length in zip(requests, lengths, strict=True)]
    assert len({tuple(tokens[:3]) for tokens in expected}) > 4  # the memories make a difference
    batch = MemoryBatch(model)
    uids = [add(batch, *request, max_tokens=n) for request, n in zip(requests, lengths, strict=True)]
    assert not batch.room
    found = run(batch)
    assert [ids(found[uid]) for uid in uids] == expected
    assert len(batch) == 0


def test_sequences_come_and_go(ffn: MemoryModel) -> None:
    """Continuous batching: room for three serves eight requests, added while others are under way."""
    expected = [alone(ffn, known(m), p, 6) for m, p in zip(MEMORIES, PROMPTS, strict=True)]
    batch, waiting = MemoryBatch(ffn, max_sequences=3), list(enumerate(zip(MEMORIES, PROMPTS, strict=True)))
    found: dict[int, list[int]] = {}
    order: dict[int, int] = {}
    while waiting or batch:
        if waiting and batch.room:
            number, (memory, prompt) = waiting.pop(0)
            order[add(batch, known(memory), prompt, max_tokens=6)] = number
        for token in batch.step():
            found.setdefault(order[token.uid], []).append(token.token)
    assert [found[number] for number in range(len(MEMORIES))] == expected


def test_logits_of_a_table_are_those_of_each_memory(model: MemoryModel) -> None:
    assert model.attachment
    assert model.cache
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (1, 11)))
    memories = [None, *(model.cache.fetch(path).memory for path in (Path((1, 2)), Path((2,)), Path((0, 0))))]
    assert memories[1]
    longer = {name: mx.concatenate([t, 0.5 * t], axis=1) for name, t in memories[1].tensors.items()}
    memories.append(FetchedMemory(memories[1].config, longer))  # as a generic block may be; it comes last
    expected = []
    for memory in memories:
        model.attachment.set(memory)
        expected.append(model.anchor(tokens))
    table = MemoryTable(model.attachment)
    rows = [table.hold(number, memory) for number, memory in enumerate(memories)]
    table.use(mx.array(rows))
    found = model.anchor(mx.repeat(tokens, len(rows), axis=0))
    for number, logits in enumerate(expected):
        assert mx.allclose(found[number], logits[0], atol=2e-5), f"memory {number}"
    model.attachment.set(memories[1])  # one for all again
    assert mx.array_equal(model.anchor(tokens), expected[1])


def test_rows_of_unused_memories_are_used_again(ffn: MemoryModel) -> None:
    assert ffn.attachment
    assert ffn.cache
    table = MemoryTable(ffn.attachment)

    def memory(text: str) -> int:
        assert ffn.cache
        return table.hold(text, ffn.cache.fetch(Path.parse(text)).memory)

    assert table.hold("none", None) == 0
    first = memory("0.1")
    assert memory("0.1") == first
    second = memory("1.1")
    assert {first, second} == {1, 2}
    assert table.capacity >= 2
    before = table.capacity
    table.drop("0.1")
    table.drop("0.1")
    held = [memory(text) for text in ("2.2", "2.1", "2.0")][: before - 1]
    assert second not in held
    assert len(set(held)) == len(held)
    assert table.nbytes > 0


def test_same_paths_share_one_copy(ffn: MemoryModel) -> None:
    batch = MemoryBatch(ffn, max_sequences=4)
    for prompt in PROMPTS[:4]:
        add(batch, "1.1", prompt, max_tokens=3)
    assert batch.table is not None
    assert len(batch.table) == 1
    assert ffn.cache
    assert ffn.cache.stats.misses == 2
    run(batch)


def test_a_removed_sequence_leaves_the_others_as_they_are(ffn: MemoryModel) -> None:
    expected = alone(ffn, "0.0", "stays", 8)
    batch = MemoryBatch(ffn, max_sequences=2)
    goes, stays = add(batch, "1.1", "goes", max_tokens=50), add(batch, "0.0", "stays", max_tokens=8)
    seen = [token for _ in range(4) for token in batch.step()]
    batch.remove(goes)
    batch.remove(goes)  # whoever is gone cannot go again
    assert batch.room
    rest = run(batch)
    assert goes not in rest
    assert [t.token for t in seen if t.uid == stays] + ids(rest[stays]) == expected


def test_a_prompt_goes_on_from_an_earlier_one_of_the_same_memory(ffn: MemoryModel) -> None:
    batch = MemoryBatch(ffn)
    first = add(batch, "0.1", "the beginning", max_tokens=6)
    reply = ffn.tokenizer.decode(ids(run(batch)[first]))
    longer = ffn.tokens("the beginning" + reply + " and more")
    if ffn.tokens("the beginning" + reply) != longer[: len(ffn.tokens("the beginning" + reply))]:
        longer = ffn.tokens("the beginning and more")  # bytes that are no text
    expected = {}
    for memory in ("0.1", "0.2"):
        ffn.select(memory, "")
        expected[memory] = [response.token for response in ffn.responses(longer, Sampling(5))]
    for memory, reused in (("0.1", True), ("0.2", False)):
        uid, _ = batch.add(longer, batch.model.choose(memory, []), Sampling(max_tokens=5))
        assert (batch.cached_tokens(uid) >= len("the beginning")) is reused
        assert ids(run(batch)[uid]) == expected[memory]
    again, _ = batch.add(longer, batch.model.choose("0.1", []), Sampling(max_tokens=5))
    assert batch.cached_tokens(again) == len(longer) - 1  # the last token is always computed
    assert ids(run(batch)[again]) == expected["0.1"]


def test_conversations_are_routed_by_their_turns(ffn: MemoryModel) -> None:
    batch = MemoryBatch(ffn)
    choice = batch.model.choose("fetched", ["hello", "what is it?"])
    assert choice.memory == "fetched"
    assert len(choice.route.distances) == len(choice.path) == 2
    top = Path(choice.path[:1])
    elsewhere = batch.model.choose("fetched", ["hello", "what is it?"], [top])
    assert elsewhere.path[:1] != top
    uid, selection = batch.add(ffn.tokens("what is it?"), elsewhere, Sampling(max_tokens=2))
    assert selection.blocks == tuple(str(node) for node in elsewhere.path.prefixes())
    assert selection.bytes_read > 0
    assert len(run(batch)[uid]) <= 2


def test_seeds_and_logprobs(ffn: MemoryModel) -> None:
    batch = MemoryBatch(ffn)
    hot = {"temperature": 1.0, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    uids = [add(batch, "0.1", "roll", seed=seed, **hot) for seed in (1, 2, 1)]
    uids.append(add(batch, "0.1", "roll", seed=1, temperature=1.0, top_p=1e-6, max_tokens=12))
    found = run(batch)
    one, two, again, narrow = (ids(found[uid]) for uid in uids)
    assert one == again != two
    assert narrow == alone(ffn, "0.1", "roll", 12)  # only the likeliest is left
    for token in found[uids[0]]:
        assert len(token.top) == 3
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)
        assert token.logprob <= token.top[0][1] < 0
        assert token.logprob == dict(token.top).get(token.token, token.logprob)


def test_reasons_to_end(ffn: MemoryModel) -> None:
    batch = MemoryBatch(ffn)
    end = ffn.tokenizer.eos_token_id
    uid = add(batch, "none", "abc", max_tokens=3)
    assert [token.finish_reason for token in run(batch)[uid]] == [None, None, "length"]
    first = alone(ffn, "none", "abc", 1)[0]
    ffn.tokenizer.add_eos_token(str(first))
    batch = MemoryBatch(ffn)
    uid = add(batch, "none", "abc", max_tokens=3)
    assert [(token.token, token.finish_reason) for token in run(batch)[uid]] == [(first, "stop")]
    assert end != first


def test_bad_requests_change_nothing(ffn: MemoryModel) -> None:
    ffn.config["max_position_embeddings"] = 20
    batch = MemoryBatch(ffn, max_sequences=1)
    for memory, error in (("9.9", BankError), ("no such", HierMemError)):
        with pytest.raises(error):
            batch.model.choose(memory, [])
    with pytest.raises(BankError, match="no node"):
        batch.model.choose("fetched", ["text"], [Path((7,))])
    with pytest.raises(HierMemError, match="prompt is empty"):
        batch.add([], Selection(), Sampling())
    with pytest.raises(HierMemError, match="15 tokens and a reply of 6 are more than the model's 20"):
        batch.add(list(range(15)), Selection(), Sampling(max_tokens=6))
    assert batch.room
    uid = add(batch, "none", "fits", max_tokens=2)
    with pytest.raises(HierMemError, match="has its 1 sequences"):
        add(batch, "none", "no room", max_tokens=2)
    assert len(run(batch)[uid]) == 2


def test_an_anchor_without_a_bank(tmp_path: pathlib.Path) -> None:
    model = load(make_anchor(tmp_path / "anchor"))
    expected = alone(model, "none", "abc", 4)
    batch = MemoryBatch(model)
    uid = add(batch, "none", "abc", max_tokens=4)
    assert ids(run(batch)[uid]) == expected
    with pytest.raises(BankError, match="no bank"):
        batch.model.choose("fetched", ["abc"])


def test_padding_is_never_sampled(ffn: MemoryModel) -> None:
    ffn.config["effective_vocab_size"] = 10
    batch = MemoryBatch(ffn)
    uids = [add(batch, "0.1", "abc", max_tokens=8, temperature=t, seed=0) for t in (0.0, 2.0)]
    found = run(batch)
    assert all(token.token < 10 for uid in uids for token in found[uid])


@pytest.mark.slow
def test_sliding_windows(tmp_path: pathlib.Path) -> None:
    """Gemma 3's caches rotate; the window of 6 is shorter than these prompts."""
    from sources import make_hf

    from mlx_hiermem.convert.anchors.huggingface import convert_huggingface

    convert_huggingface(make_hf(tmp_path / "source", "gemma3_text"), tmp_path / "anchor")
    anchor, tokenizer, config = load_anchor(tmp_path / "anchor", mx.float32)
    hidden = anchor.layers[0].mlp.gate_proj.weight.shape
    memory = dataclasses.replace(CONFIG, hidden=hidden[1], ffn_width=hidden[0], layers=(0, 2))
    bank = MemoryBank.open(make_bank(tmp_path / "bank", tmp_path / "anchor", memory))
    model = MemoryModel(anchor, tokenizer, config, bank)
    requests = [(list(range(3, 3 + n)), path) for n, path in ((14, "0.1"), (4, "1.2"), (9, "2.0"))]
    expected = []
    for prompt, path in requests:
        model.select(path, "")
        expected.append([response.token for response in model.responses(prompt, Sampling(10))])
    batch = MemoryBatch(model)
    uids = [
        batch.add(prompt, batch.model.choose(path, []), Sampling(max_tokens=10))[0] for prompt, path in requests
    ]
    found = run(batch)
    assert [ids(found[uid]) for uid in uids] == expected
