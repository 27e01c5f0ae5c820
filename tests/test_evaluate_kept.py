"""Results that are kept: runs that go on, larger limits, other banks."""

from __future__ import annotations

import pathlib
import shutil

import pytest
from evaluating import evaluation, named_model, task_files

from mlx_hiermem.errors import OutputError
from mlx_hiermem.evaluate.results import ResultFile, read_runs
from mlx_hiermem.evaluate.tasks import Task, read_tasks

Tasks = dict[str, Task]


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
