"""The ground floor: digests, writing beside and renaming, locks, and readers whose errors name file and line."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

import pytest

from mlx_hiermem.errors import CheckpointError, FileError, OutputError
from mlx_hiermem.files import (
    file_digest,
    new_file,
    new_folder,
    partial_name,
    read_json,
    read_json_lines,
    read_lines,
    read_text,
    replace_folder,
    restore_folder,
    to_disk,
    write_json,
    write_json_lines,
    write_text,
    writing,
)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_after(file: pathlib.Path, error: BaseException) -> None:
    file.write_text("half")
    raise error


def test_digest(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(b"gold" * 100_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"gold" * 100_000).hexdigest()


def test_a_file_is_written_whole(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with new_file(file) as partial:
        partial.write_text("new")
        assert (partial, file.read_text()) == (partial_name(file), "old")
    assert (file.read_text(), names(tmp_path)) == ("new", ["a.txt"])
    write_json(tmp_path / "b.json", {"ö": 1})
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == '{\n  "ö": 1\n}\n'
    assert write_json_lines(tmp_path / "c.jsonl", ({"n": n} for n in range(3))) == 3
    assert [value["n"] for _, value in read_json_lines(tmp_path / "c.jsonl")] == [0, 1, 2]
    assert write_json_lines(tmp_path / "d.jsonl", []) == 0
    to_disk(tmp_path)


@pytest.mark.parametrize("error", [KeyError("a"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file(tmp_path: pathlib.Path, error: BaseException) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(type(error)), new_file(file) as partial:
        fail_after(partial, error)
    assert (file.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def test_a_full_disk_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match=r"cannot write .*a\.txt: the disk is full\. Free some space"):
            write_text(tmp_path / "a.txt", "gold", hint="Free some space.")
        patch.setattr(os, "rename", full)
        with (
            pytest.raises(OutputError, match=r"cannot write .*model: the disk is full"),
            new_folder(tmp_path / "model"),
        ):
            pass
    assert names(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write /dev/null/a: Not a directory"):
        write_text(pathlib.Path("/dev/null/a"), "gold")
    with pytest.raises(OutputError, match=r"/dev/null/a: Not a directory"), new_folder(pathlib.Path("/dev/null/a")):
        pass
    (tmp_path / "full" / "a").mkdir(parents=True)
    with (
        pytest.raises(OutputError, match=r"cannot write .*full: Directory not empty"),
        new_folder(tmp_path / "full"),
    ):
        pass
    with pytest.raises(OutputError, match=r"cannot write .*full: Is a directory"):
        write_text(tmp_path / "full", "gold")
    assert names(tmp_path) == ["full"]


def test_a_read_only_folder_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: pathlib.Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(pathlib.Path, "write_text", refuse)  # root may write in any folder
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: Read-only file system"):
        write_text(tmp_path / "a.txt", "gold")


def test_a_folder_is_written_whole(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "model"
    partial_name(out).mkdir()
    (partial_name(out) / "left").write_text("of a process that was killed")
    with new_folder(out) as partial:
        (partial / "a").write_text("gold")
        assert not out.exists()
    assert (names(out), names(tmp_path)) == (["a"], ["model"])
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other") as partial:
        fail_after(partial / "a", KeyboardInterrupt())
    assert names(tmp_path) == ["model"]


def test_a_copy_that_fails_says_why(tmp_path: pathlib.Path) -> None:

    with (
        pytest.raises(OutputError, match=r"cannot write .*out: No space left on device"),
        writing(tmp_path / "out"),
    ):
        raise shutil.Error([("from", "to", "No space left on device")])


def folder(path: pathlib.Path, content: str) -> pathlib.Path:
    path.mkdir()
    (path / "a").write_text(content)
    return path


def test_a_folder_takes_anothers_place(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "model"
    replace_folder(folder(tmp_path / "new", "1"), out)
    replace_folder(folder(tmp_path / "new", "2"), out)
    assert ((out / "a").read_text(), names(tmp_path)) == ("2", ["model"])
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "nowhere", out)
    assert ((out / "a").read_text(), names(tmp_path)) == ("2", ["model"])


@pytest.mark.skipif(
    not os.path.isdir("/dev/shm"), reason="a second file system is needed; Macs have none that is known"
)
def test_a_folder_from_another_disk_is_copied(tmp_path: pathlib.Path) -> None:
    out = folder(tmp_path / "model", "0")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        replace_folder(folder(pathlib.Path(other) / "new", "1"), out)
    assert ((out / "a").read_text(), names(tmp_path)) == ("1", ["model"])


def test_a_folder_that_was_put_aside_comes_back(tmp_path: pathlib.Path) -> None:
    folder(tmp_path / "model.old", "1")
    restore_folder(tmp_path / "model")
    restore_folder(tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_reading_names_the_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*nothing: No such file or directory\. Look\."):
        read_text(tmp_path / "nothing", hint="Look.")
    (tmp_path / "a").write_bytes(b"\xff\xfe gold")
    for read in (read_text, read_json, lambda file: list(read_lines(file))):
        with pytest.raises(FileError, match=r"cannot read .*a: it is not UTF-8 text"):
            read(tmp_path / "a")
    (tmp_path / "b").write_text('{"a": 1')
    with pytest.raises(CheckpointError, match=r"cannot read .*b: it is not JSON \(.*line 1"):
        read_json(tmp_path / "b", CheckpointError)
    (tmp_path / "b").write_text('{"a": 1}')
    assert read_json(tmp_path / "b") == {"a": 1}


def test_lines_are_counted_as_an_editor_does(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "one\u2028two"}\n\n  \r\n3\r\n', encoding="utf-8")
    assert list(read_json_lines(file)) == [(1, {"a": "one\u2028two"}), (4, 3)]
    file.write_text("1\n\n{\n")
    with pytest.raises(CheckpointError, match=r"a\.jsonl:3 is not JSON\. Correct it\."):
        list(read_json_lines(file, CheckpointError, "Correct it."))


def test_json_that_is_nested_too_deeply(tmp_path: pathlib.Path) -> None:
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "a.json").write_bytes(deep)
    with pytest.raises(FileError, match="nested too deeply"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileError, match=r"a\.json:1"):
        list(read_json_lines(tmp_path / "a.json"))
