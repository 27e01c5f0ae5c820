"""What a model keeps of its files, and what it says has changed since."""

from __future__ import annotations

import os
import pathlib

import pytest

from mlx_hiermem.bank.commit import LEARNING
from mlx_hiermem.learn.record import LearntFile, Scan, compared, text_digest, without
from mlx_hiermem.learn.work import WRITTEN, Work, read_rows, write_rows
from mlx_hiermem.learn.written import drop_written, join_written, number_written


def test_a_repetition_is_learnt_when_the_first_is_gone(tmp_path: pathlib.Path) -> None:
    def row(name: str, windows: tuple[int, ...] = (), *twins: str) -> LearntFile:
        return LearntFile(str(tmp_path / name), name, name, windows, twins=twins)

    # `e` has a text of its own, and a line of `a`
    rows = [row("a", (1,)), row("b", (), "a"), row("c", (), "d"), row("d", (2,)), row("e", (3,), "d:1", "a:2")]
    learnt = {one.file: one for one in rows}
    now = {file: one.sha256 for file, one in learnt.items()}
    assert not compared(str(tmp_path), learnt, now)
    del now[rows[0].file]
    found = compared(str(tmp_path), learnt, now)
    assert (found.names(found.new), found.names(found.deleted), found.same) == (["b"], ["a"], 1)
    assert found.names(found.changed) == ["e"]


def test_a_file_that_cannot_be_read_is_not_gone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Ashford.txt").write_text("Ashford has a mill.")
    file = str(tmp_path / "Ashford.txt")
    learnt = {file: LearntFile(file, "Ashford.txt", "0", (0,))}
    scan = Scan()
    assert compared(str(tmp_path), learnt, scan.digests(str(tmp_path))).changed
    os.utime(file, (1, 1))

    def refuse(path: pathlib.Path) -> str:
        raise PermissionError(13, "no")

    monkeypatch.setattr("mlx_hiermem.learn.record.file_digest", refuse)
    assert not compared(str(tmp_path), learnt, scan.digests(str(tmp_path)))


def test_a_repetition_elsewhere_has_changed_when_the_first_goes() -> None:
    def row(file: str, windows: tuple[int, ...] = (), *twins: str) -> LearntFile:
        return LearntFile(file, pathlib.Path(file).name, "1", windows, twins=twins)

    here = __file__  # a file that is there
    gone = row("/a/Calder.txt", (1,))
    rows = [gone, row("/b/no longer there", (), "Calder.txt"), row(here, (), "Calder.txt:3"), row("/b/c", (2,))]
    record = {one.file: one for one in rows}
    assert {file: one.sha256 for file, one in without(record, [gone]).items()} == {here: "", "/b/c": "1"}
    record["/c/Calder.txt"] = row("/c/Calder.txt", (3,))  # which has the text too, for all that is known
    assert without(record, [gone])[here].sha256 == "1"


def test_a_pipe_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert Scan().digests(str(tmp_path)) == {}


def test_a_digest_is_that_of_the_text_as_a_bank_reads_it() -> None:
    assert text_digest("a\x02.txt", "Grim\x02wold") == text_digest("a.txt", "Grimwold")


def test_what_was_written_joins_and_goes(tmp_path: pathlib.Path) -> None:
    model, work = tmp_path / "model", Work(tmp_path / "work")
    (model / LEARNING).mkdir(parents=True)
    file = model / LEARNING / WRITTEN
    number_written(work, 7)
    join_written(model, work)
    assert not file.exists(), "nothing was written"
    write_rows(file, [{"window": 0}, {"window": 6}])
    write_rows(work.path(WRITTEN), [{"window": 0, "question": "Why?"}, {"window": 2}])
    number_written(work, 7)
    for _ in range(2):
        join_written(model, work)
        assert [row["window"] for row in read_rows(file)] == [0, 6, 7, 9]
    drop_written(model, {0, 9})
    assert list(read_rows(file)) == [{"window": 6}, {"window": 7, "question": "Why?"}]
