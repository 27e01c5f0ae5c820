"""A teacher behind a server of OpenAI's protocol: late, wrong, silent, refusing, and killed in the middle."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import replay
from written_study import LINES, PASSAGES, SETTINGS, in_any_order, make_passages, question, taught, written

from mlx_hiermem.errors import TeacherError
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.free_study import forms
from mlx_hiermem.learn.study.prompts import read_prompts
from mlx_hiermem.learn.study.stage import study
from mlx_hiermem.learn.study.teacher import Replies
from mlx_hiermem.learn.study.writers import Request, ServerWriter
from mlx_hiermem.learn.work import STUDIED, STUDY, WRITTEN, read_rows

pytestmark = pytest.mark.usefixtures("no_waiting")
RECORDS = len(LINES)


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


def counts(corpus: Corpus) -> dict[str, int]:
    return json.loads(corpus.work.path(STUDIED).read_text())


@pytest.mark.slow
class TestServer:
    def test_what_it_writes_is_learnt(
        self, passages: Corpus, serve: Callable[..., str], tmp_path: pathlib.Path
    ) -> None:
        said = list[str]()
        study(passages.work, passages, taught(serve()), say=said.append)
        assert in_any_order(written(passages)) == in_any_order(LINES)
        assert (
            len(read_prompts(passages.work.path(WRITTEN))) == RECORDS
        )  # as a file of prompts it can be given again
        rows = list(read_rows(passages.work.path(STUDY)))
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
        assert counts(passages)["no use"] == counts(passages)["unsupported"] == 0
        assert re.match(r"about [\d,]+ tokens to write for \d+ tokens in 3 windows, [\d,]+ to read, about", said[0])
        assert not passages.work.path("study.parts").exists()

    def test_none_of_its_questions_need_be_held_out(self, passages: Corpus, serve: Callable[..., str]) -> None:
        study(passages.work, passages, taught(serve(), replace(SETTINGS, measured=False)))
        assert all(row["learnt"] for row in read_rows(passages.work.path(STUDY)))

    def test_no_more_is_asked_for_than_is_wanted(self, passages: Corpus, serve: Callable[..., str]) -> None:
        study(passages.work, passages, taught(serve(), StudySettings(amount=0.1)))
        assert all("question" in row for row in written(passages))  # the first form was enough

    def test_lies_are_dropped(self, passages: Corpus, serve: Callable[..., str]) -> None:
        def lie(handler: replay.Handler, asked: str, number: int) -> bool:
            reply = handler.study.reply(asked)
            wrong = re.sub(r"\b(1857|19th)\b", lambda found: f"2{found[0]}", reply)
            handler.complete(wrong.replace("New Zealand", "Old Prussia"))
            return True

        study(passages.work, passages, taught(serve(lie)))
        kept = written(passages)
        assert not re.search("21857|219th|Prussia", json.dumps(kept))
        assert len(kept) == RECORDS - 4 == RECORDS - counts(passages)["unsupported"]

    @pytest.mark.parametrize("way", ["error 500", "late", "cut"])
    def test_what_fails_once_is_tried_again(self, passages: Corpus, serve: Callable[..., str], way: str) -> None:
        def fail(handler: replay.Handler, asked: str, number: int) -> bool:
            if number not in (1, 4, 20):
                return False
            if way == "error 500":
                handler.send(500, {"error": {"message": "out of memory"}})
            elif way == "late":
                time.sleep(1.5)
            handler.close_connection = True
            return True

        study(passages.work, passages, taught(serve(fail)))
        assert in_any_order(written(passages)) == in_any_order(LINES)
        assert counts(passages)["unanswered"] == 0

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
        self, passages: Corpus, serve: Callable[..., str], nonsense: str
    ) -> None:
        seen = list[bool]()

        def answer(handler: replay.Handler, asked: str, number: int) -> bool:
            if '{"texts"' not in asked or "Propane" not in asked:
                return False
            seen.append(forms().mend in asked)
            handler.complete(nonsense)
            return True

        study(passages.work, passages, taught(serve(answer)))
        expected = [line for line in LINES if not (line["document"] == "Propane" and "text" in line)]
        assert in_any_order(written(passages)) == in_any_order(expected)
        assert seen.count(True) == seen.count(False) == counts(passages)["no use"] > 0

    def test_markdown_is_read(self, passages: Corpus, serve: Callable[..., str]) -> None:
        def fenced(handler: replay.Handler, asked: str, number: int) -> bool:
            handler.complete(f"Here is the *JSON*:\n\n```json\n{handler.study.reply(asked)}\n```\n\nEnjoy!")
            return True

        study(passages.work, passages, taught(serve(fenced)))
        assert in_any_order(written(passages)) == in_any_order(LINES)

    def test_repetitions_are_dropped(
        self, passages: Corpus, serve: Callable[..., str], lines: pathlib.Path
    ) -> None:
        again = question("Propane", "Who discovered Propane?!", "the chemist Marcellin Berthelot")
        lines.write_text(lines.read_text() + json.dumps(again) + "\n")
        study(passages.work, passages, taught(serve()))
        assert in_any_order(written(passages)) == in_any_order(LINES)

    def test_a_server_that_refuses_an_option_gets_it_no_more(
        self, passages: Corpus, serve: Callable[..., str]
    ) -> None:
        def picky(handler: replay.Handler, asked: str, number: int) -> bool:
            for name in ("max_tokens", "temperature", "seed"):
                if name in handler.body:
                    error = {"message": f"{name} is not supported", "param": name, "type": "invalid_request_error"}
                    handler.send(422 if name == "seed" else 400, {"error": error})
                    return True
            return handler.body["max_completion_tokens"] < 100

        study(passages.work, passages, taught(serve(picky)))
        assert in_any_order(written(passages)) == in_any_order(LINES)

    def test_requests_that_are_refused_together(self, serve: Callable[..., str], tmp_path: pathlib.Path) -> None:
        together = threading.Barrier(4)

        def picky(handler: replay.Handler, asked: str, number: int) -> bool:
            if "max_tokens" in handler.body:
                together.wait(10)
                handler.send(400, {"error": {"message": "no", "param": "max_tokens"}})
            else:
                handler.complete("yes")
            return True

        requests = [Request(f"Hello {n}", 5, 0.0, n) for n in range(4)]
        assert ServerWriter(serve(picky)).write(requests, Replies(tmp_path / "replies")) == ["yes"] * 4

    def test_a_server_that_is_not_there(self, passages: Corpus) -> None:
        with pytest.raises(TeacherError, match=r"the teacher at http://127.0.0.1:9/v1 does not answer.*refused"):
            study(passages.work, passages, taught("http://127.0.0.1:9/v1"))

    def test_a_server_that_never_answers(self, passages: Corpus, serve: Callable[..., str]) -> None:
        def fail(handler: replay.Handler, asked: str, number: int) -> bool:
            handler.send(500, {"error": {"message": "out of memory"}})
            return True

        with pytest.raises(TeacherError, match=r"does not answer: .*out of memory") as error:
            study(passages.work, passages, taught(serve(fail)))
        assert "the same command again" in str(error.value)

    def test_a_key_that_is_refused_is_not_tried_again(self, passages: Corpus, serve: Callable[..., str]) -> None:
        asked = list[str]()

        def refuse(handler: replay.Handler, text: str, number: int) -> bool:
            asked.append(handler.headers["Authorization"])
            handler.send(401, {"error": {"message": "wrong key"}})
            return True

        with pytest.raises(TeacherError, match=r"wrong key.*OPENAI_API_KEY"):
            study(passages.work, passages, taught(serve(refuse)))
        assert len(asked) <= SETTINGS.at_once

    def test_the_key_is_the_environments(
        self, passages: Corpus, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = set[str]()

        def look(handler: replay.Handler, asked: str, number: int) -> bool:
            seen.add(handler.headers["Authorization"])
            return False

        monkeypatch.setenv("OPENAI_API_KEY", "a secret")
        study(passages.work, passages, taught(serve(look)))
        assert seen == {"Bearer a secret"}
        files = [file for file in passages.work.folder.rglob("*") if file.is_file()]
        assert files
        assert not any(b"a secret" in file.read_bytes() for file in files)

    def test_a_teacher_that_cannot_write_is_told_of_at_once(
        self, passages: Corpus, serve: Callable[..., str]
    ) -> None:
        asked = list[str]()

        def babble(handler: replay.Handler, text: str, number: int) -> bool:
            asked.append(text)
            handler.complete("la la la")
            return True

        url = serve(babble)
        for count in (6, 12):  # one form for three windows, and once more; another model may stand there now
            with pytest.raises(TeacherError, match="cannot write what is asked for: 0% of 3 replies were of use"):
                study(passages.work, passages, taught(url))
            assert len(asked) == count

    def test_a_server_without_a_model(self, lines: pathlib.Path, tmp_path: pathlib.Path) -> None:
        class Empty(replay.Handler):
            def do_GET(self) -> None:  # noqa: N802  # the name that http.server calls
                self.send(200, {"object": "list", "data": None})

        with (
            replay.replaying(replay.Study(lines), Empty) as url,
            pytest.raises(TeacherError, match="names no model"),
        ):
            ServerWriter(url).write([Request("Hello", 5, 0.0, 0)], Replies(tmp_path / "replies"))


def run(url: str, folder: pathlib.Path) -> list[str]:
    """A command line that studies the passages in `folder`."""
    return [sys.executable, str(pathlib.Path(__file__)), url, str(folder)]


class TestInterrupted:
    @pytest.mark.slow
    def test_a_killed_study_asks_for_nothing_twice(
        self, passages: Corpus, serve: Callable[..., str], tmp_path: pathlib.Path
    ) -> None:
        study(passages.work, passages, taught(serve()))
        whole = [passages.work.path(name).read_bytes() for name in (STUDY, WRITTEN, STUDIED)]
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


def main() -> None:
    url, folder = sys.argv[1:]
    corpus = make_passages(pathlib.Path(folder))
    study(corpus.work, corpus, taught(url))


if __name__ == "__main__":
    main()
