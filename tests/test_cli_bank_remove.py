"""`hiermem bank remove`: probes before and after, the texts that go too, and removals that died."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from command_line import Run
from test_cli_bank import files

from mlx_hiermem.bank import commit, edit
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.commit import interrupted
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.locks import locked


def kept_leaves(model: pathlib.Path) -> list[list[str]]:
    """The leaves of each text that the model has kept."""
    return [list(map(str, leaves)) for leaves in TrainingSet.open(model / "learning" / "examples").leaves_of()]


@pytest.fixture
def learnt(copied: pathlib.Path) -> pathlib.Path:
    """A model with three kept texts: of 1.1, of 1.1 and 0.1, and of 0.1."""
    with TrainingSetWriter(copied / "learning" / "examples") as out:
        for number, leaves in enumerate((["1.1"], ["1.1", "0.1"], ["0.1"])):
            tokens = np.arange(number, number + 3, dtype=np.int32)
            out.add(TrainingExample(tokens, np.array([False, True, True])), map(Path.parse, leaves))
    return copied


@pytest.mark.parametrize("named", ["", "bank"])
def test_the_texts_of_what_is_removed_go_too(bank_command: Run, learnt: pathlib.Path, named: str) -> None:
    result = bank_command("remove", learnt / named, "1.1", "--yes")
    assert result.code == 0
    assert f"dropped  1 text from {learnt / 'learning'}" in result.out
    assert kept_leaves(learnt) == [["0.1"], ["0.1"]]
    assert not (learnt / "bank" / "forget.json").exists()


def test_a_removal_that_died_before_the_texts_went_is_finished_at_the_next_command(
    bank_command: Run, learnt: pathlib.Path
) -> None:
    edit.remove(learnt / "bank", [Path((1, 1))])
    assert len(kept_leaves(learnt)) == 3
    result = bank_command("verify", learnt)
    assert (result.code, "1 text dropped" in result.err) == (0, True)
    assert kept_leaves(learnt) == [["0.1"], ["0.1"]]
    assert bank_command("verify", learnt).err == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "finish", lambda _: frozenset())  # the process dies where it would carry it out
        edit.remove(learnt / "bank", [Path((0, 1))])
    assert "dropped" not in bank_command("ls", learnt).err
    assert "dropped  2 texts" in bank_command("remove", learnt, "0.1", "--yes").out
    assert kept_leaves(learnt) == []


def test_a_removal_that_died_before_the_blocks_went_is_finished_too(
    bank_command: Run, learnt: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its note was in the bank already, so that the nodes counted as removed, and the edit stayed half."""

    def dies(file: pathlib.Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            edit.remove(learnt / "bank", [Path((1, 1))])
    block = learnt / "bank" / block_name(Path((1, 1)))
    assert block.exists()
    assert (learnt / "bank" / "forget.json").exists()
    assert bank_command("remove", learnt, "1.1", "--yes").code == 0
    assert not block.exists()
    assert interrupted(learnt / "bank") is None
    assert kept_leaves(learnt) == [["0.1"], ["0.1"]]


def test_texts_that_cannot_be_dropped_are_told_of(bank_command: Run, learnt: pathlib.Path) -> None:
    edit.remove(learnt / "bank", [Path((1, 1))])
    with locked(learnt / "learning", "reading"):
        result = bank_command("ls", learnt)
    assert (result.code, "texts of removed nodes are still kept: another process" in result.err) == (0, True)
    assert (learnt / "bank" / "forget.json").exists()


def test_remove_asks_in_a_terminal(
    bank_command: Run, copied: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def confirm(text: str, abort: bool) -> None:
        asked.append(text)
        raise HierMemError("no")

    monkeypatch.setattr("typer.confirm", confirm)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    before = files(copied)
    assert bank_command("remove", copied, "1").code == 1
    assert asked == [f"Delete 4 blocks, 8.5 kB, from {copied / 'bank'}?"]
    assert files(copied) == before
    result = bank_command("remove", copied, "1.1", "0.1", "0.2", "--yes")
    assert "The blocks above (0, 1), the generic block and the anchor may still hold" in " ".join(
        result.out.split()
    )
    assert len(asked) == 1
    assert bank_command("remove", copied, "0.0", "--yes").out.startswith("removed  1 block, 1.7 kB")
