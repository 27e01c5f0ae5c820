"""What a model keeps of its files, and what it says has changed since."""

from __future__ import annotations

import os
import pathlib

import pytest

from mlx_hiermem.learn.record import LearntFile, Scan, compared


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
