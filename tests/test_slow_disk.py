"""A model on a disk whose every read and write takes long: a chat and a server answer as on a quick one."""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from tiny import make_model
from torture.disk import can_fail, slowly
from torture.served import MAIN, served

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_fail(), reason="needs Linux and a C compiler")]
EACH = 0.05  # seconds
ASKED = "What is gold?\n/memory 0.2\nAnd neon?\n/memory generic\nAnd iron?\n"
MEMORIES = ("0.1", "0.2", "1.1", "generic", "none")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_model(tmp_path / "model")


def chat(folder: pathlib.Path, environment: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", MAIN, "chat", str(folder), "--memory", "0.1", "--max-tokens", "8"]
    result = subprocess.run(command, input=ASKED, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def answers(port: int) -> list[Any]:
    """One of each memory, with the blocks that came along; the last is a stream."""
    found = list[Any]()
    for memory in MEMORIES:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = {"prompt": "What is gold?", "max_tokens": 8, "memory": memory, "stream": memory == MEMORIES[-1]}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        lines = answer.read().decode().removesuffix("data: [DONE]\n\n").split("data: ")
        data = [json.loads(line) for line in lines if line.strip()]
        blocks = (data[0].get("memory") or {}).get("blocks")
        found.append(("".join(one["choices"][0]["text"] for one in data), blocks))
    return found


def test_a_chat(folder: pathlib.Path) -> None:
    quick = chat(folder, {})
    assert len(quick) >= 3
    assert chat(folder, slowly(folder, EACH)) == quick


def test_a_server(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder, tmp_path / "quick.txt") as server:
        quick = answers(server.port)
    for name, value in slowly(folder, EACH).items():
        monkeypatch.setenv(name, value)
    with served(folder, tmp_path / "slow.txt") as server:
        assert answers(server.port) == quick


def test_reads_do_take_longer(folder: pathlib.Path) -> None:
    code = "import sys, time; t = time.monotonic(); open(sys.argv[1], 'rb').read(); print(time.monotonic() - t)"
    command = [sys.executable, "-c", code, str(folder / "bank/bank.json")]
    took = subprocess.check_output(command, env=os.environ | slowly(folder, EACH))
    assert float(took) > EACH
