"""A teacher that is played back: a server in OpenAI's protocol that answers from a file of study lines.

    python tests/replay.py STUDY.jsonl.gz hiermem learn docs.jsonl my-model --teacher-url {url}

The lines are those that `hiermem learn --prompts` knows. A request for study material about a passage is answered
with all lines about that passage that are of the form asked for: the form is known by its JSON, the passage by the
title of its lines and by the answers that stand in it. With a command, the server runs as long as that does, and
{url} is its address there; without, until it is stopped. Only this machine can reach it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("questions", "statements", "chats", "texts")
NAME = "replay"


class Study:
    """The lines of a file, by what they are about and their form."""

    def __init__(self, file: pathlib.Path) -> None:
        self.lines = defaultdict[str, dict[str, list[Any]]](lambda: {kind: [] for kind in KINDS})
        self.answers = defaultdict[str, list[str]](list)
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for line in content.splitlines():
            row = json.loads(line)
            kind, item = _item(row)
            self.lines[row["document"]][kind].append(item)
            if kind == "questions":
                self.answers[row["document"]].append(item["answer"].casefold())

    def reply(self, asked: str) -> str:
        """The lines that a request asks for, as JSON."""
        kind = next((kind for kind in KINDS if f'{{"{kind}"' in asked), KINDS[0])
        found = self.lines[title] if (title := self._title(asked)) else {kind: []}
        return json.dumps({kind: found[kind]}, ensure_ascii=False)

    def _title(self, asked: str) -> str:
        """Whose passage it is: of the titles in it, the one of which most answers stand there."""
        text = asked.casefold()
        named = [one for one in self.lines if one.casefold() in text]
        return max(named or self.lines, key=lambda one: sum(answer in text for answer in self.answers[one]))


def _item(row: dict[str, Any]) -> tuple[str, Any]:
    """A line's form, and what a reply says of it."""
    match row:
        case {"question": question, "answer": answer}:
            return "questions", {"question": question, "answer": answer}
        case {"prompt": prompt, "completion": completion}:
            return "statements", {"beginning": prompt, "rest": completion}
        case {"messages": [{"content": user}, {"content": assistant}]}:
            return "chats", {"user": user, "assistant": assistant}
    return "texts", row["text"]


class Handler(BaseHTTPRequestHandler):
    """`GET /v1/models` and `POST /v1/chat/completions`."""

    protocol_version = "HTTP/1.1"
    study: Study
    body: dict[str, Any]  # of the request

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(self.body["messages"][-1]["content"])

    def answer(self, asked: str) -> None:
        """Answers one request."""
        self.complete(self.study.reply(asked))

    def complete(self, text: str) -> None:
        """Sends a reply as a chat completion."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.send(200, {"id": NAME, "object": "chat.completion", "created": 0, "model": NAME, "choices": [choice]})

    def send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Says nothing: a study has thousands of requests."""


@contextmanager
def replaying(study: Study, handler: type[Handler] = Handler, port: int = 0) -> Iterator[str]:
    """Serves a study meanwhile; yields the address for `--teacher-url`."""
    own = type("Own", (handler,), {"study": study})
    with ThreadingHTTPServer(("127.0.0.1", port), own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.handle_error = lambda request, address: None  # type: ignore[method-assign]  # clients may go
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=pathlib.Path, help="file of study lines, perhaps gzipped")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="run this meanwhile")
    given = parser.parse_args()
    with replaying(Study(given.study), port=given.port) as url:
        if given.command:
            sys.exit(subprocess.run([word.replace("{url}", url) for word in given.command]).returncode)
        print(url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
