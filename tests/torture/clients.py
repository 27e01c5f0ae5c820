"""Many clients of one `hiermem serve`, some of whom behave badly, and whether each of the others gets its due.

    python tests/torture/clients.py --clients 200 --requests 3 --out benchmarks/results/clients.json
    python tests/torture/clients.py --beside 12 --out benchmarks/results/waits.json

Each question is asked alone first. Then all clients ask at once: most of them plainly or as a stream; some read
their stream slowly, hang up in the middle of it, or send what is far too large. Every reply must be the one given
alone, everything too large be refused, and everybody be answered; what is asked must be nowhere in the log. Who is
refused because the queue is full (503) asks again. The second line measures how long those who behave well wait
beside each kind of others, in times of what they wait without.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pathlib
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).parents[1])]

from torture.served import make_served, request, resident, served  # noqa: E402

CHAT = "/v1/chat/completions"
SECRET = "xylophone"  # in every question
TOKENS = 24
LONGEST = 600.0  # seconds after which an answer counts as lost
KINDS = ("plain", "stream", "slow", "hangs up", "too large", "too long")
WEIGHTS = (40, 30, 10, 10, 5, 5)
WELL, MANY = 8, 20  # clients who behave well, and others beside them
LONG = 900  # bytes of a prompt that just fits, each of which is a token
MEMORIES = ("none", "generic", "0.1", "2.2", "1", "fetched")


def cases() -> list[dict[str, Any]]:
    """Requests that each have one right reply."""
    rows = []
    for number in range(24):
        question = [{"role": "user", "content": f"{SECRET} number {number}?"}]
        row = {"messages": question, "memory": MEMORIES[number % len(MEMORIES)], "max_tokens": TOKENS}
        rows.append(row | ({"temperature": 1.0, "seed": number} if number % 2 else {}))
    return rows


@dataclass
class Found:
    """What came of a campaign. `waited` are the seconds of those who behave well."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)


async def answer(port: int, body: object, slowly: bool = False, bytes_read: int = -1) -> tuple[int, bytes]:
    """(status, body) of a POST; of no more than so many bytes, after which the client hangs up."""
    sock = socket.socket()
    if slowly:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 12)
    try:
        writer.write(request(CHAT, body))
        with contextlib.suppress(ConnectionError):  # it may have answered, and closed, before all was sent
            await writer.drain()
        if bytes_read >= 0:
            await reader.read(bytes_read)
            return 0, b""
        data = b""
        while piece := await reader.read(200 if slowly else 1 << 16):
            data += piece
            await asyncio.sleep(0.05 if slowly else 0)
    finally:
        writer.close()
    head, _, content = data.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        content = unchunked(content)
    return int(head.split(b" ", 2)[1]), content


