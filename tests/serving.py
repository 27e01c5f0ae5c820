"""A real server on 127.0.0.1 over a tiny model, and clients of it, for the tests of the server."""

from __future__ import annotations

import http.client
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import openai
import pytest
from tiny import load_tiny

from mlx_hiermem.apps.server.address import address, bind
from mlx_hiermem.apps.server.app import Settings
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.listen import Server
from mlx_hiermem.batch import MemoryBatch, Token
from mlx_hiermem.model import MemoryModel

CONTEXT = 250  # tokens; a tiny model's token is a byte


def tiny_model(folder: pathlib.Path) -> MemoryModel:
    """With an embedder that needs no weights, and a context with an end."""
    model = load_tiny(folder)
    model.config["max_position_embeddings"] = CONTEXT
    return model


@dataclass
class Running:
    """A server that answers."""

    engine: Engine
    server: Server
    url: str
    api_key: str

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key or "none", max_retries=0, timeout=60)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one plain HTTP request; a body that is not bytes is sent as JSON."""
        sent = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if body is not None and not isinstance(body, bytes):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        connection = self.connect()
        try:
            connection.request(method, path, body, sent | (headers or {}))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, names, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The status and the JSON of an answer."""
        status, _, content = self.ask(method, path, body, headers)
        return status, json.loads(content)


@contextmanager
def serving(
    load_model: Callable[[], MemoryModel | dict[str, MemoryModel]],
    api_key: str = "",
    max_batch: int = 4,
    max_queue: int = 8,
    max_request_bytes: int = 100_000,
    timeout: float = 30.0,
    name: str = "tiny",
    **more: Any,
) -> Iterator[Running]:
    """`load_model` gives one model, or several by name; `more` are other settings."""

    def load_all() -> dict[str, MemoryModel]:
        loaded = load_model()
        return loaded if isinstance(loaded, dict) else {name: loaded}

    engine = Engine(load_all, max_batch, max_queue)
    engine.start()
    ready = threading.Event()
    with bind("127.0.0.1", 0, api_key) as listening:
        url = address(listening)
        server = Server(engine, Settings(api_key, max_request_bytes, timeout, **more), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(30)
        try:
            yield Running(engine, server, url, api_key)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


class Gate:
    """Decoding waits at a gate: `let` so many steps through, or `open` it. A step may be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed = threading.Semaphore(0)
        self.error: BaseException | None = None  # raised by the next step
        real = MemoryBatch.step

        def step(batch: MemoryBatch) -> list[Token]:
            self.allowed.acquire(timeout=30)
            if self.error:
                error, self.error = self.error, None
                raise error
            return real(batch)

        monkeypatch.setattr(MemoryBatch, "step", step)

    def let(self, steps: int) -> None:
        self.allowed.release(steps)

    def open(self) -> None:
        self.let(1_000_000)


def events(content: bytes) -> list[Any]:
    """The data of server-sent events; [DONE] as None."""
    blocks = [block for block in content.decode().split("\n\n") if block]
    rows = [
        line.removeprefix("data: ") for block in blocks for line in block.split("\n") if line.startswith("data: ")
    ]
    return [None if row == "[DONE]" else json.loads(row) for row in rows]


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it comes true within a time."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if holds():
            return True
        waiting.wait(0.01)
    return holds()
