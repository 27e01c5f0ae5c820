"""OpenAI's API by OpenAI's client, and the memory's own routes, on a real server over a tiny model."""

from __future__ import annotations

import math
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import CONTEXT, Running, events, serving, tiny_model

from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling

CHAT = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> MemoryModel:
    """The same model, without a server."""
    return tiny_model(folder)


def chat(client: openai.OpenAI, memory: Any = "none", **options: Any) -> Any:
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 12} | options
    return client.chat.completions.create(extra_body={"memory": memory}, **options)


def complete(client: openai.OpenAI, memory: Any = "none", **options: Any) -> Any:
    options = {"model": "tiny", "prompt": "hello there", "max_tokens": 12} | options
    return client.completions.create(extra_body={"memory": memory}, **options)


def joined(stream: Any) -> str:
    """The text of a stream of either kind."""
    pieces = [choice for chunk in stream for choice in chunk.choices]
    return "".join((choice.delta.content if hasattr(choice, "delta") else choice.text) or "" for choice in pieces)


def said(reply: Any) -> str:
    """The text of a whole answer of either kind."""
    choice = reply.choices[0]
    return str(choice.message.content if hasattr(choice, "message") else choice.text)


def alone(model: MemoryModel, memory: str, tokens: list[int], length: int) -> str:
    """What the model says by itself."""
    model.select(memory, "")
    ids = [
        r.token for r in model.responses(tokens, Sampling(length)) if r.token not in model.tokenizer.eos_token_ids
    ]
    return str(model.tokenizer.decode(tokens + ids)[len(model.tokenizer.decode(tokens)) :]).rstrip("\ufffd")


# models


def test_models(client: openai.OpenAI) -> None:
    memories = ["none", "generic", "0", "1", "2"]
    assert [row.id for row in client.models.list()] == ["tiny", *(f"tiny:{memory}" for memory in memories)]
    assert client.models.retrieve("tiny").owned_by == "mlx-hiermem"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-9")
    assert caught.value.code == "model_not_found"


# text


