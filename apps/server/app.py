"""The routes: OpenAI's, the memory's, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from mlx_hiermem import __version__
from mlx_hiermem.apps.server import memory
from mlx_hiermem.apps.server.banks import banks, learning
from mlx_hiermem.apps.server.catalogue import Catalogue
from mlx_hiermem.apps.server.embeddings import embed
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.generate import Service
from mlx_hiermem.apps.server.guard import Guard, refused
from mlx_hiermem.apps.server.items import ResponsesRequest
from mlx_hiermem.apps.server.metrics import Counting, Metrics
from mlx_hiermem.apps.server.refusal import ApiError, in_time
from mlx_hiermem.apps.server.responses import Responses
from mlx_hiermem.apps.server.schema import (
    ABOUT,
    REFUSED,
    STREAMED,
    TEXT,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadRequest,
    RouteRequest,
    UnloadRequest,
    paths,
)
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.model_folder import load

# Resolved, because an editable install links each file, and StaticFiles follows no links.
PAGE = pathlib.Path(__file__).resolve().parent / "page"


@dataclass(frozen=True)
class Settings:
    """Of one server; without `api_key` only this machine is answered."""

    api_key: str = ""
    max_request_bytes: int = 1_000_000
    timeout: float = 300.0  # seconds a request may take
    any_model: bool = False  # answer whatever model's name a program has built in
    allow_loading: bool = False  # clients may load and unload banks: files of this machine, by their path
    cache_bytes: int = 512 << 20  # of a bank that is loaded
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of requests' fields
    log_requests: bool = False  # a line for each: the client, the path, the status; never what was asked
    watch: Sequence[pathlib.Path] = ()  # folders that `hiermem learn` is making


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application for an engine that has been started. It stops the engine when it is shut down itself."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.loop = asyncio.get_running_loop()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="mlx-hiermem",
        description=ABOUT,
        version=__version__,
        responses=REFUSED,
        lifespan=lifespan,
        docs_url=None,  # it would bring scripts from elsewhere
        redoc_url=None,
    )
    metrics = Metrics(engine)
    app.add_middleware(Guard, settings.api_key, settings.max_request_bytes, settings.timeout)
    app.add_middleware(Counting, metrics)
    _add_openai(app, Service(engine, metrics, settings.any_model, settings.timeout, settings.defaults))
    _add_memory(app, engine, settings)
    _add_banks(app, engine, settings)
    _add_others(app, engine, metrics, settings)
    _add_errors(app)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    # These two look for files: on a thread of their own.
    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": service.catalogue.rows()}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return service.catalogue.row(service.catalogue.find(name))

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await service.chat(asked, request)

    responses = Responses(service)

    @app.post("/v1/responses", responses=STREAMED)
    async def respond(asked: ResponsesRequest, request: Request) -> Response:
        return await responses.answer(asked, request)

    @app.get("/v1/responses/{name}")
    async def response(name: str) -> dict[str, Any]:
        return responses.stored.get(name)[1]

    @app.delete("/v1/responses/{name}")
    async def delete_response(name: str) -> dict[str, Any]:
        responses.stored.drop(name)
        return {"id": name, "object": "response", "deleted": True}

    @app.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest) -> dict[str, Any]:
        return await embed(service.engine, service.catalogue, asked, service.timeout)

    @app.post("/v1/completions", responses=STREAMED)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await service.complete(asked, request)


def _add_memory(app: FastAPI, engine: Engine, settings: Settings) -> None:
    # These two look for files: on a thread of their own.
    @app.get("/v1/memory")
    def overview(model: str = "") -> dict[str, Any]:
        named = Catalogue(engine.models, settings.any_model).find(model)
        return memory.overview(named.stem, named.model)

    @app.get("/v1/memory/state")
    def changing(model: str = "") -> dict[str, Any]:
        return memory.changing(engine, Catalogue(engine.models, settings.any_model).find(model).model)

    @app.get("/v1/memory/passages")
    async def passages(path: str, model: str = "") -> dict[str, Any]:
        found = Catalogue(engine.models, settings.any_model).find(model).model
        (leaf,) = paths([path], "path")

        def read() -> dict[str, Any]:
            engine.refresh(found)
            if found.bank is None:
                raise ApiError(400, "this model has no bank")
            return memory.passages(found.bank, leaf)

        async with in_time(settings.timeout):
            return await engine.call(read)

    @app.post("/v1/memory/route")
    async def route(asked: RouteRequest) -> dict[str, Any]:
        model = Catalogue(engine.models, settings.any_model).find(asked.model).model
        questions, blocked = asked.questions, paths(asked.blocked, "blocked")
        if model.bank is None:
            raise ApiError(400, "this model has no bank")
        if not questions:
            raise ApiError(
                400, "there is nothing to route; give a text, or messages with one of the user's", "text"
            )
        async with in_time(settings.timeout):
            return await engine.call(lambda: memory.route(engine, model, questions, blocked))


def _add_banks(app: FastAPI, engine: Engine, settings: Settings) -> None:
    """In the manner of vLLM's load_lora_adapter. Which names there are is looked at on the engine's thread: of two
    requests at once, the second sees what the first has done."""

    @app.get("/v1/banks")
    def listed() -> dict[str, Any]:  # it looks for files: on a thread of its own
        return banks(engine.models, settings.allow_loading)

    if not settings.allow_loading:
        return

    @app.post("/v1/banks/load")
    async def load_bank(asked: LoadRequest) -> dict[str, Any]:
        def run() -> None:
            if asked.name in engine.models:
                raise ApiError(400, f"there is a model '{asked.name}' already; unload it first", "name")
            engine.serve(
                asked.name, load(asked.path, cache_bytes=settings.cache_bytes, beside=engine.models.values())
            )

        await engine.call(run)
        return {"loaded": asked.name}

    @app.post("/v1/banks/unload")
    async def unload_bank(asked: UnloadRequest) -> dict[str, Any]:
        def run() -> None:
            if asked.name not in engine.models:
                raise ApiError(404, f"there is no model '{asked.name}' here", "name", "model_not_found")
            if len(engine.models) == 1:
                raise ApiError(400, "the only model stays; load another one first", "name")
            engine.drop(asked.name)

        await engine.call(run)
        return {"unloaded": asked.name}


def _add_others(app: FastAPI, engine: Engine, metrics: Metrics, settings: Settings) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if engine.alive else "the engine has stopped"
        return JSONResponse({"status": status, "model": next(iter(engine.models))}, 200 if engine.alive else 503)

    @app.get("/v1/learning")
    def learning_runs() -> dict[str, Any]:
        return learning(settings.watch, engine.models, settings.allow_loading)

    @app.get("/metrics", response_class=PlainTextResponse, responses=TEXT)
    async def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))


def _add_errors(app: FastAPI) -> None:
    """Every error is answered in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> JSONResponse:
        return refused(error)

    @app.exception_handler(HierMemError)
    async def wrong(_: Request, error: HierMemError) -> JSONResponse:
        return refused(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refused(explained(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ApiError):
            return refused(error.__cause__)
        message = error.detail
        if error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path}"
        answer = refused(ApiError(error.status_code, message))
        answer.headers.update(error.headers or {})
        if error.status_code == 405:  # Starlette names the methods of the first route of this path alone
            answer.headers["Allow"] = ", ".join(sorted(_methods(request)))
        return answer

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        message = f"unexpected {type(error).__name__}; the server's log has more"
        return refused(ApiError(500, message, code="internal_error"))


def _methods(request: Request) -> set[str]:
    """What may be done with a request's path."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes for method in getattr(route, "methods", None) or ()}


def explained(invalid: RequestValidationError) -> ApiError:
    """The first of pydantic's findings in one line, with the field's name as OpenAI writes it."""
    first = invalid.errors()[0]
    place, kind = first["loc"][1:], first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if not place and kind in ("missing", "model_attributes_type"):
        return ApiError(400, "the body is not a JSON object; send one with Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        return ApiError(400, message)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {name}", name, "unknown_parameter")
    return ApiError(400, f"{name}: {message}", name)
