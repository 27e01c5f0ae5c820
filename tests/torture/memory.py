"""Whether memory is bounded: changes of path under a small budget, many sessions, a server that runs for long.

    python tests/torture/memory.py --changes 10000 --turns 60 --minutes 30 --out memory_bound.json

The bank is almost three times as large as the budget for its blocks. Resident memory is looked at all the time; its
slope is that of the second half, by least squares.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).parents[1])]

from mlx_hiermem import cpu  # noqa: E402

cpu.enable()  # before MLX

from tiny import CONFIG, HashEmbedder  # noqa: E402
from torture.served import Served, make_served, resident, served  # noqa: E402

from mlx_hiermem import load  # noqa: E402
from mlx_hiermem.router import Router  # noqa: E402
from mlx_hiermem.session import Session  # noqa: E402

BUDGET = 20 << 20
SESSIONS = 16
CLIENTS = 4
LARGE = dataclasses.replace(CONFIG, branching=8, block_sizes=(512, 1024))  # 73 blocks, 54 MB
Row = dict[str, Any]


class Watch:
    """Notes resident memory as something goes on."""

    def __init__(self, unit: str) -> None:
        self.unit, self.seen = unit, list[tuple[float, int]]()

    def look(self, at: float, pid: int | str = "self") -> None:
        self.seen.append((at, resident(pid)))

    def row(self) -> Row:
        """In MB; the first tenth, in which caches fill, is where it begins."""
        x, y = np.array(self.seen, np.float64).T
        y /= 1e6
        later = x >= x[-1] / 2
        slope = float(np.polyfit(x[later], y[later], 1)[0])
        begin = float(y[np.searchsorted(x, x[-1] / 10)])
        found = {"begin_mb": begin, "end_mb": float(y[-1]), "peak_mb": float(y.max()), "looks": len(y)}
        return {name: round(value, 1) for name, value in found.items()} | {f"slope_kb_per_{self.unit}": slope * 1e3}


def path_changes(model_folder: pathlib.Path, count: int) -> Row:
    """Random paths, one after the other."""
    model = load(model_folder, cache_bytes=BUDGET)
    assert model.bank
    assert model.cache
    leaves, rng = model.bank.tree.nodes(2), np.random.default_rng(0)
    watch, most, begun = Watch("change"), 0, time.perf_counter()
    for number in range(count):
        model.select(str(leaves[rng.integers(len(leaves))]), "")
        most = max(most, model.cache.bytes)
        if number % max(1, count // 200) == 0:
            watch.look(number)
    row = {"changes": count, "seconds": round(time.perf_counter() - begun, 1), "budget_mb": BUDGET / 1e6}
    return row | {"most_of_cache_mb": most / 1e6, "bytes_read_gb": model.cache.stats.bytes_read / 1e9} | watch.row()


def sessions(model_folder: pathlib.Path, turns: int) -> Row:
    """Conversations that take turns, with a model of their own in common; each begins afresh now and then."""
    model = load(model_folder, cache_bytes=BUDGET)
    assert model.bank
    assert model.cache
    model._router = Router(model.bank.tree, HashEmbedder(), model.bank.policy)
    talks, watch, most = [Session(model, max_tokens=8) for _ in range(SESSIONS)], Watch("turn"), 0
    for turn in range(turns):
        for number, talk in enumerate(talks):
            if turn % 10 == 9:
                talk.reset()
            for _ in talk.ask(f"question {turn} of talk {number}"):
                pass
            most = max(most, model.cache.bytes)
        watch.look(turn)
    return {"sessions": SESSIONS, "turns": turns, "most_of_cache_mb": most / 1e6} | watch.row()


def serving(model_folder: pathlib.Path, minutes: float) -> Row:
    """Clients that ask without a pause, on random paths and routed ones, streamed and not."""
    log = model_folder.parent / "log.txt"
    with served(model_folder, log, "--cache", str(BUDGET)) as server:
        ends, done, failed = time.monotonic() + 60 * minutes, [0] * CLIENTS, list[str]()
        threads = [
            threading.Thread(target=_client, args=(server, number, lambda: time.monotonic() > ends, done, failed))
            for number in range(CLIENTS)
        ]
        watch, begun = Watch("minute"), time.monotonic()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watch.look((time.monotonic() - begun) / 60, server.pid)
            time.sleep(max(0.2, minutes * 60 / 400))
        for thread in threads:
            thread.join()
    return {"minutes": minutes, "clients": CLIENTS, "requests": sum(done), "failed": failed[:10]} | watch.row()


def _client(server: Served, number: int, over: Callable[[], bool], done: list[int], failed: list[str]) -> None:
    rng = np.random.default_rng(number)
    while not over():
        path = "fetched" if rng.random() < 0.3 else f"{rng.integers(8)}.{rng.integers(8)}"
        messages = [{"role": "user", "content": f"question {rng.integers(10**6)}"}]
        body = {"messages": messages, "memory": path, "max_tokens": 16, "stream": bool(rng.random() < 0.5)}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        try:
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                failed.append(f"{answer.status} {said[:200]!r}")
        except OSError as error:
            failed.append(repr(error))
        finally:
            connection.close()
        done[number] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=1000, help="of path; 0: none")
    parser.add_argument("--turns", type=int, default=10, help=f"of each of {SESSIONS} sessions; 0: none")
    parser.add_argument("--minutes", type=float, default=0.5, help="of serving; 0: none")
    parser.add_argument("--out", type=pathlib.Path, help="figures as JSON; those of what is not run stay")
    asked = parser.parse_args()
    parts = (("path changes", path_changes, asked.changes), ("sessions", sessions, asked.turns))
    failed = False
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = make_served(pathlib.Path(name) / "model", LARGE)
        for what, measure, amount in (*parts, ("serving", serving, asked.minutes)):
            if not amount:
                continue
            row = measure(folder, amount)
            failed |= row.get("most_of_cache_mb", 0) > BUDGET / 1e6 or bool(row.get("failed"))
            print(f"{what}: {row}", flush=True)
            if asked.out:
                rows = json.loads(asked.out.read_text()) if asked.out.exists() else {}
                asked.out.write_text(json.dumps(rows | {what: row}, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
