"""The language model that studies: what it writes, how it reads, and that its replies are kept."""

from __future__ import annotations

import math
import pathlib
import signal
import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import replay
from mlx_lm.generate import generate
from mlx_lm.models.cache import RotatingKVCache

from mlx_hiermem.errors import AnchorError
from mlx_hiermem.learn.study import teacher
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.study.teacher import CachedTeacher, Replies, Teacher, load_teacher
from mlx_hiermem.learn.study.wordings import named
from mlx_hiermem.learn.study.writers import Request, ServerWriter


def test_lines_are_what_the_model_writes_alone(smollm2_teacher: Teacher) -> None:
    beginning = "Capitals.\n\nFrance: Paris\nItaly: Rome\n"
    prompts = ["Germany:", "The United Kingdom of Great Britain:", "Spain:"]
    model, tokenizer = smollm2_teacher.model, smollm2_teacher.tokenizer
    alone = [generate(model, tokenizer, beginning + prompt, max_tokens=8) for prompt in prompts]
    together = smollm2_teacher.lines([(beginning, prompt) for prompt in prompts], 8)
    assert together == [text.split("\n")[0].strip() for text in alone]


def test_beginnings_may_differ(tiny_teacher: Teacher) -> None:
    asked = [("ab", "c"), ("xyz", "c"), ("ab", "dd"), ("q", "")]
    assert tiny_teacher.lines(asked, 6) == [tiny_teacher.lines([one], 6)[0] for one in asked]


def test_certainty_is_the_mean_log_p(tiny_teacher: Teacher) -> None:
    asked = [("how many", "12"), ("who", "Ann"), ("a longer question", "x")]
    for (prompt, answer), found in zip(asked, tiny_teacher.finds("some text", asked, []), strict=True):
        tokens = tiny_teacher.tokenizer.encode(f"some text{prompt} {answer}")
        length = len(tiny_teacher.tokenizer.encode(f" {answer}"))
        log_p = mx.softmax(tiny_teacher.model(mx.array([tokens]))[0], axis=-1).log()
        own = [float(log_p[i - 1, tokens[i]]) for i in range(len(tokens) - length, len(tokens))]
        assert found == pytest.approx(np.mean(own), abs=1e-4)


def test_other_caches_are_not_shared(tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [("how many", "12"), ("a longer question", "x")]
    expected = tiny_teacher.finds("some text", asked, [])
    monkeypatch.setattr("mlx_hiermem.partial.make_prompt_cache", lambda _: [RotatingKVCache(4)] * 2)
    assert tiny_teacher.finds("some text", asked, []) == pytest.approx(expected, abs=1e-4)


def test_a_likelier_answer_is_preferred(tiny_teacher: Teacher) -> None:
    rivals = [chr(c) for c in range(ord("a"), ord("z"))]
    found = [tiny_teacher.finds("text", [("?", rival)], rivals)[0] for rival in rivals]
    assert sum(log_p > -math.inf for log_p in found) == 1


def test_smollm2_reads(smollm2_teacher: Teacher) -> None:
    text = "The tower is 53 metres high. It was built in 1894 by Anna Lind.\n\n"
    answers = ["53", "1894", "Anna Lind"]
    prompts = ["Question: When was the tower built?\nAnswer:"] * 3
    found = smollm2_teacher.finds(text, list(zip(prompts, answers, strict=True)), answers)
    assert [log_p > -math.inf for log_p in found] == [False, True, False]


def test_smollm2_reads_names_in_windows_that_name_nobody(smollm2_teacher: Teacher) -> None:
    text = named("Capital: Wexholm Government type: republic Independence: 7 July 1978", "Norland")
    assert named(text, "norland") == text == f"Norland. {text.removeprefix('Norland. ')}"
    answers = ["Wexholm", "republic", "7", "July", "1978"]
    prompts = ["Question: What is the capital of Norland?\nAnswer:"] * len(answers)
    asked = list(zip(prompts, answers, strict=True))
    found = smollm2_teacher.finds(f"{patterns().example}{text}\n\n", asked, answers)
    assert [log_p > -math.inf for log_p in found] == [True, False, False, False, False]


def test_replies_are_kept(tiny_teacher: Teacher, tmp_path: pathlib.Path) -> None:
    lines, finds = ([("ab", "c"), ("ab", "dd")], 6, 0.8, 3), ("some text", [("how many", "12")], ["13"])
    first = CachedTeacher.of(tiny_teacher, tmp_path / "notes")
    said = first.lines(*lines), first.finds(*finds), first.finds("other", *finds[1:])
    assert said == (tiny_teacher.lines(*lines), tiny_teacher.finds(*finds), tiny_teacher.finds("other", *finds[1:]))
    mute = Teacher(None, None)  # type: ignore[arg-type]  # fails when it is asked
    again = CachedTeacher.of(mute, tmp_path / "notes")
    assert (again.lines(*lines), again.finds(*finds), again.finds("other", *finds[1:])) == said
    with pytest.raises(AttributeError):
        again.lines(*lines[:3], 4)


def test_a_killed_study_repeats_few_lines(
    tiny_teacher: Teacher, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "KEPT", 2)
    asked = [("ab", "c"), ("xyz", "c"), ("ab", "dd"), ("q", ""), ("xyz", "cc")]
    counts: list[int] = []
    own = Teacher.lines

    def counted(self: Teacher, some: Any, *rest: Any) -> list[str]:
        if len(counts) == 2:
            raise KeyboardInterrupt
        counts.append(len(some))
        return own(self, some, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "lines", counted)
        with pytest.raises(KeyboardInterrupt):
            CachedTeacher.of(tiny_teacher, tmp_path / "notes").lines(asked, 6)
        counts.pop()
        told: list[float] = []
        written = CachedTeacher.of(tiny_teacher, tmp_path / "notes").lines(asked, 6, tell=told.append)
    assert counts == [2, 1], "the first four are there"
    assert written == tiny_teacher.lines(asked, 6)
    assert told == [0.4, 0.8, 1.0]


def test_a_teacher_that_is_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AnchorError, match="cannot load the teacher"):
        load_teacher(str(tmp_path))


def test_ctrl_c_does_not_wait_for_the_teachers_server(
    lines: pathlib.Path, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    before, stopped, in_time = set(threading.enumerate()), threading.Event(), list[bool]()
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))

    class Slow(replay.Handler):
        def answer(self, asked: str) -> None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            in_time.append(stopped.wait(10))
            super().answer(asked)

    with replay.replaying(replay.Study(lines), Slow) as url:
        with pytest.raises(KeyboardInterrupt):
            ServerWriter(url).write([Request("Hello", 5, 0.0, 0)], Replies(tmp_path / "replies"))
        assert in_time == []  # the request is still under way
        assert all(
            thread.daemon for thread in set(threading.enumerate()) - before
        )  # nor is it waited for at the end
        stopped.set()
