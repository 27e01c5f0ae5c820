"""A `hiermem serve` in a process of its own over a tiny model, for campaigns against it."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tiny import CONFIG, LLAMA, make_anchor, make_bank

from mlx_hiermem.config import MemoryConfig

MAIN = "from mlx_hiermem.apps.cli.main import main; main()"
CONTEXT = 1024  # tokens; a tiny model's token is a byte


@dataclass(frozen=True)
class Served:
    """A server that answers. `log` is all that it prints."""

    pid: int
    port: int
    log: pathlib.Path


def make_served(folder: pathlib.Path, config: MemoryConfig = CONFIG) -> pathlib.Path:
    """A tiny model whose context has an end."""
    anchor = make_anchor(folder / "anchor", config=LLAMA | {"max_position_embeddings": CONTEXT})
    make_bank(folder / "bank", anchor, config)
    return folder


@contextmanager
def served(model: pathlib.Path, log: pathlib.Path, *options: str) -> Iterator[Served]:
    """Raises AssertionError where the server does not end well when it is stopped."""
    command = [sys.executable, "-c", MAIN, "serve", str(model), "--port", "0", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+) ", log.read_text(errors="replace"))):
            assert process.poll() is None, f"the server says {log.read_text()!r}"
            time.sleep(0.1)
        yield Served(process.pid, int(found[1]), log)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, f"the server ended with {process.returncode}"
    finally:
        process.kill()
        process.wait()


def resident(pid: int | str = "self") -> int:
    """Bytes of a process that are in memory now, what is mapped included."""
    status = pathlib.Path(f"/proc/{pid}/status")
    if status.exists():
        return int(status.read_text().split("VmRSS:")[1].split()[0]) << 10
    number = str(os.getpid() if pid == "self" else pid)
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", number])) << 10


def request(path: str, body: object, close: bool = True) -> bytes:
    """The bytes of a POST."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(sent)}", f"Connection: {'close' if close else 'keep-alive'}", "", ""]
    return "\r\n".join(lines).encode() + sent
