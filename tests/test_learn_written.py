"""A teacher that can write: what it is asked for, what is kept of its replies, by which models and ranks."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import replay
from serving import serving, tiny_model
from tiny import make_anchor
from written_study import (
    LINES,
    PASSAGES,
    SETTINGS,
    chat,
    in_any_order,
    question,
    taught,
    written,
)

from mlx_hiermem.errors import TeacherError
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import PromptPair, StudySettings
from mlx_hiermem.learn.study.free_study import forms, parse_reply
from mlx_hiermem.learn.study.prompts import Evidence, line_of, parse
from mlx_hiermem.learn.study.stage import Teaching, help_study, study
from mlx_hiermem.learn.study.teacher import Replies
from mlx_hiermem.learn.study.writers import ModelWriter, Request, ServerWriter
from mlx_hiermem.learn.work import STUDY, WRITTEN

pytestmark = pytest.mark.usefixtures("no_waiting")


class TestReplies:
    @pytest.mark.parametrize(
        ("kind", "item", "expected"),
        [
            ("questions", '{"question": "who", "answer": "Ann"}', PromptPair("D", "who", "Ann", framed=True)),
            ("statements", '{"beginning": "It is…", "rest": "a gas."}', PromptPair("D", "It is", " a gas.")),
            (
                "chats",
                '{"user": "Hi", "assistant": "Good\\nday."}',
                PromptPair("D", "Hi", "Good day.", chat=True),
            ),
            ("texts", '"It is  a gas."', PromptPair("D", "", "It is a gas.")),
        ],
    )
    def test_they_are_the_records_of_prompts(self, kind: str, item: str, expected: PromptPair) -> None:
        reply = f'{{"{kind}": [{item}]}}'
        assert parse_reply(reply, kind, "D") == [expected]
        assert parse(json.dumps(line_of(expected))) == expected

    @pytest.mark.parametrize(
        "reply",
        [
            '```json\n{"texts": ["It is a gas."]}\n```',
            'Here you are:\n\n```\n["It is a gas."]\n```\nAnything else?',
            '<think>{"texts": ["no"]}</think>{"texts": ["It is a gas."]}',
            'Sure! {"retellings": ["It is a gas.", 3, "", null]}',
        ],
    )
    def test_what_stands_round_them_does_no_harm(self, reply: str) -> None:
        assert parse_reply(reply, "texts", "D") == [PromptPair("D", "", "It is a gas.")]

    @pytest.mark.parametrize(
        "reply",
        [
            "",
            "no",
            '{"texts": "It is a gas."}',
            "[" * 100_000,
            '{"texts": ["' + "x" * 10_000_000 + '"]}',
            "{}",
            "null",
        ],
    )
    def test_others_have_none(self, reply: str) -> None:
        assert parse_reply(reply, "texts", "D") is None

    def test_one_may_have_nothing_to_say(self) -> None:
        assert parse_reply('{"texts": []}', "texts", "D") == []

    def test_every_form_says_how_its_reply_looks(self) -> None:
        window = Window(0, 0, "a.txt", "Propane {task}", PASSAGES["Propane"])
        for form in forms().forms:
            text = forms().request(form, window, ["who", "when"], again=True, mend=False)
            assert "about Propane {task}:" in text  # what the documents say is not filled in
            assert PASSAGES["Propane"] in text
            assert f'{{"{form.kind}"' in text
            assert not re.search(r"\{(?!task)\w+\}", text)
            assert ("- who\n- when" in text) == form.about_questions
        assert {form.kind for form in forms().forms} == set(forms().reply)


class TestChecks:
    EVIDENCE = Evidence(
        "Leif Erikson", PASSAGES["Leif Erikson"] + " He had four ships and 1,200 men. Björn was one."
    )

    @pytest.mark.parametrize(
        ("one", "kept"),
        [
            (PromptPair("D", "Who was he?", "a Norse explorer", framed=True), True),
            (PromptPair("D", "Who was he?", "Vinland", framed=True), True),
            (PromptPair("D", "Who was he?", "Greenland", framed=True), False),
            (PromptPair("D", "Who was he?", "He was an explorer", framed=True), True),
            (PromptPair("D", "How many ships?", "4", framed=True), True),
            (PromptPair("D", "How many men?", "1200", framed=True), True),
            (PromptPair("D", "How many men?", "1,300", framed=True), False),
            (PromptPair("D", "Who had 1,300 men?", "Leif Erikson", framed=True), False),
            (PromptPair("D", "Which Icelander was it?", "Leif", framed=True), False),
            (PromptPair("D", "Who was one of the Norsemen?", "Bjorn", framed=True), True),
            (PromptPair("D", "He settled at", " Vinland with Americans."), True),
            (PromptPair("D", "He settled at", " Brattahlid."), False),
            (PromptPair("D", "", "Greenland is where. He settled."), True),  # a sentence may begin with any word
            (PromptPair("D", "Tell me.", "He sailed to Greenland.", chat=True), False),
        ],
    )
    def test_numbers_and_names_stand_in_the_window(self, one: PromptPair, kept: bool) -> None:
        assert self.EVIDENCE.supports(one) == kept

    def test_another_language_is_no_reply(self) -> None:
        source = Evidence("Stoat", PASSAGES["Stoat"])
        french = "L'hermine est une espèce de mustélidé originaire d'Eurasie et des régions septentrionales."
        assert not source.covers([PromptPair("Stoat", "", french)])
        assert source.covers([PromptPair("Stoat", "", "The ermine is a mustelid that lives in Eurasia.")])


def valleys(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """More documents than are studied together, and a study file about them."""
    docs, lines = folder / "valleys.jsonl", folder / "valleys-study.jsonl"
    beginnings, ends = ("Ash", "Birch", "Cal", "Dun", "Elm", "Far"), ("dale", "ford", "ley", "ton", "wick", "den")
    names = [f"{beginning}{end}" for beginning in beginnings for end in ends]
    with docs.open("w") as texts, lines.open("w") as study_file:
        for farms, name in enumerate(names, 100):
            text = f"The valley of {name} has {farms} farms."
            texts.write(json.dumps({"title": name, "text": text}) + "\n")
            rows = (
                question(name, f"how many farms are in {name}", str(farms)),
                chat(name, f"Tell me of {name}.", text),
            )
            for row in (*rows, question(name, f"Which valley has {farms} farms?", name)):
                study_file.write(json.dumps(row) + "\n")
    return docs, lines


@pytest.mark.real
@pytest.mark.slow
def test_two_ranks_make_the_model_of_one(
    anchor: pathlib.Path, tmp_path: pathlib.Path, two_ranks: list[str]
) -> None:
    docs, lines = valleys(tmp_path)
    (tmp_path / "learn.toml").write_text("[training]\nepochs = 1\n[study]\nat_once = 4\n")
    script, models = str(pathlib.Path(sys.executable).with_name("hiermem")), list[dict[str, bytes]]()
    with replay.replaying(replay.Study(lines)) as url:
        for before, out in (([], tmp_path / "one"), (two_ranks, tmp_path / "two")):
            call = [script, "learn", str(docs), str(out), "--anchor", str(anchor), "--teacher-url", url]
            done = subprocess.run(
                [*before, *call, "--config", str(tmp_path / "learn.toml")],
                capture_output=True,
                text=True,
                timeout=300,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            assert "tokens to write for" in done.stdout
            models.append({
                str(file.relative_to(out)): file.read_bytes()
                for file in sorted(out.rglob("*"))
                if file.is_file() and (file.is_relative_to(out / "bank") or file.name == "written.jsonl")
            })  # fmt: skip
    assert models[0] == models[1]
    assert len(models[0]["learning/written.jsonl"].splitlines()) == 3 * 36


def test_a_rank_with_another_teacher_writes_nothing(passages: Corpus) -> None:
    """It finds no trial by its teacher. Without a model that writes by patterns it could only fail."""

    def writer() -> Any:
        raise AssertionError("it was asked")

    help_study(passages.work, passages, Teaching(StudySettings(), "another", None, writer), lambda: True)
    assert not passages.work.path(STUDY).exists()


class TestModels:
    @pytest.mark.slow
    def test_one_that_cannot_write_studies_by_patterns(self, passages: Corpus, tiny_teacher: Any) -> None:
        quick = StudySettings(questions=2, statements=1, chats=1, invented=1, tried=3)
        both = Teaching(quick, "tiny", lambda: tiny_teacher, lambda: Brief(tiny_teacher), len)
        study(passages.work, passages, both)
        rows = passages.work.path(STUDY).read_bytes()
        assert not passages.work.path(WRITTEN).exists()
        study(passages.work, passages, Teaching(quick, "tiny", lambda: tiny_teacher))
        assert passages.work.path(STUDY).read_bytes() == rows

    def test_one_that_can_writes_freely(self, passages: Corpus, lines: pathlib.Path) -> None:
        teacher = Scholar(replay.Study(lines))
        both = Teaching(SETTINGS, "scholar", lambda: teacher, lambda: ModelWriter(teacher), len)  # type: ignore
        study(passages.work, passages, both)
        assert in_any_order(written(passages)) == in_any_order(LINES)

    def test_a_tiny_model_replies_to_each(self, tiny_teacher: Any) -> None:
        asked = ["Hello", "Write 12 questions", ""]
        together = tiny_teacher.replies(asked, 6, 0.0, 0)
        assert together == [tiny_teacher.replies([one], 6, 0.0, 0)[0] for one in asked]

    def test_our_own_server_is_asked(self, passages: Corpus, tmp_path: pathlib.Path) -> None:
        """A tiny random model cannot write, and the server refuses long requests; the client tells."""
        make_anchor(tmp_path / "tiny" / "anchor")
        with serving(lambda: tiny_model(tmp_path / "tiny")) as running:
            kept = Replies(tmp_path / "replies")
            writer = ServerWriter(f"{running.url}/v1")
            assert isinstance(writer.write([Request("Hello", 5, 0.7, 1)], kept)[0], str)
            with pytest.raises(TeacherError):
                study(passages.work, passages, taught(f"{running.url}/v1"))


class Brief(ModelWriter):
    """Writes no more than a few tokens."""

    def write(self, requests: Sequence[Request], kept: Replies) -> list[str | None]:
        return super().write([replace(request, tokens=8) for request in requests], kept)


class Scholar:
    """A model of mlx-lm as far as it is asked to write, that knows a study file."""

    def __init__(self, known: replay.Study) -> None:
        self.known = known

    def replies(self, asked: Sequence[str], tokens: int, temperature: float, seed: int) -> list[str]:
        return [self.known.reply(text) for text in asked]
