"""A Model Context Protocol server: a larger assistant asks a bank, or sees where a question would go.

The tools go through the same engine as OpenAI's API, so calls that come together are decoded together.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Annotated, Any

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import BaseModel, Field, ValidationError

from mlx_hiermem import __version__
from mlx_hiermem.apps.server.catalogue import Catalogue
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.generate import chat_jobs
from mlx_hiermem.apps.server.guard import Guard
from mlx_hiermem.apps.server.job import Job, Started
from mlx_hiermem.apps.server.memory import route as find_route
from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.schema import ChatRequest
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.source_search import Source

MEMORY = "fetched (by the question's own path), none, generic, or a path such as 3.1"


class Answer(BaseModel):
    """What the model said, and which part of its memory it said it with."""

    answer: str
    complete: bool = Field(description="false where the answer was cut off at max_tokens")
    memory: str = Field(description="the kind of memory that was used: fetched, none, generic, or a path")
    path: str = Field(description="where the question went in the memory's tree")
    topics: list[str] = Field(description="labels of the nodes on that path, the widest first")
    far: bool = Field(description="true where the question is like nothing in the memory, and none was used")


class SourceFound(BaseModel):
    """A sentence of the documents."""

    title: str
    document: str
    place: str
    sentence: str
    score: float = Field(description="0 to 1: how well it says the answer")


class SourcesFound(BaseModel):
    sources: list[SourceFound] = Field(description="best first; none where the documents do not say it")


class RouteFound(BaseModel):
    """Where a text goes in the memory's tree."""

    path: str
    topics: list[str] = Field(description="labels of the nodes on that path, the widest first")
    distances: list[float] = Field(description="from the text to each of these nodes")
    far: bool = Field(description="true where the text is like nothing in the memory")


def tools(engine: Engine, model: str) -> MCPServer:
    """The server's tools. The engine has been started; `model` is its first model's name."""
    about = f"Ask {model}, a small language model with a large memory of documents."
    server = MCPServer("mlx-hiermem", instructions=about, version=__version__, log_level="ERROR")

    @server.tool(description=f"Ask {model} one question. It answers from what it has learnt by heart.")
    async def ask(
        question: str,
        memory: Annotated[str, Field(description=MEMORY)] = "fetched",
        max_tokens: Annotated[int | None, Field(ge=1)] = None,
    ) -> Answer:
        engine.loop = asyncio.get_running_loop()
        body = {"messages": [{"role": "user", "content": question}], "memory": memory, "max_tokens": max_tokens}
        try:
            asked = ChatRequest.model_validate(body)
            (job,) = await asyncio.to_thread(chat_jobs, Catalogue(engine.models).find(""), asked)
            return await _answer(engine, job)
        except ValidationError as error:
            raise ToolError(str(error.errors()[0]["msg"])) from error
        except HierMemError as error:
            raise ToolError(str(error)) from error

    @server.tool(description="Which part of the memory a text leads to, without asking the model.")
    async def route(text: str) -> RouteFound:
        engine.loop = asyncio.get_running_loop()
        try:
            if engine.model.bank is None:
                raise ToolError("this model has no bank")
            found = await engine.call(lambda: find_route(engine, engine.model, [text], frozenset()))
        except HierMemError as error:
            raise ToolError(str(error)) from error
        names = ("path", "distances", "far")
        return RouteFound(topics=found["labels"], **{name: found[name] for name in names})

    @server.tool(description="Sentences of the documents that say an answer; without one, that suit a question.")
    async def sources(question: str, answer: str = "") -> SourcesFound:
        engine.loop = asyncio.get_running_loop()

        def find() -> tuple[Source, ...]:
            engine.refresh(engine.model)
            return engine.model.sources(question, answer)

        try:
            found = await engine.call(find)
        except HierMemError as error:
            raise ToolError(str(error)) from error
        return SourcesFound(sources=[SourceFound.model_validate(source.to_json()) for source in found])

    return server


async def _answer(engine: Engine, job: Job) -> Answer:
    engine.submit([job])
    text, memory, reason = "", dict[str, Any](), None
    try:
        while reason is None:
            _, event = await job.events.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Started):
                memory = event.memory
            else:
                text, reason = text + event.text, event.finish_reason
    finally:
        engine.cancel(job)
    return Answer(
        answer=text.strip(),
        complete=reason != "length",
        topics=memory["labels"],
        **{name: memory[name] for name in ("memory", "path", "far")},
    )


def serve_http(server: MCPServer, listening: socket.socket, api_key: str, max_request_bytes: int) -> None:
    """Answers at /mcp until SIGINT or SIGTERM, behind the same guard as OpenAI's API."""
    open_to_all = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # the guard does that
    app = server.streamable_http_app(transport_security=open_to_all)
    app.add_middleware(Guard, api_key, max_request_bytes, timeout=300.0)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])
