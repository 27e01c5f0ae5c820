"""A writer beside a conversation: every reply comes with the blocks of before or of after, whole."""

from __future__ import annotations

import http.client
import json
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import load_tiny, make_model
from torture.served import served

from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.check import check
from mlx_hiermem.config import Path
from mlx_hiermem.session import Session

REPLIES = 40
WRITER = """
import contextlib, pathlib, sys
from mlx_hiermem.bank import edit
from mlx_hiermem.config import Path
from mlx_hiermem.errors import OutputError
root, block = map(pathlib.Path, sys.argv[1:])
print("ready", flush=True)
for number in range(10**9):
    source = block if number % 2 else root / "blocks/2/2.safetensors"
    with contextlib.suppress(OutputError):  # another writer is at it
        edit.add(root, source, Path((0, 1)), replacing=True)
    print(number, flush=True)
"""

BLOCKER = """
import contextlib, pathlib, sys, time
from mlx_hiermem.bank import edit
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
root = pathlib.Path(sys.argv[1])
print("ready", flush=True)
while True:
    for change in (edit.block, edit.unblock):
        with contextlib.suppress(HierMemError):  # another writer is at it, or was before
            change(root, [Path((0, 1))])
        time.sleep(0.02)
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_model(tmp_path / "model")


def reply(session: Session) -> str:
    session.reset()
    return "".join(session.ask("What is gold?"))


def test_nodes_that_are_blocked_and_opened_meanwhile(folder: pathlib.Path) -> None:
    session = Session(load_tiny(folder), max_tokens=3)
    said = reply(session)
    known, path = {session.selection.blocks: said}, session.selection.path
    edit.block(folder / "bank", [path])
    said = reply(session)
    known[session.selection.blocks] = said
    assert len(known) == 2
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            edit.unblock(folder / "bank", [path])
            edit.block(folder / "bank", [path])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(REPLIES):
            said = reply(session)
            assert known[session.selection.blocks] == said
    finally:
        stop.set()
        writer.join()
    assert list(check(MemoryBank.open(folder / "bank"))) == []


@pytest.mark.slow
def test_a_server_while_another_process_replaces_a_block_and_a_third_blocks_it(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Three processes at once. Each reply of two clients is one of the three right ones, with its blocks."""
    first, second = tmp_path / "first.safetensors", folder / "bank/blocks/2/2.safetensors"
    first.write_bytes((folder / "bank/blocks/0/1.safetensors").read_bytes())

    def ask(port: int) -> tuple[str, ...]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": "What is gold?", "max_tokens": 6, "memory": "0.1"}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = json.loads(answer.read())
        if answer.status != 200:
            return str(answer.status), data["error"]["message"].split(" (")[0]
        return data["choices"][0]["text"], *data["memory"]["blocks"]

    with served(folder, tmp_path / "log.txt") as server:
        known = {ask(server.port)}
        edit.add(folder / "bank", second, Path((0, 1)), replacing=True)
        known.add(ask(server.port))
        edit.block(folder / "bank", [Path((0, 1))])
        known.add(ask(server.port))
        assert len(known) == 3
        edit.unblock(folder / "bank", [Path((0, 1))])
        writers = [
            subprocess.Popen([sys.executable, "-c", code, str(folder / "bank"), str(first)], stdout=-1, text=True)
            for code in (WRITER, BLOCKER)
        ]
        try:
            for writer in writers:
                assert writer.stdout
                assert writer.stdout.readline() == "ready\n"
            said, end = set[tuple[str, ...]](), time.monotonic() + 60
            with ThreadPoolExecutor(2) as clients:
                while len(said) < 2 and time.monotonic() < end:  # a quick server may be ahead of the writers
                    said.update(clients.map(lambda _: ask(server.port), range(REPLIES)))
            assert [writer.poll() for writer in writers] == [None, None]
        finally:
            for writer in writers:
                writer.kill()
                writer.communicate()
    assert said <= known
    assert len(said) > 1, "nothing was changed meanwhile"
    edit.block(folder / "bank", [Path((0, 1))])  # ends a change that a killed writer left
    assert list(check(MemoryBank.open(folder / "bank"))) == []


@pytest.mark.slow
def test_a_block_that_another_process_replaces_meanwhile(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Both blocks' replies come, and no other: a block is never half of each."""
    first, second = tmp_path / "first.safetensors", folder / "bank/blocks/2/2.safetensors"
    first.write_bytes((folder / "bank/blocks/0/1.safetensors").read_bytes())
    session = Session(load_tiny(folder), "0.1", max_tokens=6)
    known = {reply(session)}
    edit.add(folder / "bank", second, Path((0, 1)), replacing=True)
    known.add(reply(session))
    assert len(known) == 2
    command = [sys.executable, "-c", WRITER, str(folder / "bank"), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        try:
            said = {reply(session) for _ in range(REPLIES)}
        finally:
            writer.kill()
    assert said <= known
    edit.unblock(folder / "bank", [])  # the next change finishes what the kill interrupted
    assert list(check(MemoryBank.open(folder / "bank"))) == []
