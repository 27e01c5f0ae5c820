"""The demo: what it asks, how it shows it, and the bank that it ships."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from typing import Any

import pytest
from tiny import Aimed, give_sources, make_model

from mlx_hiermem import load
from mlx_hiermem.apps.cli import demo
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.apps.demo import exam, tour
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.files import file_digest
from mlx_hiermem.source_search import Source, SourceSearch

MOST_BYTES = 25_000_000  # of what is in the repository
SHARE = {"right": 3, "share": 0.6, "interval": [0.23, 0.88]}
RESULT = {memory: {"questions": 5, "lenient": SHARE, "strict": SHARE} for memory in demo.CALLED}


def test_one_question_of_each_topic_is_asked() -> None:
    """The first, and one by which settings were chosen: no result is of it."""
    asked, every = exam.sample(), exam.questions()
    assert len(every) == 960
    assert len({question.topic for question in asked}) == len(asked) == 11
    for question in asked:
        before = every[: every.index(question)]
        assert len(before) < exam.DEVELOPMENT
        assert question.topic not in {one.topic for one in before}


@pytest.fixture
def shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `hiermem demo` on a tiny model whose bank keeps sources; returns what it prints."""
    folder = make_model(tmp_path / "model")
    tree = MemoryBank.open(folder / "bank").tree
    rabbits = Aimed(tree, {"rabbits": Path((1, 1))}, Path((0, 1)))
    texts = {"1.1": [("Rabbit", "Such are rabbits.")], "0.1": [("All else", "It is as it is.")]}
    give_sources(folder / "bank", texts, rabbits.embed)
    monkeypatch.setattr("mlx_hiermem.router.load_embedder", lambda _: rabbits)
    monkeypatch.setattr(tour, "prepare", lambda say: folder)
    monkeypatch.setattr(exam, "stored", lambda: RESULT)
    monkeypatch.setattr(exam, "TOKENS", 4)
    monkeypatch.setattr(demo.console, "_width", 100)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hiermem", "demo", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_tour_shows_answers_paths_and_sources(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rabbit = Source("rabbits.txt", "Rabbit", "line 1", "Rabbits hop.", 0.9)
    monkeypatch.setattr(SourceSearch, "find", lambda self, leaf, *_: (rabbit,) if leaf == (1, 1) else ())
    lines = shown().splitlines()
    for name in ("no memory", "generic block", "fetched", "fetched + source"):
        assert name in next(line for line in lines if "generic block" in line)
    for question in exam.sample():
        assert any(line.startswith(question.topic) for line in lines)
    at = next(number for number, line in enumerate(lines) if "order of mammals do rabbits" in line)
    assert lines[at + 1].count("✗") == 4
    assert lines[at + 2].startswith("  1.1 ")
    assert " in " in lines[at + 2]
    assert lines[at + 2].endswith(" ms · from Rabbit")
    assert sum("no source in this bank says this" in line for line in lines) == 10
    [fetched] = [line for line in lines if line.startswith("fetched  ")]
    assert fetched.split() == ["fetched", *("60.0%", "(23%", "to", "88%)") * 2]
    assert max(map(len, lines[2:-1])) <= 100


@pytest.mark.slow
def test_the_tour_as_json(shown: Any) -> None:
    told = json.loads(shown("--json"))
    assert told["exam"] == RESULT
    assert [row["question"] for row in told["questions"]] == [question.text for question in exam.sample()]
    row = told["questions"][0]
    assert row["fetched"]["selection"]["memory"] == "fetched"
    assert row["fetched+source"]["selection"]["memory"] == "fetched+source"
    assert {"reply", "lenient", "strict", "source"} <= row["none"].keys()


def test_the_whole_exam_can_be_asked_again(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = exam.questions()
    monkeypatch.setattr(exam, "questions", lambda: questions[: exam.DEVELOPMENT + 2])
    told = json.loads(shown("--full", "--json"))["exam"]
    assert list(told) == list(exam.MEMORIES)
    assert {row["questions"] for row in told.values()} == {2}


def test_a_long_reply_is_cut_before_the_answer() -> None:
    reply = "What you are looking for is a method that is called coiling, by hand."
    assert demo._cut("coiling", ("Coiling",), 20) == "coiling"
    assert "coiling" in demo._cut(reply, ("Coiling",), 20)[:20]
    assert demo._cut(reply, ("beating",), 20) == reply


def test_the_bundled_bank_is_whole_and_small() -> None:
    bank = MemoryBank.open(tour.BANK)
    assert list(bank.problems()) == []
    assert sum(file.stat().st_size for file in tour.BANK.rglob("*") if file.is_file()) <= MOST_BYTES
    assert bank.manifest.generic is not None
    assert all(bank.manifest.label(node) for node in bank.manifest.blocks)
    assert bank.sources is not None
    titles = {window.title for leaf in bank.sources.all() for window in leaf.windows}
    assert titles == {question.document for question in exam.questions()}


def test_the_stored_result_is_of_the_exam() -> None:
    """Of the questions that nothing was chosen by, in all the ways that the table shows."""
    file = pathlib.Path(exam.__file__).with_name("results.json")
    first, end = map(int, json.loads(file.read_text(encoding="utf-8"))["rows"].split("-"))
    assert exam.DEVELOPMENT <= first < end <= len(exam.questions())
    stored = exam.stored()
    assert list(stored) == list(demo.CALLED)
    for row in stored.values():
        assert row["questions"] == end - first
        for rule in ("lenient", "strict"):
            assert row[rule]["share"] == row[rule]["right"] / row["questions"]
            low, high = row[rule]["interval"]
            assert low <= row[rule]["share"] <= high
    assert stored["fetched"]["lenient"]["share"] > stored["generic"]["lenient"]["share"]


def test_what_somebody_has_changed_is_put_aside(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the anchor is tiny, and the bundled bank is one that belongs to it."""
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(tour.assets, "fetch", lambda name, say: tmp_path)

    def convert(source: str, out: pathlib.Path, overwrite: bool) -> None:
        shutil.copytree(folder / "anchor", out / "anchor")

    monkeypatch.setattr("mlx_hiermem.convert.pipeline.convert", convert)
    said: list[str] = []
    made = tour.prepare(said.append, bank=folder / "bank")
    manifest = made / "bank" / MANIFEST
    manifest.write_text(manifest.read_text() + " ")
    assert tour.prepare(said.append, bank=folder / "bank") == made
    aside = made.with_name(f"{made.name}.changed-1")
    assert said[-1] == f"you have changed the demo's model: yours is now {aside}"
    assert (aside / "bank" / MANIFEST).read_text().endswith(" ")
    manifest.write_text("{}")
    (made / tour.INSTALLED).write_text(file_digest(manifest))  # of an earlier version, as it was put there
    tour.prepare(said.append, bank=folder / "bank")
    assert sorted(path.name for path in made.parent.iterdir()) == [made.name, aside.name]


def test_the_bank_answers_what_the_anchor_cannot(
    smollm2_anchor: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real weights, real routes: what `hiermem demo` asks, with shorter replies."""
    monkeypatch.setattr(exam, "MEMORIES", ("none", "fetched"))
    monkeypatch.setattr(exam, "TOKENS", 20)
    (tmp_path / "anchor").symlink_to(smollm2_anchor)
    shutil.copytree(tour.BANK, tmp_path / "bank")
    assert tour.ready(tmp_path)
    model = load(tmp_path)
    right = {memory: row["lenient"]["right"] for memory, row in exam.measured(model, exam.sample(), None).items()}
    assert right["fetched"] > right["none"]
