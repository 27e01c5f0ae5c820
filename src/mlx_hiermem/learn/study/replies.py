"""Replies of a teacher, kept in a file as they come: what was answered once is not asked again after a kill."""

from __future__ import annotations

import hashlib
import json
import pathlib
import threading
from typing import Any


def key_of(asked: Any) -> str:
    """By what a reply is found again: a digest of everything that was asked, as JSON."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


class Replies:
    """The replies in one file; several threads may add to them."""

    def __init__(self, file: pathlib.Path, *others: pathlib.Path) -> None:
        """Reads what is there, and in `others`. A line that a kill has torn is dropped."""
        self.file, self._lock, self._known = file, threading.Lock(), dict[str, Any]()
        for one in (*others, file):
            whole, _, torn = one.read_bytes().rpartition(b"\n") if one.exists() else (b"", b"", b"")
            if torn and one == file:
                file.write_bytes(whole + b"\n" if whole else b"")
            notes = (json.loads(line) for line in whole.splitlines())
            self._known |= {note["of"]: note["answer"] for note in notes}

    def get(self, key: str) -> Any:
        """The reply, or None."""
        return self._known.get(key)

    def keep(self, key: str, answer: Any) -> None:
        """Notes a reply, on disk before it is used."""
        with self._lock:
            self._known[key] = answer
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"of": key, "answer": answer}) + "\n")
