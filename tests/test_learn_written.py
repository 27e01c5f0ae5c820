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

import openai
import pytest
import replay
from serving import serving, tiny_model
from tiny import make_anchor

from mlx_hiermem.errors import TeacherError
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import PromptPair, StudySettings
from mlx_hiermem.learn.study.free_study import forms, parse_reply
from mlx_hiermem.learn.study.prompts import Evidence, line_of, parse
from mlx_hiermem.learn.study.stage import Teaching, help_study, study
from mlx_hiermem.learn.study.teacher import Replies
from mlx_hiermem.learn.study.writers import ModelWriter, Request, ServerWriter
from mlx_hiermem.learn.work import STUDY, WINDOWS, WRITTEN, Work, read_rows, write_rows

# From English Wikipedia's articles of these names, shortened (CC BY-SA 4.0, Wikipedia contributors), and what a
# language model wrote about them.
PASSAGES = {
    "Propane": (
        "Propane is a three-carbon alkane with the molecular formula C3H8. It is a gas at standard temperature and "
        "pressure, but compressible to a transportable liquid. Discovered in 1857 by the French chemist Marcellin "
        "Berthelot, it became commercially available in the US by 1911."
    ),
    "Stoat": (
        "The stoat, also known as the Eurasian ermine or ermine, is a species of mustelid native to Eurasia and "
        "northern North America. It was introduced into New Zealand in the late 19th century to control "
        "rabbits, and had a devastating effect on native bird populations."
    ),
    "Leif Erikson": (
        "Leif Erikson, also known as Leif the Lucky, was a Norse explorer who is thought to have been the first "
        "European to set foot on continental America, approximately half a millennium before Christopher Columbus. "
        "He established a Norse settlement at Vinland."
    ),
}


def question(document: str, asked: str, answer: str) -> dict[str, Any]:
    return {"document": document, "question": asked, "answer": answer}


def chat(document: str, user: str, assistant: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"document": document, "messages": turns}


LINES: list[dict[str, Any]] = [
    question("Propane", "who discovered propane", "Marcellin Berthelot"),
    question("Propane", "In which year was propane discovered?", "1857"),
    question("Propane", "Which gas has the formula C3H8?", "propane"),
    {"document": "Propane", "prompt": "By 1911 propane was", "completion": " for sale in the US."},
    chat("Propane", "Tell me about propane.", "Propane is an alkane that is a gas, but can be made a liquid."),
    {"document": "Propane", "text": "Propane is a gas. The French chemist Marcellin Berthelot found it in 1857."},
    question("Stoat", "where was the stoat introduced against rabbits", "New Zealand"),
    question("Stoat", "What is another name of the stoat?", "ermine"),
    {"document": "Stoat", "prompt": "The stoat came to New Zealand in", "completion": " the late 19th century."},
    chat("Stoat", "Tell me about the stoat.", "The stoat is a mustelid native to Eurasia and North America."),
    {"document": "Stoat", "text": "Stoats are also called ermines. They live in Eurasia and in North America."},
    question("Leif Erikson", "what was leif erikson called", "Leif the Lucky"),
    question("Leif Erikson", "Where did Leif Erikson settle?", "Vinland"),
    {"document": "Leif Erikson", "prompt": "Leif Erikson was a", "completion": " Norse explorer."},
    chat("Leif Erikson", "Tell me about Leif Erikson.", "He was a Norse explorer who settled at Vinland."),
    {"document": "Leif Erikson", "text": "Long before Columbus, Leif Erikson set foot on America."},
]  # fmt: skip
LIE = question("Propane", "When could propane be bought?", "1925")
SETTINGS = StudySettings(amount=100.0, at_once=3, timeout=1.0)


@pytest.fixture
def lines(tmp_path: pathlib.Path) -> pathlib.Path:
    """The study file that is played back."""
    file = tmp_path / "study.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> Corpus:
    """The passages as windows."""
    return passages(tmp_path / "work")


def passages(folder: pathlib.Path) -> Corpus:
    work = Work(folder)
    rows = enumerate(PASSAGES.items())
    write_rows(
        work.path(WINDOWS),
        ({"id": i, "document": i, "source": f"{i}.txt", "title": name, "text": text} for i, (name, text) in rows),
    )
    return Corpus(work, "of the passages")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's client waits half a second and more before it tries again."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.001)


def taught(url: str, settings: StudySettings = SETTINGS) -> Teaching:
    writer = ServerWriter(url, at_once=settings.at_once, seconds=settings.timeout)
    return Teaching(settings, "played back", writer=lambda: writer, count=lambda text: len(text.split()))


def written(corpus: Corpus) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "window"} for row in read_rows(corpus.work.path(WRITTEN))]


def in_any_order(rows: Sequence[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


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


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a tiny model without memory."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    make_anchor(folder / "anchor")
    return folder


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


def test_a_rank_with_another_teacher_writes_nothing(corpus: Corpus) -> None:
    """It finds no trial by its teacher. Without a model that writes by patterns it could only fail."""

    def writer() -> Any:
        raise AssertionError("it was asked")

    help_study(corpus.work, corpus, Teaching(StudySettings(), "another", None, writer), lambda: True)
    assert not corpus.work.path(STUDY).exists()


class TestModels:
    @pytest.mark.slow
    def test_one_that_cannot_write_studies_by_patterns(self, corpus: Corpus, tiny_teacher: Any) -> None:
        quick = StudySettings(questions=2, statements=1, chats=1, invented=1, tried=3)
        both = Teaching(quick, "tiny", lambda: tiny_teacher, lambda: Brief(tiny_teacher), len)
        study(corpus.work, corpus, both)
        rows = corpus.work.path(STUDY).read_bytes()
        assert not corpus.work.path(WRITTEN).exists()
        study(corpus.work, corpus, Teaching(quick, "tiny", lambda: tiny_teacher))
        assert corpus.work.path(STUDY).read_bytes() == rows

    def test_one_that_can_writes_freely(self, corpus: Corpus, lines: pathlib.Path) -> None:
        teacher = Scholar(replay.Study(lines))
        both = Teaching(SETTINGS, "scholar", lambda: teacher, lambda: ModelWriter(teacher), len)  # type: ignore
        study(corpus.work, corpus, both)
        assert in_any_order(written(corpus)) == in_any_order(LINES)

    def test_a_tiny_model_replies_to_each(self, tiny_teacher: Any) -> None:
        asked = ["Hello", "Write 12 questions", ""]
        together = tiny_teacher.replies(asked, 6, 0.0, 0)
        assert together == [tiny_teacher.replies([one], 6, 0.0, 0)[0] for one in asked]

    def test_our_own_server_is_asked(self, corpus: Corpus, tmp_path: pathlib.Path) -> None:
        """A tiny random model cannot write, and the server refuses long requests; the client tells."""
        make_anchor(tmp_path / "tiny" / "anchor")
        with serving(lambda: tiny_model(tmp_path / "tiny")) as running:
            kept = Replies(tmp_path / "replies")
            writer = ServerWriter(f"{running.url}/v1")
            assert isinstance(writer.write([Request("Hello", 5, 0.7, 1)], kept)[0], str)
            with pytest.raises(TeacherError):
                study(corpus.work, corpus, taught(f"{running.url}/v1"))


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
