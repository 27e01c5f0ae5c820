"""Results that are kept: runs that go on, larger limits, other banks."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import time
from dataclasses import replace

import pytest
from evaluating import evaluation, named_model, task_files

from mlx_hiermem.bank.bank import MANIFEST
from mlx_hiermem.errors import OutputError, TaskError
from mlx_hiermem.evaluate.compare import Paired, columns, compare
from mlx_hiermem.evaluate.results import PARTS, ResultFile, Run, read_runs
from mlx_hiermem.evaluate.statistics import difference, figure
from mlx_hiermem.evaluate.tasks import Task, find_tasks, read_tasks

Tasks = dict[str, Task]
RELATIONS, WORDINGS = ("name", "number"), ("canonical", "paraphrased")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return named_model(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return read_tasks(task_files(tmp_path_factory.mktemp("tasks")))


def test_a_run_that_was_broken_off_goes_on(model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path) -> None:
    whole = evaluation(model, tmp_path / "whole")
    expected = whole.run(whole.prepare(tasks["choice"], ("fetched",)), "fetched")

    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if 3 <= done < total:
            raise KilledError

    broken = evaluation(model, tmp_path / "broken")
    prepared = broken.prepare(tasks["choice"], ("fetched",))
    with pytest.raises(KilledError):
        broken.run(prepared, "fetched", progress=kill)
    (file,) = (tmp_path / "broken").glob("*.jsonl")
    kept = file.read_text().count("\n") - 1
    assert 3 <= kept < 12
    with file.open("a") as torn:
        torn.write('{"id": "torn", "li')  # what was being written when the machine went down
    steps: list[int] = []
    run = evaluation(model, tmp_path / "broken").run(
        prepared, "fetched", progress=lambda done, total: steps.append(done)
    )
    assert steps[0] == kept
    assert [row["id"] for row in run.rows] == [row["id"] for row in expected.rows]
    assert [row["accuracy"] for row in run.rows] == [row["accuracy"] for row in expected.rows]
    assert "torn" not in file.read_text()


def test_a_larger_limit_adds_to_what_is_there(model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path) -> None:
    tested = evaluation(model, tmp_path)
    few = tested.run(tested.prepare(tasks["cloze"], ("none",), limit=4), "none")
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines()
    more = tested.run(tested.prepare(tasks["cloze"], ("none",), limit=9), "none")
    assert (len(few.rows), len(more.rows)) == (4, 9)
    assert more.rows[:4] == few.rows
    assert file.read_text().splitlines()[:5] == lines
    assert tested.run(tested.prepare(tasks["cloze"], ("none",), limit=4), "none").rows == few.rows
    assert [run.task for run in read_runs(tmp_path)] == ["cloze"]


def test_results_of_another_bank_are_not_taken(model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    manifest = other / "bank" / "bank.json"
    manifest.write_text(manifest.read_text().replace("CC0", "MIT"))
    out = tmp_path / "out"
    for folder in (model, other):
        tested = evaluation(folder, out)
        prepared = tested.prepare(tasks["cloze"], ("none", "fetched"), limit=2)
        for memory in ("none", "fetched"):
            tested.run(prepared, memory)
    names = [file.name for file in out.iterdir()]
    assert len([name for name in names if ".fetched." in name]) == 2
    assert len([name for name in names if ".none." in name]) == 1, "without memory the bank does not matter"


def test_results_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--out"):
        ResultFile(tmp_path / "file" / "x.jsonl", {})


def test_the_newest_of_two_runs_counts(model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path) -> None:
    """After an edit of the bank a folder has the results of before, too."""
    other = shutil.copytree(model, tmp_path / "model")
    manifest = other / "bank" / MANIFEST
    heads = []
    for change in (("", ""), ("CC0", "MIT")):
        manifest.write_text(manifest.read_text().replace(*change))
        tested = evaluation(other, tmp_path / "out")
        heads.append(tested.run(tested.prepare(tasks["cloze"], ("fetched",), limit=2), "fetched").head)
        time.sleep(0.01)
    assert heads[0] != heads[1]
    assert [run.head for run in read_runs(tmp_path / "out")] == [heads[1]]
    (older,) = [file for file in (tmp_path / "out").glob("*.jsonl") if heads[0]["fingerprint"][:12] in file.name]
    os.utime(older)
    assert [run.head for run in read_runs(tmp_path / "out")] == [heads[0]]


def test_kept_results_have_their_parts(model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path) -> None:
    tested = evaluation(model, tmp_path)
    prepared = tested.prepare(tasks["asked"], ("none", "fetched"))
    live = [tested.run(prepared, memory) for memory in ("none", "fetched")]
    (kept,) = [run for run in read_runs(tmp_path) if run.memory == "none"]
    assert kept.parts().keys() == live[0].parts().keys() == {"", *(f"{r} {w}" for r in RELATIONS for w in WORDINGS)}
    bare = Run(kept.head, [{name: row[name] for name in row if name not in PARTS} for row in kept.rows])
    for first, second in ((live[1], kept), (live[1], bare), (bare, live[1])):
        found = compare(columns([("a", first), ("b", second)]))
        assert len(found.paired) == 5


def test_rows_of_one_id_are_refused(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"id": "3", "text": "oak elm"}\n{"text": "fir"}\n{"text": "ash yew bay"}\n')
    (task,) = find_tasks([str(file)], None)
    task = replace(task, kind="perplexity")
    with pytest.raises(TaskError, match=r"texts\.jsonl: line 3 has the id of line 1, 3\. Give each row an `id`"):
        evaluation(model, tmp_path / "out").prepare(task, ("none",))
    prepared = evaluation(model, tmp_path / "out").prepare(task, ("none",), skip_bad=True)
    assert [one.line for one in prepared.examples] == [1, 2]
    assert prepared.bad == ["line 3 has the id of line 1, 3"]


def test_a_text_without_spaces_has_no_perplexity_of_words() -> None:
    rows = [{"nll": 9000.0, "tokens": 3000, "words": 1, "bytes": 9000}] * 2
    found = figure(rows, "word_perplexity")
    assert (found.value, found.error, found.to_json()["value"]) == (math.inf, None, None)
    assert figure(rows, "perplexity").value == pytest.approx(math.exp(3))
    worse = [row | {"nll": 9900.0} for row in rows]
    apart = difference(rows, worse, "word_perplexity")
    pair = Paired("t", "", "word_perplexity", "b", found, found, apart)
    assert pair.to_json()["first"]["value"] is pair.to_json()["difference"]["value"] is None
