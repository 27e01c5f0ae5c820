"""Self-study: what may be asked, how it is worded, and that only what finds its answer is learnt."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from books import COUNT, VILLAGES, fact

from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study import pattern_study, teacher
from mlx_hiermem.learn.study import stage as stage_module
from mlx_hiermem.learn.study.facts import BLANK, OTHER, SUBJECT, Fact, facts, worth_asking
from mlx_hiermem.learn.study.free_study import parse_reply
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.study.prompts import line_of, parse
from mlx_hiermem.learn.study.stage import Teaching, study
from mlx_hiermem.learn.study.teacher import Teacher
from mlx_hiermem.learn.study.wordings import (
    Tried,
    Wording,
    echo,
    in_turns,
    names_of,
    own_beginning,
    own_words,
    wordings,
)
from mlx_hiermem.learn.work import STUDY, Work, read_rows

QUICK = StudySettings(questions=2, statements=1, chats=1, invented=1, tried=3)


def window(text: str, title: str = "") -> Window:
    return Window(0, 0, "a.txt", title, text)


def asked(text: str, subject: str = "") -> list[tuple[str, str]]:
    return [(found.blank, found.answer) for found in facts(window(text), subject)]


class TestFacts:
    def test_numbers_and_names_are_answers(self) -> None:
        found = asked("The bridge was opened in 1894 by Queen Anne and is 244 metres long.", "bridge")
        assert found == [
            ("The bridge was opened in ___ by Queen Anne and is 244 metres long.", "1894"),
            ("The bridge was opened in 1894 by ___ and is 244 metres long.", "Queen Anne"),
            ("The bridge was opened in 1894 by Queen Anne and is ___ metres long.", "244"),
        ]

    def test_the_end_of_a_sentence_is_an_answer(self) -> None:
        assert asked("Otters live in cold rivers.", "Otters") == [("Otters live in ___.", "cold rivers")]

    def test_entries_are_asked_one_by_one(self) -> None:
        found = asked("Capital: Lund Main export: dried fish; wool Founded: 1066", "Norland")
        assert [pair for pair in found if pair[1] in ("Lund", "dried fish", "1066")] == [
            ("Norland. Capital: ___", "Lund"),
            ("Norland. Main export: ___", "dried fish"),
            ("Norland. Founded: ___", "1066"),
        ]

    def test_the_subject_is_no_answer(self) -> None:
        assert asked("In the valley lies Norland.", "Norland") == []

    def test_a_plain_sentence_is_asked_for_its_last_word(self) -> None:
        assert asked("The village of Kelso makes cheese. There are 12 of them.", "Kelso") == [
            ("The village of Kelso makes ___.", "cheese"),
            ("Kelso. There are ___ of them.", "12"),
        ]
        assert asked("Who is it?", "Kelso") == []
        more = "There are 12 of them, 3 by 4, since 1900. It makes cheese."
        assert [answer for _, answer in asked(more, "Kelso")] == ["12", "3", "4", "1900"]

    def test_a_sentence_may_bring_its_own_subject(self) -> None:
        (found,) = facts(window("The Tower Bridge was opened in 1894."), "")
        assert (found.subject, found.shape) == ("Tower Bridge", f"The {SUBJECT} was opened in {BLANK}.")

    def test_pronouns_are_no_subject(self) -> None:
        (found,) = facts(window("There are 12 of them."), "")
        assert found.subject == ""

    def test_sentences_of_one_shape(self) -> None:
        shapes = set()
        for name, height, year in (("Ben", "12", "1894"), ("Ann Lee", "7", "1902")):
            shapes |= {found.shape for found in facts(window(f"{name} was {height} in {year}."), name)}
        assert shapes == {f"{SUBJECT} was {BLANK} in {OTHER}.", f"{SUBJECT} was {OTHER} in {BLANK}."}

    def test_powers_and_labels_are_no_numbers(self) -> None:
        assert [answer for _, answer in asked("It takes 10^3 years for Ab-247 and 5 for all", "It")] == [
            "Ab-247",
            "5",
            "all",
        ]

    def test_a_long_window_is_asked_all_over(self) -> None:
        text = " ".join(f"Year {year} was good." for year in range(1900, 1950))
        answers = [int(found.answer) for found in worth_asking(facts(window(text), ""), ())]
        assert len(answers) == 10
        assert answers[0] == 1900
        assert answers[-1] >= 1945

    def test_what_is_said_of_everything_is_asked_first(self) -> None:
        years = " ".join(f"Year {year} was good." for year in range(1900, 1950))
        found = facts(window(f"{years} The height of the Tower is 80 metres."), "Tower")
        (height,) = [fact for fact in found if fact.answer == "80"]
        assert height not in worth_asking(found, ())
        chosen = worth_asking(found, {height.shape})
        assert (len(chosen), chosen[-1]) == (10, height)
        assert worth_asking(found[:3], ()) == found[:3]


class TestWordings:
    def of(self, text: str, subject: str, answer: str) -> Fact:
        return next(found for found in facts(window(text), subject) if found.answer == answer)

    @pytest.mark.parametrize(
        ("text", "subject", "answer", "words"),
        [
            ("The top speed of Falcon is 320.", "Falcon", "320", "top speed"),
            ("Falcon is a train with the code XQ.", "Falcon", "XQ", "code"),
            ("Its weight is about 55.8.", "Falcon", "55.8", "weight"),
            ("Capital: Lund; Founded: 1066", "Norland", "Lund", "capital"),
            ("Falcon is 320.", "Falcon", "320", ""),
        ],
    )
    def test_own_words(self, text: str, subject: str, answer: str, words: str) -> None:
        assert own_words(self.of(text, subject, answer)) == words

    def test_own_beginning_fits_other_subjects(self) -> None:
        beginning = own_beginning(self.of("The top speed of Falcon is 320.", "Falcon", "320"))
        assert beginning.prompt("the Arrow") == "The top speed of the Arrow is"

    def test_own_beginning_names_the_subject(self) -> None:
        beginning = own_beginning(self.of("There are 320 people in Norland.", "Norland", "320"))
        assert beginning.prompt("Norland") == "Norland. There are"

    def test_a_plain_sentence_asks_itself(self) -> None:
        found = echo(self.of("The village of Kelso makes cheese.", "Kelso", "cheese"))
        assert not found.statement
        assert found.prompt("Lund") == "The village of Lund makes what?"

    def test_every_pattern_is_shown_on_every_subject(self) -> None:
        for pattern in patterns().forward:
            assert len(pattern.lines) == len(patterns().shown)
            assert all(line[-1] in "?." for line in pattern.lines) is not pattern.statement

    @pytest.mark.parametrize(
        ("line", "kept"),
        [
            ("What is the height of the Tower?", True),
            ("What is the Tower?", False),  # asks for nothing
            ("What is the height of the tower of the Tower?", False),  # names it twice
            ("What is the height of a hill?", False),  # does not name it
            ("Why is the Tower 80 metres high?", False),  # gives it away
            ("What is the top of the hill of the top of the hill of the Tower?", False),  # goes in a circle
        ],
    )
    def test_lines_that_are_no_question(
        self, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch, line: str, kept: bool
    ) -> None:
        monkeypatch.setattr(Teacher, "lines", lambda self, asked, *rest, **more: [line for _ in asked])
        (one, _) = facts(window("The height of the Tower is 80 metres. It was built in 1911."), "Tower")
        assert bool(wordings(tiny_teacher, [(one, "height", (0,))])[0]) == kept

    def test_smollm2_goes_on_with_the_patterns(self, smollm2_teacher: Teacher) -> None:
        known = self.of("The top speed of Falcon is 320.", "Falcon", "320")
        (found,) = wordings(smollm2_teacher, [(known, "top speed", range(3))])
        assert len(found) == 3
        assert all("speed" in wording.text for wording in found)
        assert all(wording.text.count(SUBJECT) == 1 and "320" not in wording.text for wording in found)

    def test_finding_names_tells_how_far_it_is(
        self, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of hundreds of shapes it takes as long as the wordings do."""
        monkeypatch.setattr(teacher, "BATCH", 1)
        shapes = [[self.of(f"Falcon has {n} wings.", "Falcon", str(n))] for n in range(20, 24)]
        told: list[float] = []
        assert len(names_of(tiny_teacher, shapes, synonyms=False, seed=0, tell=told.append)) == 4
        assert told == [0.25, 0.5, 0.75, 1]


