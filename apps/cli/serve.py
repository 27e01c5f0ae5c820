"""`hiermem serve`: the model for other programs, and a page to talk to it."""

from __future__ import annotations

import contextlib
import importlib
import pathlib

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, parse_size


def serve(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    host: str = typer.Option("127.0.0.1", help="Address to listen on; other machines need an API key."),
    port: int = typer.Option(8080, "--port", "-p", min=0, max=65535, help="0 takes one that is free."),
    api_key: str = typer.Option(
        "",
        envvar="HIERMEM_API_KEY",
        show_envvar=True,
        help="Asked of every client. Others can read a command line: better set the variable.",
    ),
    max_batch: int = typer.Option(8, min=1, help="Sequences that are decoded together."),
    max_queue: int = typer.Option(32, min=0, help="Sequences that may wait; one more is answered 503."),
    max_request_bytes: int = typer.Option(1_000_000, min=1, help="A larger request is answered 413."),
    timeout: float = typer.Option(300.0, min=0.1, help="Seconds that a request may take."),
    cache: str = typer.Option("512M", help="Memory for blocks: 500M, 2G."),
) -> None:
    """Serve a model to OpenAI's clients, and a page to chat and see its memory.

    Example: `hiermem serve my-model`
    """
    from mlx_hiermem.apps.server.address import address, bind

    _check_installed()
    name, cache_bytes = models.chosen(first_word, model), parse_size(cache, "--cache")
    with bind(host, port, api_key) as listening, contextlib.suppress(KeyboardInterrupt):
        with console.status(f"loading {name}"):
            from mlx_hiermem.apps.server import listen
            from mlx_hiermem.apps.server.app import Settings
            from mlx_hiermem.apps.server.engine import Engine
            from mlx_hiermem.model import load

            models.finish_removal(models.folder_of(name) / "bank")
            engine = Engine(lambda: load(name, cache_bytes=cache_bytes), max_batch, max_queue)
            engine.start()
        models.remember(name)
        settings = Settings(model_id(name), api_key, max_request_bytes, timeout)
        listen.serve(engine, settings, listening, lambda: announce(settings.model, address(listening)))


def _check_installed() -> None:
    """Raises MissingDependencyError without the extra `server`."""
    from mlx_hiermem.errors import MissingDependencyError

    for package in ("fastapi", "prometheus_client", "uvicorn"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"serving needs {package}", "pip install 'mlx-hiermem[server]' brings it."
            ) from error


def model_id(name: str) -> str:
    """What clients call the model: its hub id without the revision, or its folder's name."""
    folder = pathlib.Path(name)
    return folder.resolve().name if folder.is_dir() else name.partition("@")[0]


def announce(model: str, address: str) -> None:
    console.print(
        f"{model} at {address} (OpenAI's API at {address}/v1), Ctrl-C stops", markup=False, soft_wrap=True
    )
