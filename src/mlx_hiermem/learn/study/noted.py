"""A teacher whose answers are noted on disk: a study that was killed does not ask for them again.

Windows are studied together, some hundred at a time, which takes a small computer minutes; each call's answer is
kept as it comes.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.learn.study.teacher import Teacher


@dataclass(frozen=True)
class NotedTeacher(Teacher):
    """`asked` is the teacher that answers what is not in `file` yet."""

    asked: Teacher
    file: pathlib.Path
    known: dict[str, list[Any]]

    @classmethod
    def of(cls, teacher: Teacher, file: pathlib.Path) -> NotedTeacher:
        whole = b""
        if file.exists():
            whole, _, torn = file.read_bytes().rpartition(b"\n")
            if torn:
                file.write_bytes(whole + b"\n" if whole else b"")
        notes = (json.loads(line) for line in whole.splitlines())
        return cls(teacher.model, teacher.tokenizer, teacher, file, {note["of"]: note["answer"] for note in notes})

    def lines(
        self,
        asked: Sequence[tuple[str, str]],
        tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        tell: Callable[[float], None] = lambda share: None,
    ) -> list[str]:
        """As `Teacher.lines`."""
        given = ["lines", list(asked), tokens, temperature, seed]
        return self._noted(given, lambda: self.asked.lines(asked, tokens, temperature, seed, tell))

    def finds(self, beginning: str, asked: Sequence[tuple[str, str]], others: Sequence[str]) -> list[float]:
        """As `Teacher.finds`."""
        given = ["finds", beginning, list(asked), list(others)]
        return self._noted(given, lambda: self.asked.finds(beginning, asked, others))

    def _noted(self, given: list[Any], ask: Callable[[], list[Any]]) -> list[Any]:
        key = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:32]
        if key not in self.known:
            self.known[key] = ask()
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"of": key, "answer": self.known[key]}) + "\n")
        return self.known[key]
