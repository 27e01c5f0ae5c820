"""A teacher that can write: what it is asked for, what is kept of its replies, and servers that misbehave."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from mlx_hiermem.learn.study.prompts import Evidence, line_of, parse, read_prompts
from mlx_hiermem.learn.study.stage import Teaching, help_study, study
from mlx_hiermem.learn.study.teacher import Replies
from mlx_hiermem.learn.study.writers import ModelWriter, Request, ServerWriter
from mlx_hiermem.learn.work import STUDIED, STUDY, WINDOWS, WRITTEN, Work, read_rows, write_rows

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
RECORDS = len(LINES)


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


def misbehaving(do: Callable[[replay.Handler, str, int], bool]) -> type[replay.Handler]:
    """A played-back teacher that first asks `do` (handler, request, its number) to answer instead."""
    count, lock = iter(range(1_000_000)), threading.Lock()

    class Own(replay.Handler):
        def answer(self, asked: str) -> None:
            with lock:
                number = next(count)
            if not do(self, asked, number):
                super().answer(asked)

    return Own


@pytest.fixture
def serve(lines: pathlib.Path) -> Iterator[Callable[..., str]]:
    """Starts servers, each with a way to answer; all of them end with the test."""
    started = []

    def start(do: Callable[[replay.Handler, str, int], bool] = lambda *_: False) -> str:
        server = replay.replaying(replay.Study(lines), misbehaving(do))
        started.append(server)
        return server.__enter__()

    yield start
    for server in started:
        server.__exit__(None, None, None)


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


def counts(corpus: Corpus) -> dict[str, int]:
    return json.loads(corpus.work.path(STUDIED).read_text())


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


@pytest.mark.slow
class TestServer:
    def test_what_it_writes_is_learnt(
        self, corpus: Corpus, serve: Callable[..., str], tmp_path: pathlib.Path
    ) -> None:
        said = list[str]()
        study(corpus.work, corpus, taught(serve()), say=said.append)
        assert in_any_order(written(corpus)) == in_any_order(LINES)
        assert len(read_prompts(corpus.work.path(WRITTEN))) == RECORDS  # as a file of prompts it can be given again
        rows = list(read_rows(corpus.work.path(STUDY)))
        assert [row["window"] for row in rows] == sorted(row["window"] for row in rows)
        asked = [row for row in rows if row.get("question") == "who discovered propane"]
        assert [row["chat"] for row in asked] == [False]
        assert {
            "window": 0,
            "prompt": "who discovered propane",
            "chat": True,
            "both": True,
            "answer": "Marcellin Berthelot",
        } in rows
        turned = [row for row in rows if row.get("reversed")]
        assert {row["answer"] for row in turned} == {"propane"}
        assert counts(corpus)["no use"] == counts(corpus)["unsupported"] == 0
        assert re.match(r"about [\d,]+ tokens to write for \d+ tokens in 3 windows, [\d,]+ to read, about", said[0])
        assert not corpus.work.path("study.parts").exists()

    def test_none_of_its_questions_need_be_held_out(self, corpus: Corpus, serve: Callable[..., str]) -> None:
        study(corpus.work, corpus, taught(serve(), replace(SETTINGS, measured=False)))
        assert all(row["learnt"] for row in read_rows(corpus.work.path(STUDY)))

    def test_no_more_is_asked_for_than_is_wanted(self, corpus: Corpus, serve: Callable[..., str]) -> None:
        study(corpus.work, corpus, taught(serve(), StudySettings(amount=0.1)))
        assert all("question" in row for row in written(corpus))  # the first form was enough

    def test_lies_are_dropped(self, corpus: Corpus, serve: Callable[..., str]) -> None:
        def lie(handler: replay.Handler, asked: str, number: int) -> bool:
            reply = handler.study.reply(asked)
            wrong = re.sub(r"\b(1857|19th)\b", lambda found: f"2{found[0]}", reply)
            handler.complete(wrong.replace("New Zealand", "Old Prussia"))
            return True

        study(corpus.work, corpus, taught(serve(lie)))
        kept = written(corpus)
        assert not re.search("21857|219th|Prussia", json.dumps(kept))
        assert len(kept) == RECORDS - 4 == RECORDS - counts(corpus)["unsupported"]

    @pytest.mark.parametrize("way", ["error 500", "late", "cut"])
    def test_what_fails_once_is_tried_again(self, corpus: Corpus, serve: Callable[..., str], way: str) -> None:
        def fail(handler: replay.Handler, asked: str, number: int) -> bool:
            if number not in (1, 4, 20):
                return False
            if way == "error 500":
                handler.send(500, {"error": {"message": "out of memory"}})
            elif way == "late":
                time.sleep(1.5)
            handler.close_connection = True
            return True

        study(corpus.work, corpus, taught(serve(fail)))
        assert in_any_order(written(corpus)) == in_any_order(LINES)
        assert counts(corpus)["unanswered"] == 0

    @pytest.mark.parametrize(
        "nonsense",
        [
            "I'm sorry, I cannot do that.",
            '{"texts": ["Un gaz incolore, découvert par un chimiste, que les gens utilisent pour se chauffer."]}',
            '{"texts": ["' + "propane " * 1_400_000 + '"]}',
        ],
        ids=["prose", "French", "11 MB"],
    )
    def test_what_is_of_no_use_is_asked_for_once_more_then_counted(
        self, corpus: Corpus, serve: Callable[..., str], nonsense: str
    ) -> None:
        seen = list[bool]()

        def answer(handler: replay.Handler, asked: str, number: int) -> bool:
            if '{"texts"' not in asked or "Propane" not in asked:
                return False
            seen.append(forms().mend in asked)
            handler.complete(nonsense)
            return True

        study(corpus.work, corpus, taught(serve(answer)))
        expected = [line for line in LINES if not (line["document"] == "Propane" and "text" in line)]
        assert in_any_order(written(corpus)) == in_any_order(expected)
        assert seen.count(True) == seen.count(False) == counts(corpus)["no use"] > 0

    def test_markdown_is_read(self, corpus: Corpus, serve: Callable[..., str]) -> None:
        def fenced(handler: replay.Handler, asked: str, number: int) -> bool:
            handler.complete(f"Here is the *JSON*:\n\n```json\n{handler.study.reply(asked)}\n```\n\nEnjoy!")
            return True

        study(corpus.work, corpus, taught(serve(fenced)))
        assert in_any_order(written(corpus)) == in_any_order(LINES)

    def test_repetitions_are_dropped(self, corpus: Corpus, serve: Callable[..., str], lines: pathlib.Path) -> None:
        again = question("Propane", "Who discovered Propane?!", "the chemist Marcellin Berthelot")
        lines.write_text(lines.read_text() + json.dumps(again) + "\n")
        study(corpus.work, corpus, taught(serve()))
        assert in_any_order(written(corpus)) == in_any_order(LINES)

    def test_a_server_that_refuses_an_option_gets_it_no_more(
        self, corpus: Corpus, serve: Callable[..., str]
    ) -> None:
        def picky(handler: replay.Handler, asked: str, number: int) -> bool:
            for name in ("max_tokens", "temperature", "seed"):
                if name in handler.body:
                    error = {"message": f"{name} is not supported", "param": name, "type": "invalid_request_error"}
                    handler.send(400, {"error": error})
                    return True
            return handler.body["max_completion_tokens"] < 100

        study(corpus.work, corpus, taught(serve(picky)))
        assert in_any_order(written(corpus)) == in_any_order(LINES)

    def test_a_server_that_is_not_there(self, corpus: Corpus) -> None:
        with pytest.raises(TeacherError, match=r"the teacher at http://127.0.0.1:9/v1 does not answer"):
            study(corpus.work, corpus, taught("http://127.0.0.1:9/v1"))

    def test_a_server_that_never_answers(self, corpus: Corpus, serve: Callable[..., str]) -> None:
        def fail(handler: replay.Handler, asked: str, number: int) -> bool:
            handler.send(500, {"error": {"message": "out of memory"}})
            return True

        with pytest.raises(TeacherError, match=r"does not answer: .*out of memory") as error:
            study(corpus.work, corpus, taught(serve(fail)))
        assert "the same command again" in str(error.value)

    def test_a_key_that_is_refused_is_not_tried_again(self, corpus: Corpus, serve: Callable[..., str]) -> None:
        asked = list[str]()

        def refuse(handler: replay.Handler, text: str, number: int) -> bool:
            asked.append(handler.headers["Authorization"])
            handler.send(401, {"error": {"message": "wrong key"}})
            return True

        with pytest.raises(TeacherError, match="wrong key"):
            study(corpus.work, corpus, taught(serve(refuse)))
        assert len(asked) <= SETTINGS.at_once

    def test_the_key_is_the_environments(
        self, corpus: Corpus, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = set[str]()

        def look(handler: replay.Handler, asked: str, number: int) -> bool:
            seen.add(handler.headers["Authorization"])
            return False

        monkeypatch.setenv("OPENAI_API_KEY", "a secret")
        study(corpus.work, corpus, taught(serve(look)))
        assert seen == {"Bearer a secret"}
        files = [file for file in corpus.work.folder.rglob("*") if file.is_file()]
        assert files
        assert not any(b"a secret" in file.read_bytes() for file in files)

    def test_a_teacher_that_cannot_write_is_told_of_at_once(
        self, corpus: Corpus, serve: Callable[..., str]
    ) -> None:
        asked = list[str]()

        def babble(handler: replay.Handler, text: str, number: int) -> bool:
            asked.append(text)
            handler.complete("la la la")
            return True

        with pytest.raises(TeacherError, match="cannot write what is asked for: 0% of 3 replies were of use"):
            study(corpus.work, corpus, taught(serve(babble)))
        assert len(asked) == 6  # one form for three windows, and once more


def run(url: str, folder: pathlib.Path) -> list[str]:
    """A command line that studies the passages in `folder`."""
    return [sys.executable, str(pathlib.Path(__file__)), url, str(folder)]


class TestInterrupted:
    @pytest.mark.slow
    def test_a_killed_study_asks_for_nothing_twice(
        self, corpus: Corpus, serve: Callable[..., str], tmp_path: pathlib.Path
    ) -> None:
        study(corpus.work, corpus, taught(serve()))
        whole = [corpus.work.path(name).read_bytes() for name in (STUDY, WRITTEN, STUDIED)]
        asked, enough = list[str](), threading.Event()

        def note(handler: replay.Handler, text: str, number: int) -> bool:
            if enough.is_set():  # the process that asks is killed
                return True
            asked.append(text)
            if len(asked) in (20, 50):
                enough.set()
            return False

        url = serve(note)
        for _ in range(2):
            process = subprocess.Popen(run(url, tmp_path / "killed"))
            assert enough.wait(60)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            enough.clear()
        done = subprocess.run(run(url, tmp_path / "killed"), timeout=60)
        assert done.returncode == 0
        assert [(tmp_path / "killed" / name).read_bytes() for name in (STUDY, WRITTEN, STUDIED)] == whole
        twice = len(asked) - len(set(asked))
        assert twice <= 2 * SETTINGS.at_once  # those that were on their way

    def test_replies_are_on_disk_as_they_come(self, serve: Callable[..., str], tmp_path: pathlib.Path) -> None:
        kept = Replies(tmp_path / "replies")
        writer = ServerWriter(serve())
        window = Window(0, 0, "0.txt", "Stoat", PASSAGES["Stoat"])
        requests = [
            Request(forms().request(forms().forms[0], window, [], False, False), 100, 0.0, i) for i in (0, 1)
        ]
        first = writer.write(requests, kept)
        again = Replies(tmp_path / "replies")
        assert ServerWriter("http://127.0.0.1:9/v1").write(requests, again) == first


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


def main() -> None:
    url, folder = sys.argv[1:]
    corpus = passages(pathlib.Path(folder))
    study(corpus.work, corpus, taught(url))


if __name__ == "__main__":
    main()
