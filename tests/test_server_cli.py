"""`hiermem serve` as its user meets it: the line that it prints, Ctrl-C, errors of one line."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tiny import make_model

from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.apps.cli.serve import model_id

MAIN = "from mlx_hiermem.apps.cli.main import main; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_model(tmp_path_factory.mktemp("serve") / "tiny")


@contextmanager
def started(*arguments: str | pathlib.Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", MAIN, "serve", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | variables) as process:
        try:
            yield process
        finally:
            process.kill()


def failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | pathlib.Path
) -> str:
    """The one line that the command fails with."""
    monkeypatch.delenv("HIERMEM_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["hiermem", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, error = capsys.readouterr()
    assert (ended.value.code, out, error.count("\n")) == (1, "", 1)
    assert error.startswith("hiermem: ")
    return error


@pytest.mark.slow
def test_it_serves_until_ctrl_c(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with started(model, "--port", "0", HIERMEM_API_KEY="secret") as process:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"^tiny at (http://127\.0\.0\.1:\d+) ", line)
        assert found
        body = json.dumps({"prompt": "hello", "max_tokens": 4}).encode()
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{found[1]}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            reply = json.load(answer)
        assert reply["usage"]["completion_tokens"] <= 4
        assert reply["memory"]["memory"] == "fetched"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (0, "", "")


# An engine whose step never ends, as on a disk that is gone, is stopped; then the command ends.
NEVER_ENDS = """
import sys, time
import mlx.core as mx
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.apps.server.engine import Engine
engine = Engine(dict)
engine.start()
begun = []
def step():
    while True:
        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
        begun.append(True)
engine._inbox.put(step)
while not begun:
    time.sleep(0.01)
engine.stop(0)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["bank", "ls", "nowhere"], 1)])
def test_a_step_that_does_not_end_is_left_behind(arguments: list[str], status: int) -> None:
    command = [sys.executable, "-c", NEVER_ENDS, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("logged", [False, True])
def test_what_is_asked_is_in_no_log(model: pathlib.Path, logged: bool) -> None:
    """Answered, refused by a schema, by a length, by the template and by the engine; in the path's query, too."""
    secret = "xylophone"
    asked: list[tuple[str, object]] = [
        ("/v1/completions", {"prompt": secret, "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": secret, "content": secret}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}], secret: secret}),
        ("/v1/completions", {"prompt": secret, "memory": secret}),
        ("/v1/completions", {"prompt": secret * 200_000}),
        ("/v1/responses", {"input": secret, "previous_response_id": secret}),
        ("/v1/embeddings", {"input": secret, "dimensions": 3}),
        ("/v1/memory/route", {"text": secret}),
    ]
    with started(model, "--port", "0", *["--log-requests"] * logged) as process:
        assert process.stdout
        while not (found := re.search(r" at (http://127\.0\.0\.1:\d+) ", process.stdout.readline())):
            pass
        for path, body in asked:
            request = urllib.request.Request(
                f"{found[1]}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert secret not in out + error
    assert ("POST /v1/chat/completions" in out + error) is logged


def test_what_cannot_be_served(
    model: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: str | pathlib.Path) -> str:
        return failure(monkeypatch, capsys, *arguments)

    assert "there is no model at nowhere" in fails("nowhere", "--port", "0")
    assert "0.0.0.0 can be reached from other machines" in fails(model, "--host", "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use. " in fails(model, "--port", port)
    (model / "anchor" / "tokenizer.json").rename(model / "anchor" / "hidden.json")
    assert "this anchor has no tokenizer" in fails(model, "--port", "0")
    (model / "anchor" / "hidden.json").rename(model / "anchor" / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'mlx-hiermem[server]'" in fails(model)


def test_what_a_model_is_called(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_id("me/elements") == "me/elements"
    assert model_id("me/elements@v1") == "me/elements"
    assert model_id(f"{model}/") == "tiny"
    monkeypatch.chdir(model)
    assert model_id(".") == "tiny"
