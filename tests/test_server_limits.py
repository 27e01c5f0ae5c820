"""The server's bounds in size, time and access: bodies, queues, clients that leave, steps that fail, keys."""

from __future__ import annotations

import http.client
import json
import pathlib
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import hub_server
import openai
import pytest
from serving import Gate, Running, events, eventually, serving, tiny_model
from test_server_bounds import CHAT, COMPLETIONS, HELLO, PROMPT

from mlx_hiermem.apps.server import listen
from mlx_hiermem.apps.server.address import address, bind
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.batch import MemoryBatch
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.share.pull import pull


@pytest.fixture(scope="module")
def locked(folder: pathlib.Path) -> Iterator[Running]:
    with serving(lambda: tiny_model(folder), api_key="secret") as running:
        yield running


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def idle(running: Running) -> bool:
    """Whether nothing is decoded and nothing waits, in the engine and in its batch."""
    return running.engine.active == running.engine.queued == len(running.engine.batch) == 0


def posted(running: Running, path: str, body: Any) -> http.client.HTTPConnection:
    """A connection on which a request was sent, and no answer read."""
    connection = running.connect()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


# size and time


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies(server: Running, chunked: bool) -> None:
    body = json.dumps(HELLO | {"messages": [{"role": "user", "content": "x" * 120_000}]}).encode()
    connection = server.connect()
    with socket.create_connection((connection.host, connection.port), timeout=20) as raw:
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        raw.sendall(head + length + b"\r\n\r\n")
        if chunked:
            for start in range(0, 110_000, 10_000):
                part = body[start : start + 10_000]
                raw.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert answer.status == 413
        assert json.loads(answer.read())["error"]["code"] == "request_too_large"
    assert server.json("POST", CHAT, HELLO)[0] == 200


def test_who_sends_far_too_much_sees_the_answer(server: Running) -> None:
    """A connection that is closed with bytes unread is reset, and the answer lost."""
    assert server.json("POST", CHAT, b"x" * 5_000_000)[0] == 413


def test_a_body_that_does_not_come(folder: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder), timeout=0.3) as running:
        connection = running.connect()
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"messages": ')
        assert connection.getresponse().status == 408


def test_a_full_queue(folder: pathlib.Path, gate: Gate, pool: ThreadPoolExecutor) -> None:
    with serving(lambda: tiny_model(folder), max_batch=2, max_queue=1) as running:
        taken = [pool.submit(running.json, "POST", CHAT, HELLO | {"max_tokens": 40}) for _ in range(3)]
        gate.let(4)  # one request is taken up at a step
        assert eventually(lambda: (running.engine.active, running.engine.queued) == (2, 1))
        state = running.json("GET", "/v1/memory/state")[1]
        assert (state["active"], state["queued"]) == (2, 1)
        assert b"hiermem_queued_sequences 1.0" in running.ask("GET", "/metrics")[2]
        status, headers, content = running.ask("POST", CHAT, HELLO)
        assert status == 503
        assert int(headers["retry-after"]) > 0
        assert json.loads(content)["error"]["code"] == "queue_full"
        with pytest.raises(openai.InternalServerError, match="queue is full"):
            running.client.completions.create(model="tiny", prompt="x", stream=True)
        gate.open()
        assert [each.result(30)[0] for each in taken] == [200] * 3
        assert running.json("POST", CHAT, HELLO)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up_before_the_first_token(folder: pathlib.Path, gate: Gate, stream: bool) -> None:
    with serving(lambda: tiny_model(folder), timeout=0.3) as running:
        status, answer = running.json("POST", CHAT, HELLO | {"stream": stream})
        assert (status, answer["error"]["code"]) == (503, "timeout")
        gate.open()
        assert eventually(lambda: idle(running))


@pytest.mark.slow
def test_time_is_up_in_a_stream(folder: pathlib.Path, gate: Gate) -> None:
    with serving(lambda: tiny_model(folder), timeout=2.0) as running:
        gate.let(12)
        status, _, content = running.ask("POST", CHAT, HELLO | {"stream": True, "max_tokens": 50})
        *chunks, last = events(content)
        assert status == 200
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert content.decode().split("\n\n")[-2].startswith("event: error\n")
        assert last["error"]["code"] == "timeout"
        gate.let(12)
        stream = running.client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="longer than 2 s"):
            list(stream)
        gate.open()
        assert eventually(lambda: idle(running))


