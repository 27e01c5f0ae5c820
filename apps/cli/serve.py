"""`hiermem serve`: the model for other programs, and a page to talk to it."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models, sampling
from mlx_hiermem.apps.cli.display import console, parse_size

if TYPE_CHECKING:
    from mlx_hiermem.model import MemoryModel


def serve(
    words: list[str] = typer.Argument(
        None, metavar="[MODEL]...", help="The model, as with `-m`; or several. Banks of one anchor share it."
    ),
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
    max_tokens: int = typer.Option(
        0, "--max-tokens", "-n", min=0, help="Longest reply where a request has none; 0: chat 512, completion 16."
    ),
    temperature: float = sampling.TEMPERATURE,
    top_p: float = sampling.TOP_P,
    top_k: int = sampling.TOP_K,
    min_p: float = sampling.MIN_P,
    repetition_penalty: float = sampling.REPETITION_PENALTY,
    presence_penalty: float = sampling.PRESENCE_PENALTY,
    frequency_penalty: float = sampling.FREQUENCY_PENALTY,
    chat_template_args: str = sampling.TEMPLATE,
    cache: str = typer.Option("512M", help="Memory for each model's blocks: 500M, 2G."),
    any_model: bool = typer.Option(
        False, "--any-model", help="Answer whatever model a client names, for programs with a name built in."
    ),
    allow_loading: bool = typer.Option(
        False, "--allow-loading", help="Let clients load and unload banks (`/v1/banks/load`, `unload`)."
    ),
    log_requests: bool = typer.Option(
        False, "--log-requests", help="Print a line for each request; what was asked is never in it."
    ),
    watch: list[pathlib.Path] | None = typer.Option(
        None, metavar="OUT", help="Show on the page how far `hiermem learn DOCS OUT` is. May be repeated."
    ),
) -> None:
    """Serve a model to OpenAI's clients, and a page to chat and see its memory.

    Example: `hiermem serve my-model`

    Example: `hiermem serve my-model my-other-model --any-model`

    The options on sampling and length are defaults, for requests that do not set them.
    """
    from mlx_hiermem.apps.server.address import address, bind
    from mlx_hiermem.apps.server.left_behind import has_served

    check_installed()
    defaults = sampling.changed(locals()) | ({"max_tokens": max_tokens} if max_tokens else {})
    if template := sampling.template_args(chat_template_args):
        defaults["chat_template_kwargs"] = template
    first, *more = words or [""]
    names, cache_bytes = [models.chosen(first, model), *more], parse_size(cache, "--cache")
    with bind(host, port, api_key) as listening, contextlib.suppress(KeyboardInterrupt):
        with console.status(f"loading {', '.join(names)}"):
            from mlx_hiermem.apps.server import listen
            from mlx_hiermem.apps.server.app import Settings
            from mlx_hiermem.apps.server.engine import Engine

            for name in names:
                models.finish_removal(models.folder_of(name) / "bank")
            engine = Engine(lambda: load_all(names, cache_bytes), max_batch, max_queue)
            engine.start()
        models.remember(names[0])
        settings = Settings(
            api_key,
            max_request_bytes,
            timeout,
            any_model,
            allow_loading,
            cache_bytes,
            defaults,
            log_requests,
            watch or (),
        )
        listen.serve(engine, settings, listening, lambda: announce(", ".join(engine.models), address(listening)))
    has_served()


def check_installed(*more: str) -> None:
    """Raises MissingDependencyError without the extra `server`."""
    from mlx_hiermem.errors import MissingDependencyError

    for package in ("fastapi", "prometheus_client", "uvicorn", *more):
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


def load_all(names: list[str], cache_bytes: int) -> dict[str, MemoryModel]:
    """The models by what clients call them; those of one anchor share it. Raises ArgumentError for a name twice."""
    from mlx_hiermem.errors import ArgumentError
    from mlx_hiermem.model_folder import load

    loaded: dict[str, MemoryModel] = {}
    for name in names:
        called = model_id(name)
        if called in loaded:
            raise ArgumentError(f"two models are called {called}", "Rename one of the folders.")
        loaded[called] = load(name, cache_bytes=cache_bytes, beside=loaded.values())
    return loaded


def announce(model: str, address: str) -> None:
    console.print(
        f"{model} at {address} (OpenAI's API at {address}/v1), Ctrl-C stops", markup=False, soft_wrap=True
    )
