"""Two processes that want to write the same: the second is told who has it, and changes nothing."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from tiny import make_model
from typer.testing import CliRunner

from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.assets import cache_folder
from mlx_hiermem.convert.staging import partial_folder
from mlx_hiermem.errors import OutputError
from mlx_hiermem.evaluate.results import ResultFile
from mlx_hiermem.locks import locked

HEAD = {"format": "mlx-hiermem-eval", "version": 1, "model": "m", "memory": "none", "task": {"name": "a"}}


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_model(tmp_path / "model")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def notes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where this test's own notes are; other tests have locks at the same time."""
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path / "cache"))
    return cache_folder() / "locks"


def test_one_process_at_a_time(tmp_path: pathlib.Path, notes: pathlib.Path) -> None:
    script = f"""
import pathlib
from mlx_hiermem.locks import locked
with locked(pathlib.Path({str(tmp_path)!r}), "writing"):
    print("held")
"""

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)

    with locked(tmp_path, "pulling into"):
        told = re.escape(f"another process is writing {tmp_path}: ") + rf".* \(process {os.getpid()}, since "
        assert re.search(told, other().stderr)
        assert other().stderr.rstrip().endswith("Wait for it to end.")
        with pytest.raises(OutputError, match="another process is pulling into"), locked(tmp_path, "pulling into"):
            pass
    assert list(notes.iterdir()) == []
    assert other().stdout == "held\n"
    with pytest.raises(BlockingIOError), locked(tmp_path, "writing"):
        raise BlockingIOError  # the block's own


def test_a_note_that_is_missing_or_damaged_is_no_reason_to_fail(
    tmp_path: pathlib.Path, notes: pathlib.Path
) -> None:
    with locked(tmp_path, "writing"):
        (note,) = notes.iterdir()
        for text in ("", "[]", '{"pid": "x", "command": 3, "since": "now"}', "[" * 9999):
            note.write_text(text)
            with pytest.raises(OutputError, match=rf"is writing {tmp_path}\. Wait"), locked(tmp_path, "writing"):
                pass
        note.unlink()
        note.mkdir()  # and one that cannot be written either
    with locked(tmp_path, "writing"):
        pass
    note.rmdir()


def test_what_was_renamed_meanwhile_is_not_held(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had the lock has given the folder its name; what was opened before is no folder in the making."""
    folder, flock = tmp_path / "model.partial", "mlx_hiermem.locks._taken"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(flock, lambda descriptor: bool(os.rename(folder, tmp_path / "model")) or True)
        with pytest.raises(OutputError, match="another process is writing"), locked(folder, "writing"):
            pass


COMMANDS = {
    "bank block model 1": "model/bank",
    "bank reach model 1.5": "model/bank",
    "bank remove model 1 --yes": "model/bank",
    "bank add-block model model/bank/blocks/1.safetensors --path 2 --replace": "model/bank",
    "bank repair model --from model": "model/bank",
    "bank add model docs": "model.learn",
    "learn docs out --anchor model": "out.learn",
    "bank merge model model out --prefer first": "out.partial",
    "bank quantize model out --bits 8": "out.partial",
    "bank export model out --without 1": "out.partial",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_writes_says_who_has_it(
    model: pathlib.Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (model.parent / "docs").mkdir()
    (model.parent / "docs" / "a.txt").write_text("Gold does not rust.")
    place = pathlib.Path(COMMANDS[command]).absolute()
    place.mkdir(exist_ok=True)
    before = contents(model.parent)
    with locked(place, "minding"):
        result = CliRunner().invoke(app, command.split())
    assert isinstance(result.exception, OutputError), result.output
    assert re.search(
        rf"another process is .*{place.name}: .* \(process {os.getpid()}, since", str(result.exception)
    )
    assert contents(model.parent) == before


def test_a_folder_in_the_making_has_one_writer(tmp_path: pathlib.Path) -> None:
    """Not even `export`, which begins anew, takes away what another process is at."""
    out = tmp_path / "out"
    with partial_folder(out, resume=False) as first:
        (first / "a").write_text("1")
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with (
                pytest.raises(OutputError, match=r"another process is writing .*out\.partial"),
                partial_folder(out, resume, overwrite),
            ):
                pass
    assert contents(tmp_path) == {str(out / "a"): b"1"}
    (tmp_path / "next.partial" / "left").mkdir(parents=True)
    with partial_folder(tmp_path / "next", resume=False, overwrite=True, keep=False) as second:
        assert list(second.iterdir()) == []


def test_results_have_one_writer(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "results" / "x.jsonl"
    with ResultFile(file, HEAD) as first:
        first.add([{"id": "1"}])
        before = file.read_bytes()
        with pytest.raises(OutputError, match="another process is writing results to"):
            ResultFile(file, HEAD)
        assert file.read_bytes() == before
    file.write_bytes(before + b'{"id": "2')  # as a killed process leaves it
    with ResultFile(file, HEAD) as second:
        assert second.done.keys() == {"1"}
    assert file.read_bytes() == before