def test_who_waits_for_room_has_its_blocks_read_ahead(
    folder: pathlib.Path, gate: Gate, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    prefetch = BlockCache.prefetch

    def noted(cache: BlockCache, path: Path) -> Any:
        asked.append(path)
        return prefetch(cache, path)

    monkeypatch.setattr(BlockCache, "prefetch", noted)
    with serving(lambda: tiny_model(folder), max_batch=1) as running:
        first, second = (PROMPT | {"memory": memory} for memory in ("0.1", "1.2"))
        taken = [pool.submit(running.json, "POST", COMPLETIONS, first)]
        assert eventually(lambda: running.engine.active == 1)
        taken.append(pool.submit(running.json, "POST", COMPLETIONS, second))
        assert eventually(lambda: running.engine.queued == 1)
        gate.let(1)
        assert eventually(lambda: asked == [Path((1, 2))])  # there was room for the first
        gate.open()
        assert [each.result(30)[0] for each in taken] == [200, 200]


# clients that leave, steps that fail


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_slot(folder: pathlib.Path, gate: Gate, path: str, stream: bool) -> None:
    """One is being decoded and one waits; both leave, and what they were asked for is not made."""
    body = (HELLO if path == CHAT else PROMPT) | {"stream": stream, "max_tokens": 150}
    with serving(lambda: tiny_model(folder), max_batch=1, max_queue=1) as running:
        first = posted(running, path, body)
        assert eventually(lambda: running.engine.active == 1)
        second = posted(running, path, body)
        assert eventually(lambda: running.engine.queued == 1)
        gate.let(12)
        if stream:
            assert first.getresponse().read(5) == b"data:"
        second.close()
        assert eventually(lambda: running.engine.queued == 0)
        first.close()
        assert eventually(lambda: not running.engine._open)
        gate.let(2)  # of the many that would be left
        assert eventually(lambda: idle(running))
        route = f'route="{path}",status="499"'
        left = 1 if stream else 2  # the first had been answered 200
        counted = f"hiermem_requests_total{{{route}}} {left}.0".encode()
        assert eventually(lambda: counted in running.ask("GET", "/metrics")[2])
        gate.open()
        assert running.json("POST", CHAT, HELLO)[0] == 200


@pytest.mark.slow
def test_who_leaves_disturbs_nobody(server: Running, gate: Gate, pool: ThreadPoolExecutor) -> None:
    gate.open()
    stays = PROMPT | {"max_tokens": 60, "memory": "1.2"}
    expected = server.json("POST", COMPLETIONS, stays)[1]["choices"]
    gate.allowed = type(gate.allowed)(0)
    answer = pool.submit(server.json, "POST", COMPLETIONS, stays)
    leaves = posted(server, COMPLETIONS, stays | {"memory": "0.1", "stream": True})
    gate.let(12)
    assert eventually(lambda: server.engine.active == 2)
    assert leaves.getresponse().read(5) == b"data:"
    leaves.close()
    assert eventually(lambda: len(server.engine._open) == 1)
    gate.open()
    assert answer.result(30)[1]["choices"] == expected


def test_a_step_that_fails(server: Running, gate: Gate, pool: ThreadPoolExecutor) -> None:
    bodies = [HELLO | {"memory": memory, "max_tokens": 40} for memory in ("none", "1.2")]
    answers = [pool.submit(server.json, "POST", CHAT, body) for body in bodies]
    gate.let(4)
    assert eventually(lambda: server.engine.active == 2)
    gate.error = RuntimeError("out of memory")
    gate.open()
    for status, answer in (each.result(30) for each in answers):
        assert status == 500
        assert answer["error"] | {"param": None} == answer["error"]
        assert (answer["error"]["type"], answer["error"]["code"]) == ("server_error", "internal_error")
    assert server.json("GET", "/health")[0] == 200
    assert server.json("POST", CHAT, HELLO)[0] == 200


def test_an_engine_that_has_ended(folder: pathlib.Path, gate: Gate, pool: ThreadPoolExecutor) -> None:
    with serving(lambda: tiny_model(folder)) as running:
        answer: Future[Any] = pool.submit(running.json, "POST", CHAT, HELLO)
        assert eventually(lambda: running.engine.active == 1)
        gate.error = SystemExit()
        gate.open()
        assert answer.result(30)[0] == 500
        assert running.json("GET", "/health") == (503, {"status": "the engine has stopped", "model": "tiny"})
        assert running.json("POST", CHAT, HELLO)[1]["error"]["code"] == "engine_stopped"
        assert running.json("POST", "/v1/memory/route", {"text": "x"})[0] == 500


def test_a_stop_lets_short_requests_end(
    folder: pathlib.Path, gate: Gate, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "GRACE", 2.0)
    with serving(lambda: tiny_model(folder)) as running:
        short = pool.submit(running.json, "POST", COMPLETIONS, PROMPT | {"max_tokens": 20})
        long = pool.submit(running.ask, "POST", COMPLETIONS, PROMPT | {"max_tokens": 200, "stream": True})
        gate.let(10)
        assert eventually(lambda: running.engine.active == 2)
        running.server.should_exit = True
        gate.let(30)
        assert short.result(30)[0] == 200
        assert events(long.result(30)[2])[-1]["error"]["code"] == "stopping"
        gate.open()


# the hub


def test_a_slow_hub_delays_nobody_else(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    with hub_server.serving() as hub:
        hub_server.use_in_this_process(monkeypatch, hub.url, tmp_path)
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        hub.repo("me/tiny").commit({name: file.read_bytes() for name, file in files.items()})
        pull("me/tiny", tmp_path / "lazy", lazy=True)
        hub.stall.add("bank/" + block_name(Path((1, 2))))
        hub.cut["bank/" + block_name(Path((2, 2)))] = -1  # 503
        with serving(lambda: tiny_model(tmp_path / "lazy")) as running:
            assert running.json("GET", "/v1/memory/state")[1]["states"]["1.2"] == "remote"
            slow = pool.submit(running.json, "POST", COMPLETIONS, PROMPT | {"memory": "1.2"})
            assert eventually(lambda: any("1/2" in request for request in hub.requests))
            assert running.json("POST", COMPLETIONS, PROMPT | {"memory": "0.1"})[0] == 200
            status, answer = running.json("POST", COMPLETIONS, PROMPT | {"memory": "2.2"})
            assert (status, answer["error"]["code"]) == (503, "hub_unavailable")
            assert not slow.done()
            hub.released.set()
            status, answer = slow.result(30)
            assert (status, answer["memory"]["blocks"]) == (200, ["1", "1.2"])
            state = running.json("GET", "/v1/memory/state")[1]
            assert (state["states"]["1.2"], state["states"]["2.2"]) == ("in memory", "remote")
            assert state["remote_bytes"] > 0


# who may ask


def test_a_key_is_asked_for(locked: Running) -> None:
    assert locked.client.models.list().data[0].id == "tiny"
    for key in ("", "secret2", "schlüssel"):
        headers = {"Authorization": b"Bearer " + key.encode()}
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/v1/memory"), ("POST", CHAT)):
            status, names, content = locked.ask(method, path, headers=headers)  # type: ignore[arg-type]
            assert status == 401
            assert names["www-authenticate"] == "Bearer"
            assert json.loads(content)["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0).models.list()
    for path in ("/health", "/"):
        assert locked.ask("GET", path, headers={"Authorization": ""})[0] == 200
    assert locked.ask("GET", "/v1/models", headers={"Host": "model.example"})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "192.168.0.1", "["])
def test_without_a_key_the_host_is_this_machine(server: Running, host: str) -> None:
    for path in ("/v1/models", "/health", "/"):
        assert server.ask("GET", path, headers={"Host": host})[0] in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "LOCALHOST"])