def test_a_reply_is_the_models_own(client: openai.OpenAI, model: MemoryModel) -> None:
    reply = chat(client, "0.1")
    assert reply.object == "chat.completion"
    assert reply.model == "tiny"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == alone(model, "0.1", model.chat_tokens(CHAT), 12)
    assert reply.choices[0].finish_reason == "length"
    assert complete(client, "0.1").choices[0].text == alone(model, "0.1", model.tokens("hello there"), 12)


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    whole, options = chat(client, "0.1"), {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(client, "0.1", **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks) == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    chunks = list(complete(client, "0.1", stream=True))
    assert joined(chunks) == complete(client, "0.1").choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_as_openais_does(server: Running) -> None:
    body = {"messages": CHAT, "memory": "none", "max_tokens": 3, "stream": True}
    status, headers, content = server.ask("POST", "/v1/chat/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert events(content)[-1] is None


@pytest.mark.parametrize("ask", [chat, complete])
def test_stop_strings(client: openai.OpenAI, ask: Any) -> None:
    replies = ((seed, said(ask(client, temperature=1.0, seed=seed, max_tokens=40))) for seed in range(20))
    seed, text = next((seed, text) for seed, text in replies if text[9:12] not in text[:9] and len(text) > 20)
    options = {"temperature": 1.0, "seed": seed, "max_tokens": 40}
    stop = text[9:12]  # three characters are three tokens or more
    for given in (stop, ["never", stop]):
        reply = ask(client, stop=given, **options)
        assert said(reply) == text[:9]
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens < 40
        chunks = list(ask(client, stop=given, stream=True, **options))
        assert joined(chunks) == text[:9]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_end_of_the_text_is_a_stop(folder: pathlib.Path) -> None:
    def ends_soon() -> MemoryModel:
        model = tiny_model(folder)
        second = [r.token for r in model.responses(model.tokens("hello there"), Sampling(6))][5]
        model.tokenizer.eos_token_ids = {second}
        return model

    with serving(ends_soon) as running:
        reply = complete(running.client, max_tokens=50)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens <= 6


def test_sampling(client: openai.OpenAI) -> None:
    greedy = complete(client).choices[0].text
    options = {"temperature": 1.5, "max_tokens": 20}
    first, second = (complete(client, seed=1, **options).choices[0].text for _ in range(2))
    assert first == second
    texts = {complete(client, seed=seed, **options).choices[0].text for seed in (1, -2, 2**62)}
    assert len(texts) == 3
    assert len({complete(client, **options).choices[0].text for _ in range(3)}) > 1
    for top_p in (0, 1e-6):  # the likeliest token alone
        assert complete(client, top_p=top_p, temperature=1.5).choices[0].text == greedy


def test_seeds_hold_in_company(client: openai.OpenAI) -> None:
    def say(seed: int) -> str:
        return str(complete(client, temperature=1.0, seed=seed, max_tokens=30).choices[0].text)

    expected = [say(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(say, range(4))) == expected


def test_lengths(client: openai.OpenAI) -> None:
    assert chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=7).usage.completion_tokens == 7
    assert complete(client, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 16
    reply = chat(client, max_tokens=openai.NOT_GIVEN)  # as long as there is room
    assert reply.usage.total_tokens == CONTEXT
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(client: openai.OpenAI, stream: bool) -> None:
    options = {"logprobs": True, "top_logprobs": 3, "temperature": 1.0, "seed": 3, "max_tokens": 20}
    answer = chat(client, stream=stream, **options)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    rows = [row for choice in choices if choice.logprobs for row in choice.logprobs.content]
    text = joined(chat(client, stream=True, **options))
    assert len(rows) == 20
    for row in rows:
        best = [top.logprob for top in row.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert row.logprob <= best[0] <= 0
        assert sum(map(math.exp, best)) <= 1.0001
        assert row.bytes is None if "\ufffd" in row.token else bytes(row.bytes).decode() == row.token
    if all(row.bytes for row in rows):
        assert "".join(row.token for row in rows) == text
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 20}
    choice = complete(client, logprobs=2, **options).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 20
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob) or "\ufffd" in token
        assert 2 <= len(top) <= 3 or any("\ufffd" in name for name in top)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        # A token that ends a stretch which is no text has the place of the stretch.
        assert choice.text[offset : offset + 3 + len(token)].find(token) >= 0 or "\ufffd" in token
    streamed = [c.choices[0].logprobs for c in complete(client, logprobs=2, stream=True, **options)]
    assert [offset for part in streamed if part for offset in part.text_offset] == logprobs.text_offset
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None
    assert complete(client).choices[0].logprobs is None


def test_usage(client: openai.OpenAI, model: MemoryModel) -> None:
    prompt = model.chat_tokens([{"role": "user", "content": "how many tokens is this?"}])
    options = {"messages": [{"role": "user", "content": "how many tokens is this?"}]}
    usage = chat(client, "1.1", **options).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 12)
    assert usage.total_tokens == len(prompt) + 12
    assert usage.prompt_tokens_details.cached_tokens == 0
    first = chat(client, "1.1", **options)
    talk = [*options["messages"], {"role": "assistant", "content": first.choices[0].message.content}]
    again = chat(client, "1.1", messages=[*talk, {"role": "user", "content": "more"}])
    assert 0 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens


def test_prompts_of_every_kind(client: openai.OpenAI, model: MemoryModel) -> None:
    texts = ["first prompt", "second"]
    ids = [model.tokens(text) for text in texts]
    expected = [complete(client, "0.1", prompt=text).choices[0].text for text in texts]
    for prompt in (texts, ids):
        reply = complete(client, "0.1", prompt=prompt)
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage.prompt_tokens == sum(map(len, ids))
        assert [memory["path"] for memory in reply.memory] == ["0.1", "0.1"]
    assert complete(client, "0.1", prompt=ids[0]).choices[0].text == expected[0]
    streamed = ["", ""]
    for chunk in complete(client, "0.1", prompt=texts, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_messages_of_every_role(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices == chat(client).choices
    system, developer = (
        chat(client, messages=[{"role": role, "content": "Be brief."}, *CHAT]) for role in ("system", "developer")
    )
    assert system.choices == developer.choices
    assert system.usage.prompt_tokens > chat(client).usage.prompt_tokens
    answered = [*CHAT, chat(client).choices[0].message, {"role": "user", "content": "and?", "name": "me"}]
    assert chat(client, messages=answered).choices[0].message.content


# health and metrics


def test_health(server: Running) -> None:
    assert server.json("GET", "/health") == (200, {"status": "ok", "model": "tiny"})


def figures(server: Running) -> dict[tuple[str, ...], float]:
    """Every sample: name and label values -> value."""
    status, headers, content = server.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(content.decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics(server: Running) -> None:
    route = "/v1/completions"
    before = figures(server)
    usage = complete(server.client, "0.2", prompt="something new").usage
    with pytest.raises(openai.BadRequestError):
        complete(server.client, best_of=2)
    server.ask("GET", "/elsewhere/1")
    after = figures(server)

    def more(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("hiermem_requests_total", route, "200") == 1
    assert more("hiermem_requests_total", route, "400") == 1
    assert more("hiermem_requests_total", "other", "404") == 1
    assert more("hiermem_prompt_tokens_total") == usage.prompt_tokens
    assert more("hiermem_generated_tokens_total") == usage.completion_tokens
    assert more("hiermem_first_token_seconds_count") == 1
    assert more("hiermem_request_seconds_count", route) == 2
    assert more("hiermem_cache_hits_total") + more("hiermem_cache_misses_total") == 2
    assert after["hiermem_cache_resident_bytes",] == server.engine.model.cache.bytes  # type: ignore[union-attr]
    assert after["hiermem_cache_read_bytes_total",] > 0
    for name in ("active_sequences", "queued_sequences", "remote_bytes_total", "cache_evictions_total"):
        assert after[f"hiermem_{name}",] == 0