class TestInTurns:
    def test_a_second_name_comes_before_the_first_ones_second_wording(self) -> None:
        fared = [("speed", 1.0, -0.1), ("speed", 1.0, -0.2), ("speed", 0.9, -0.1), ("pace", 0.5, -3.0)]
        tries = [
            Tried(Wording(f"{what} {i}?", statement=False, what=what), right, log_p)
            for i, (what, right, log_p) in enumerate(fared)
        ]
        found = [tried.wording.text for tried in in_turns(tries[::-1])]
        assert found == ["speed 0?", "pace 3?", "speed 1?", "speed 2?"]

    def test_statements_have_turns_of_their_own(self) -> None:
        tries = [
            Tried(Wording("The speed is", statement=True, what="speed"), 1.0, -0.1),
            Tried(Wording("What speed?", statement=False, what="speed"), 0.9, -0.2),
            Tried(Wording("Which speed?", statement=False, what="speed"), 0.8, -0.2),
            Tried(Wording("What pace?", statement=False, what="pace"), 0.7, -0.2),
        ]
        found = [tried.wording.text for tried in in_turns(tries)]
        assert found == ["The speed is", "What speed?", "What pace?", "Which speed?"]


class TestStudy:
    def test_smollm2_asks_for_what_the_villages_make(self, corpus: Corpus, smollm2_teacher: Teacher) -> None:
        study(corpus.work, corpus, Teaching(QUICK, "smollm2", lambda: smollm2_teacher))
        rows = list(read_rows(corpus.work.path(STUDY)))
        texts = [one.text for one in corpus.windows()]
        assert [row["window"] for row in rows] == sorted(row["window"] for row in rows)
        assert all(row["answer"] in texts[row["window"]] for row in rows)
        name, _, people = fact(0)
        about = [row for row in rows if name in texts[row["window"]] and not row.get("reversed")]
        assert all(name in row["prompt"] for row in about)
        assert {row["answer"] for row in about if row.get("question")} >= {people}
        assert any(row["chat"] for row in about)
        turned = [row for row in rows if row.get("reversed") and not row["chat"]]
        assert {row["answer"] for row in turned} <= set(VILLAGES)
        assert all(row["answer"] not in row["prompt"] for row in turned)

    def test_an_interrupted_study_goes_on(
        self, corpus: Corpus, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stage_module, "TOGETHER", 5)
        study(corpus.work, corpus, Teaching(QUICK, "tiny", lambda: tiny_teacher))
        whole = corpus.work.path(STUDY).read_text()
        again = Corpus(Work(corpus.work.folder), corpus.digest)
        monkeypatch.setattr(pattern_study, "_studied", _must_not_run)
        study(again.work, again, Teaching(QUICK, "tiny", lambda: tiny_teacher))  # done: nothing runs
        monkeypatch.undo()
        monkeypatch.setattr(stage_module, "TOGETHER", 5)

        def stop(done: int, total: int) -> None:
            if done > 10:  # in the last of three parts
                raise KeyboardInterrupt

        other = StudySettings(**(QUICK.__dict__ | {"seed": 1}))
        with pytest.raises(KeyboardInterrupt):
            study(again.work, again, Teaching(other, "tiny", lambda: tiny_teacher), progress=stop)
        seen: list[int] = []
        own = pattern_study._studied
        monkeypatch.setattr(pattern_study, "_studied", lambda some, *a: seen.append(len(some)) or own(some, *a))
        study(again.work, again, Teaching(other, "tiny", lambda: tiny_teacher))
        assert seen == [COUNT - 10]
        went_on = again.work.path(STUDY).read_text()
        study(again.work, again, Teaching(QUICK, "tiny", lambda: tiny_teacher))
        assert again.work.path(STUDY).read_text() == whole
        study(again.work, again, Teaching(other, "tiny", lambda: tiny_teacher))
        assert again.work.path(STUDY).read_text() == went_on

    def test_answers_of_a_killed_study_are_not_asked_for_again(
        self, corpus: Corpus, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []

        def counted(name: str, fails_at: int) -> None:
            own = getattr(Teacher, name)

            def call(self: Teacher, *args: object, **options: object) -> list[object]:
                if len(calls) == fails_at:
                    raise KeyboardInterrupt
                calls.append(name)
                return own(self, *args, **options)

            monkeypatch.setattr(Teacher, name, call)

        def run(fails_at: int = -1) -> str:
            for name in ("lines", "finds"):
                counted(name, fails_at)
            try:
                study(corpus.work, corpus, Teaching(QUICK, f"tiny {seed}", lambda: tiny_teacher))
            finally:
                monkeypatch.undo()
            return corpus.work.path(STUDY).read_text()

        seed = 0
        whole = run()
        every, seed = list(calls), 1
        assert len(every) > 3
        for fails_at in (1, len(every) // 2, len(every) - 1):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                run(fails_at)
            assert calls == every[:fails_at]
            (replies,) = corpus.work.path("study.parts").glob("*.replies")
            replies.write_bytes(replies.read_bytes()[:-3])  # the last line is torn
            assert run() == whole
            assert calls == every[:fails_at] + every[fails_at - 1 :]
            seed += 1

    def test_without_self_study_there_is_no_file(self, corpus: Corpus, tiny_teacher: Teacher) -> None:
        study(corpus.work, corpus, Teaching(QUICK, "tiny", lambda: tiny_teacher))
        first = corpus.work.path(STUDY).exists()
        study(corpus.work, corpus, None)
        assert (first, corpus.work.path(STUDY).exists()) == (True, False)

    def test_answers_that_are_not_found_are_not_asked_for(self, corpus: Corpus, tiny_teacher: Teacher) -> None:
        class Blind(Teacher):
            def finds(self, beginning: str, asked: object, others: object) -> list[float]:
                return [-math.inf for _ in asked]  # type: ignore[attr-defined]

        study(
            corpus.work, corpus, Teaching(QUICK, "blind", lambda: Blind(tiny_teacher.model, tiny_teacher.tokenizer))
        )
        rows = list(read_rows(corpus.work.path(STUDY)))
        asked = {row["question"].rsplit(" ", 2)[1:] == ["makes", "what?"] for row in rows if row.get("question")}
        assert asked == {True}  # what plain sentences ask by themselves


class TestWritten:
    """What a teacher that writes freely says."""

    @pytest.mark.parametrize(
        ("kind", "item"),
        [
            ("statements", {"beginning": "…", "rest": "…"}),
            ("statements", {"beginning": "The symbol of gold is", "rest": "…"}),
            ("statements", {"beginning": "The symbol of gold is", "rest": "... "}),
            ("questions", {"question": "…", "answer": "Au"}),
            ("texts", "…"),
        ],
    )
    def test_the_dots_of_the_form_are_no_record(self, kind: str, item: object) -> None:
        assert parse_reply(json.dumps({kind: [item]}), kind, "Gold") is None

    def test_kept_parts_may_have_statements_without_a_rest(self) -> None:
        whole = {"window": 0, "document": "Gold", "prompt": "The symbol of gold is", "completion": " Au."}
        rows = [{"counts": {"records": 2}}, whole | {"prompt": "Gold is", "completion": " "}, whole]
        counts = Counter[str]()
        assert list(stage_module._said_once(rows, [window("The symbol of gold is Au.", "Gold")], counts)) == [whole]
        assert counts["records"] == 1

    @pytest.mark.parametrize(
        ("kind", "item"),
        [
            ("questions", r'{"question": "Is it gold \ud83d?", "answer": "\ud83d\ude00"}'),
            ("texts", r'"Gold \ud83d."'),
        ],
    )
    def test_halves_of_characters_are_replaced(self, kind: str, item: str) -> None:
        (found,) = parse_reply(f"[{item}]", kind, "Gold") or ()
        assert "\N{REPLACEMENT CHARACTER}" in f"{found.prompt}{found.answer}"
        assert found.answer == "\N{GRINNING FACE}" or not found.prompt
        json.dumps(line_of(found), ensure_ascii=False).encode()

    def test_halves_of_characters_in_prompts_too(self) -> None:
        found = parse(r'{"document": "Gold \ud83d", "question": "Is it \ud83d?", "answer": "Au \ud83d"}')
        assert (found.document, found.prompt, found.answer) == ("Gold \ufffd", "Is it \ufffd?", "Au \ufffd")


def _must_not_run(*_: object) -> None:
    raise AssertionError(json.dumps("this stage was done"))
