"""The server's life: from the moment that it answers to a stop that lets running requests end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from mlx_hiermem.apps.server.app import Settings, create_app
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.refusal import ApiError

GRACE = 3.0  # seconds that running requests have to end when the server is stopped


def serve(engine: Engine, settings: Settings, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answers until SIGINT or SIGTERM; calls `ready` once it does. The engine has been started."""
    Server(engine, settings, ready).run(sockets=[listening])


class Server(uvicorn.Server):
    """uvicorn's, which says when it is ready, and tells requests that do not end in time that it stops."""

    def __init__(self, engine: Engine, settings: Settings, ready: Callable[[], None]) -> None:
        app = create_app(engine, settings)
        super().__init__(
            uvicorn.Config(
                app,
                log_level="info" if settings.log_requests else "warning",
                access_log=settings.log_requests,
                server_header=False,
                timeout_graceful_shutdown=int(GRACE) + 2,
            )
        )
        self.engine, self.ready = engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = ApiError(503, "the server is stopping", code="stopping")
        asyncio.get_running_loop().call_later(GRACE, self.engine.fail_open, stopping)
        await super().shutdown(sockets)