def test_names_of_this_machine(server: Running, host: str) -> None:
    assert server.ask("GET", "/health", headers={"Host": host})[0] == 200


def test_web_pages_from_elsewhere(server: Running) -> None:
    own = server.url.removeprefix("http://")
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://["):
        headers = {"Origin": origin, "Host": own}
        status, names, _ = server.ask("POST", CHAT, HELLO, headers)
        assert status == 403
        assert "access-control-allow-origin" not in names
        assert server.ask("OPTIONS", CHAT, headers=headers)[0] == 403
    assert server.ask("POST", CHAT, HELLO, {"Origin": server.url, "Host": own})[0] == 200


def test_the_page(server: Running) -> None:
    status, headers, content = server.ask("GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert b"<html" in content
    status, headers, _ = server.ask("GET", "/page/page.js")
    assert status == 200
    assert "javascript" in headers["content-type"]
    assert server.ask("GET", "/page/..%2fapp.py")[0] == 404


def test_where_it_may_listen() -> None:
    with pytest.raises(HierMemError, match="no API key"):
        bind("0.0.0.0", 0, "")
    with bind("0.0.0.0", 0, "key") as listening:
        port = listening.getsockname()[1]
        assert address(listening) == f"http://127.0.0.1:{port}"
        with pytest.raises(HierMemError, match=f"port {port}"):
            bind("0.0.0.0", port, "key")
    with pytest.raises(HierMemError, match=r"cannot listen on nowhere\.invalid"):
        bind("nowhere.invalid", 0, "key")
    with bind("::1", 0, "") as listening:
        assert address(listening).startswith("http://[::1]:")


def test_batches_are_as_large_as_allowed(server: Running) -> None:
    assert server.engine.batch.max_sequences == 4
    assert isinstance(server.engine.batch, MemoryBatch)
