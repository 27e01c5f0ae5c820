"""`hiermem mcp`: a model as tools of a larger assistant, over the Model Context Protocol."""

from __future__ import annotations

import contextlib

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import notes, parse_size
from mlx_hiermem.apps.cli.serve import check_installed, model_id


def mcp(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    http: bool = typer.Option(False, "--http", help="Serve over HTTP at /mcp, not over standard input."),
    host: str = typer.Option("127.0.0.1", help="With --http: where to listen; other machines need an API key."),
    port: int = typer.Option(8081, "--port", "-p", min=0, max=65535, help="With --http; 0 takes one that is free."),
    api_key: str = typer.Option(
        "", envvar="HIERMEM_API_KEY", show_envvar=True, help="With --http: asked of every client."
    ),
    max_batch: int = typer.Option(8, min=1, help="Calls that are decoded together."),
    cache: str = typer.Option("512M", help="Memory for blocks: 500M, 2G."),
) -> None:
    """Offer a model to an assistant as tools: ask it, and see where a text goes in its memory.

    Example: `hiermem mcp my-model`
    """
    from mlx_hiermem.apps.server.left_behind import has_served

    check_installed("mcp")
    name, cache_bytes = models.chosen(first_word, model), parse_size(cache, "--cache")
    with contextlib.ExitStack() as stack:
        if http:
            from mlx_hiermem.apps.server.address import address, bind

            listening = stack.enter_context(bind(host, port, api_key))
        with notes.status(f"loading {name}"):
            from mlx_hiermem.apps.server.engine import Engine
            from mlx_hiermem.apps.server.mcp import serve_http, tools
            from mlx_hiermem.model_folder import load

            called = model_id(name)
            engine = Engine(lambda: {called: load(name, cache_bytes=cache_bytes)}, max_batch)
            engine.start()
        models.remember(name)
        stack.callback(engine.stop)
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        server = tools(engine, called)
        if http:
            # Standard output belongs to the protocol where that goes over it; here nothing else does.
            notes.print(f"{called} at {address(listening)}/mcp, Ctrl-C stops", markup=False, soft_wrap=True)
            serve_http(server, listening, api_key, max_request_bytes=1_000_000)
        else:
            server.run("stdio")
    has_served()
