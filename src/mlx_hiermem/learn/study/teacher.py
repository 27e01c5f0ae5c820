"""The language model that studies: it writes a line after each of many prompts, and says how sure it is of answers.

The prompts share a beginning, which is read once. Any model of mlx-lm will do; by default it is the anchor.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_hiermem.cpu import report_slow_blas
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.partial import prefill, repeat_cache
from mlx_hiermem.progress import FractionDone, unheard_fraction
from mlx_hiermem.tokenizer import NO_CODE, encode_chat, encode_text

BATCH = 32  # lines written at a time; when one is done, no other takes its place: that would copy all their caches
KEPT = 8 * BATCH  # lines that are kept at a time, so that a killed study repeats seconds of work


@dataclass(frozen=True)
class Teacher:
    """An mlx-lm model and its tokenizer (a `TokenizerWrapper`)."""

    model: nn.Module
    tokenizer: Any

    def lines(
        self,
        asked: Sequence[tuple[str, str]],
        tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        tell: FractionDone = unheard_fraction,
    ) -> list[str]:
        """What the model writes after each (beginning, prompt), up to the end of the line or a number of tokens.

        A beginning that several prompts share is read once. `tell` is told how much is done.
        """
        mx.random.seed(seed)
        caches = {beginning: self._read(beginning) for beginning in dict.fromkeys(b for b, _ in asked)}
        order = in_order(asked)
        written = [""] * len(asked)
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            lines = self._write([(caches[asked[i][0]], asked[i][1]) for i in some], tokens, temperature)
            for i, line in zip(some, lines, strict=True):
                written[i] = line
            tell((start + len(some)) / len(order))
        return written

    def _read(self, beginning: str) -> tuple[list[Any], list[int]]:
        """The KV cache of a text but for its last token, and that: a prompt may be empty."""
        tokens, cache = encode_text(self.tokenizer, beginning), make_prompt_cache(self.model)
        if len(tokens) > 1:
            self.model(mx.array([tokens[:-1]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache, tokens[-1:]

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text, special=False)

    def _write(
        self, asked: Sequence[tuple[tuple[list[Any], list[int]], str]], tokens: int, temperature: float
    ) -> list[str]:
        prompts = [last + self._encode(prompt) for (_, last), prompt in asked]
        caches = [copy.deepcopy(cache) for (cache, _), _ in asked]
        lines = self._generate(prompts, caches, tokens, temperature, [self._encode("\n")])
        return [line.split("\n")[0].strip() for line in lines]

    def replies(self, asked: Sequence[str], tokens: int, temperature: float, seed: int) -> list[str]:
        """What the model replies to each request in a chat of its own, all of them written together.

        Where it has no chat template, what it writes after the request.
        """
        mx.random.seed(seed)
        prompts = [
            encode_chat(self.tokenizer, [{"role": "user", "content": text}], enable_thinking=False)
            if self.tokenizer.chat_template is not None
            else encode_text(self.tokenizer, f"{text}\n\n")
            for text in asked
        ]
        return self._generate(prompts, None, tokens, temperature, [])

    def _generate(
        self,
        prompts: Sequence[list[int]],
        caches: list[list[Any]] | None,
        tokens: int,
        temperature: float,
        stops: list[list[int]],
    ) -> list[str]:
        """What follows each prompt, up to a number of tokens, one of `stops` or the end of a reply."""
        generator = BatchGenerator(
            self.model,
            max_tokens=tokens,
            stop_tokens=[[token] for token in self.tokenizer.eos_token_ids] + stops,
            sampler=make_sampler(temperature) if temperature else None,
            completion_batch_size=BATCH,
            prefill_batch_size=BATCH,
        )
        numbers = generator.insert(list(prompts), caches=caches)
        found: dict[int, list[int]] = {number: [] for number in numbers}
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    found[response.uid].append(response.token)
        generator.close()
        return [self.tokenizer.decode(line) for line in found.values()]

    def finds(self, beginning: str, asked: Sequence[tuple[str, str]], others: Sequence[str]) -> list[float]:
        """How surely the model, having read `beginning`, gives each prompt's answer rather than one of `others`.

        `asked` are (prompt, answer). Returns mean log p per token of the answer; -inf where at some token one of
        `others` that began the same way is likelier.
        """
        read = encode_text(self.tokenizer, beginning)
        cache = prefill(self.model, read)
        before = [] if cache else read
        rivals = [self._encode(f" {other}") for other in others]
        rows = [(before + self._encode(prompt), self._encode(f" {answer}")) for prompt, answer in asked]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        found = [0.0] * len(rows)
        for start in range(0, len(order), BATCH // 2):
            some = order[start : start + BATCH // 2]
            log_ps = self._log_p([rows[i] for i in some], cache)
            for i, log_p in zip(some, log_ps, strict=True):
                found[i] = _certainty(log_p, rows[i][1], rivals)
        return found

    def _log_p(self, rows: Sequence[tuple[list[int], list[int]]], cache: list[KVCache] | None) -> list[np.ndarray]:
        """[tokens of the answer, V] log p of each row, after what `cache` holds."""
        length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        tokens = np.zeros((len(rows), length), np.int32)
        for row, (prompt, answer) in zip(tokens, rows, strict=True):
            row[: len(prompt) + len(answer) - 1] = prompt + answer[:-1]
        logits = self.model(mx.array(tokens), cache=None if cache is None else repeat_cache(cache, len(rows)))
        return [
            np.array(nn.log_softmax(own[len(prompt) - 1 : len(prompt) + len(answer) - 1].astype(mx.float32)))
            for own, (prompt, answer) in zip(logits, rows, strict=True)
        ]


def in_order(asked: Sequence[tuple[str, str]]) -> list[int]:
    """The numbers of (beginning, prompt) pairs in the order of writing: alike ones together, to pad little."""
    return sorted(range(len(asked)), key=lambda i: (asked[i][0], len(asked[i][1])))


def load_teacher(name: str) -> Teacher:
    """A model by its folder (a memory model's too) or hub id. Raises AnchorError where mlx-lm cannot load it."""
    from mlx_lm import load

    report_slow_blas()
    if (inside := pathlib.Path(name) / "anchor").is_dir():
        name = str(inside)
    try:
        model, tokenizer = load(name, NO_CODE)[:2]
    except Exception as error:  # mlx-lm raises whatever the hub, the files or the architecture give rise to
        raise AnchorError(
            f"cannot load the teacher {name}: {error}", "Name a model that mlx-lm can load."
        ) from error
    if mx.default_device().type == mx.DeviceType.cpu:
        model.set_dtype(mx.float32)
    return Teacher(model, tokenizer)


def _certainty(log_p: np.ndarray, answer: list[int], rivals: Sequence[list[int]]) -> float:
    """Mean log p of the answer's tokens, or -inf; see `Teacher.finds`."""
    for i, token in enumerate(answer):
        like = {rival[i] for rival in rivals if rival[:i] == answer[:i] and len(rival) > i}
        if any(log_p[i, other] > log_p[i, token] for other in like - {token}):
            return float("-inf")
    return float(log_p[np.arange(len(answer)), answer].mean())


# Replies that are kept as they come: what was answered once is not asked again after a kill


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


@dataclass(frozen=True)
class CachedTeacher(Teacher):
    """A teacher whose replies are kept in a file: a study that was killed does not ask for them again.

    Some hundred windows are studied together, which takes a small computer minutes; each reply is kept as it comes.
    """

    asked: Teacher  # answers what is not in the file yet
    kept: Replies

    @classmethod
    def of(cls, teacher: Teacher, file: pathlib.Path) -> CachedTeacher:
        return cls(teacher.model, teacher.tokenizer, teacher, Replies(file))

    def lines(
        self,
        asked: Sequence[tuple[str, str]],
        tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        tell: FractionDone = unheard_fraction,
    ) -> list[str]:
        """As `Teacher.lines`. Lines that nothing is drawn for are kept some at a time, in the order of writing."""
        if temperature:
            given = ["lines", list(asked), tokens, temperature, seed]
            return self._cached(given, lambda: self.asked.lines(asked, tokens, temperature, seed, tell))
        order, written = in_order(asked), [""] * len(asked)
        for start in range(0, len(order), KEPT):
            some = order[start : start + KEPT]
            pairs = [asked[i] for i in some]
            lines = self._cached(
                ["lines", pairs, tokens, temperature, seed], partial(self.asked.lines, pairs, tokens)
            )
            for i, line in zip(some, lines, strict=True):
                written[i] = line
            tell((start + len(some)) / len(order))
        return written

    def finds(self, beginning: str, asked: Sequence[tuple[str, str]], others: Sequence[str]) -> list[float]:
        """As `Teacher.finds`."""
        given = ["finds", beginning, list(asked), list(others)]
        return self._cached(given, lambda: self.asked.finds(beginning, asked, others))

    def _cached(self, given: list[Any], ask: Callable[[], list[Any]]) -> list[Any]:
        key = key_of(given)
        if (known := self.kept.get(key)) is None:
            known = ask()
            self.kept.keep(key, known)
        return list(known)