def unchunked(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        out, data = out + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return out


def said(content: bytes, stream: bool) -> str:
    """The reply's text; raises ValueError or KeyError where the answer is not whole."""
    if not stream:
        return str(json.loads(content)["choices"][0]["message"]["content"])
    rows = [line.removeprefix("data: ") for line in content.decode().split("\n") if line.startswith("data: ")]
    if rows[-1] != "[DONE]":
        raise ValueError("the stream does not end")
    choices = [choice for row in rows[:-1] for choice in json.loads(row)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def client(port: int, rng: random.Random, requests: int, right: list[str], found: Found) -> None:
    for _ in range(requests):
        (kind,) = rng.choices(KINDS, WEIGHTS)
        try:
            async with asyncio.timeout(LONGEST):
                wrong = await _one(port, rng, kind, right, found)
        except Exception as error:
            wrong = f"lost: {type(error).__name__} {error}"
        found.counts[kind] += 1
        found.wrong += [f"{kind}: {wrong}"] if wrong else []


async def _one(port: int, rng: random.Random, kind: str, right: list[str], found: Found) -> str:
    """What is wrong with one request's answer; empty where it is right."""
    number = rng.randrange(len(right))
    body, stream, begun = cases()[number], kind in ("stream", "slow", "hangs up"), time.monotonic()
    if kind in ("too large", "too long"):
        body["messages"][0]["content"] = SECRET * (200_000 if kind == "too large" else 5000)
        status, content = await answer(port, body)
        wanted = 413 if kind == "too large" else 400
        return "" if status == wanted else f"answered {status} {content[:200]!r}"
    while True:
        if kind == "hangs up":
            await answer(port, body | {"stream": True}, bytes_read=rng.choice((0, 1, 300, 2000)))
            return ""
        status, content = await answer(port, body | {"stream": stream}, slowly=kind == "slow")
        if status != 503:
            break
        found.counts["asked again"] += 1
        await asyncio.sleep(0.2 + rng.random())
    if kind != "slow":
        found.waited.append(time.monotonic() - begun)
    if status != 200:
        return f"answered {status} {content[:200]!r}"
    return "" if said(content, stream) == right[number] else "another reply than alone"


async def alone(port: int) -> tuple[list[str], float]:
    """Each case's reply, one after the other, and the seconds that they took."""
    replies, begun = [], time.monotonic()
    for case in cases():
        status, content = await answer(port, case)
        assert status == 200, content
        replies.append(said(content, False))
    return replies, time.monotonic() - begun


async def together(port: int, right: list[str], rounds: int) -> float:
    """The seconds of all cases at once, each so often; raises AssertionError for another reply."""
    begun = time.monotonic()
    answers = await asyncio.gather(*(answer(port, case) for case in cases() * rounds))
    for number, (status, content) in enumerate(answers):
        assert status == 200, content
        assert said(content, False) == right[number % len(right)]
    return (time.monotonic() - begun) / rounds


async def asking(port: int, right: list[str], requests: int) -> list[float]:
    """The seconds of each answer of WELL clients who ask one question after another."""

    async def one(number: int) -> list[float]:
        seconds = list[float]()
        for place in range(requests):
            which, begun = (number * requests + place) % len(right), time.monotonic()
            while (answered := await answer(port, cases()[which]))[0] == 503:
                await asyncio.sleep(0.1)
            assert said(answered[1], False) == right[which], "another reply than alone"
            seconds.append(time.monotonic() - begun)
        return seconds

    return sorted(chain.from_iterable(await asyncio.gather(*(one(number) for number in range(WELL)))))


async def beside(port: int, right: list[str], requests: int) -> dict[str, Any]:
    """How long those who behave well wait for an answer alone, and with each kind of others beside them.

    The others ask again as soon as they are answered, so that there are always so many of them.
    """
    long = {"messages": [{"role": "user", "content": SECRET * (LONG // len(SECRET))}], "max_tokens": 1}
    large = {"messages": [{"role": "user", "content": SECRET * 200_000}]}
    others: dict[str, list[tuple[dict[str, Any], bool]]] = {
        "alone": [],
        f"beside {MANY} more of them": [(case, False) for case in (cases() * MANY)[:MANY]],
        f"beside {MANY} who read their stream slowly": [(case | {"stream": True}, True) for case in cases()[:MANY]],
        f"beside {MANY} with prompts that fill the context": [(long, False)] * MANY,
        f"beside {MANY} with bodies of 1.8 MB": [(large, False)] * MANY,
    }

    async def on_and_on(body: dict[str, Any], slowly: bool) -> None:
        while True:
            status, _ = await answer(port, body, slowly)
            await asyncio.sleep(0.1 if status == 503 else 0)

    found = dict[str, Any]()
    for name, bodies in others.items():
        tasks = [asyncio.create_task(on_and_on(body, slowly)) for body, slowly in bodies]
        await asyncio.sleep(1.0 if tasks else 0)
        waited = await asking(port, right, requests)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
        row = {"median": statistics.median(waited), "95 %": waited[int(len(waited) * 0.95)], "longest": waited[-1]}
        quiet = found["alone"]["seconds"] if found else row
        times = {key: round(row[key] / quiet[key], 1) for key in row}
        found[name] = {"seconds": {key: round(value, 3) for key, value in row.items()}, "times": times}
        found[name]["answers"] = len(waited)
    return found


async def campaign(port: int, pid: int, asked: argparse.Namespace) -> dict[str, Any]:
    await alone(port)  # which loads and compiles what the first requests need
    right, seconds = await alone(port)
    batched, found, before = await together(port, right, 1), Found(), resident(pid)
    rngs = [random.Random(f"{asked.seed} {number}") for number in range(asked.clients)]
    begun = time.monotonic()
    await asyncio.gather(*(client(port, rng, asked.requests, right, found) for rng in rngs))
    took = time.monotonic() - begun
    again, _ = await alone(port)
    found.wrong += [] if again == right else ["after all that, a reply alone is another one"]
    waited = sorted(found.waited)
    return {
        "clients": asked.clients,
        "requests": asked.clients * asked.requests,
        "counts": dict(found.counts),
        "wrong": found.wrong[:20],
        "seconds": round(took, 1),
        "seconds of an answer": {
            "median": round(statistics.median(waited), 2),
            "95 %": round(waited[int(len(waited) * 0.95)], 2),
            "longest": round(waited[-1], 2),
        },
        "tokens per second": {
            "one at a time": round(len(right) * TOKENS / seconds, 1),
            "together": round(len(right) * TOKENS / batched, 1),
        },
        "grown by MB": round((resident(pid) - before) / 1e6, 1),
    }


async def waits(port: int, requests: int) -> dict[str, Any]:
    await alone(port)
    right, _ = await alone(port)
    return {"waits": await beside(port, right, requests), "wrong": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", type=int, default=0, help="only how long good clients wait beside bad ones")
    parser.add_argument("--out", type=pathlib.Path, help="figures as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        log = pathlib.Path(name) / "log.txt"
        with served(make_served(pathlib.Path(name) / "model"), log) as server:
            run = waits(server.port, asked.beside) if asked.beside else campaign(server.port, server.pid, asked)
            row = asyncio.run(run)
        row["in the log"] = log.read_text(errors="replace").count(SECRET)
        row["log"] = log.read_text(errors="replace")[:1000]
    print(json.dumps(row, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(row | {"seed": asked.seed}, indent=1) + "\n")
    sys.exit(1 if row["wrong"] or row["in the log"] else 0)


if __name__ == "__main__":
    main()
