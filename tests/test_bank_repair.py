"""`hiermem bank repair`: what is damaged comes back from another copy, byte for byte, and nothing else does."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import pytest
from hub_server import HubServer
from tiny import HashEmbedder, give_sources, make_model
from typer.testing import CliRunner

from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank import commit
from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.repair import FolderCopy, repair
from mlx_hiermem.bank.sources import WINDOWS_FILE
from mlx_hiermem.errors import BankError, HubError, OutputError
from mlx_hiermem.share.pull import pull

REPO = "me/tiny"
FLIPPED, CUT, GONE = "blocks/0/1.safetensors", "blocks/2.safetensors", "blocks/1/2.safetensors"
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    model = make_model(tmp_path_factory.mktemp("repair") / "model")
    give_sources(model / "bank", {"1.2": [("Gold", "Gold does not rust.")]}, HashEmbedder().embed)
    return model


@pytest.fixture
def model(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(original, tmp_path / "model"))


def contents(folder: pathlib.Path) -> Files:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def flip(file: pathlib.Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def damage(model: pathlib.Path) -> None:
    """Bits, lengths and absences, in blocks and in everything else that the manifest vouches for."""
    bank = model / "bank"
    flip(bank / FLIPPED)
    (bank / CUT).write_bytes((bank / CUT).read_bytes()[:-100])
    (bank / GONE).unlink()
    flip(bank / TREE)
    (bank / GENERIC_FILE).write_bytes(b"")
    flip(bank / WINDOWS_FILE, 30)


DAMAGED = [TREE, GENERIC_FILE, WINDOWS_FILE, FLIPPED, GONE, CUT]


def test_damage_comes_back_byte_for_byte(original: pathlib.Path, model: pathlib.Path) -> None:
    damage(model)
    names = [name for name, _ in MemoryBank.open(model / "bank").damaged()]
    assert sorted(names) == sorted(DAMAGED)
    repaired = repair(model / "bank", FolderCopy(original / "bank"))
    assert (sorted(repaired.mended), repaired.left) == (sorted(DAMAGED), ())
    assert contents(model) == contents(original)
    assert list(check(MemoryBank.open(model / "bank"))) == []


def test_a_whole_bank_is_not_written_to(original: pathlib.Path, model: pathlib.Path) -> None:
    times = {file: file.stat().st_mtime_ns for file in model.rglob("*")}
    assert repair(model / "bank", FolderCopy(original / "bank")).mended == ()
    assert {file: file.stat().st_mtime_ns for file in model.rglob("*")} == times


def test_a_dry_run_says_it_and_changes_nothing(original: pathlib.Path, model: pathlib.Path) -> None:
    damage(model)
    before = contents(model)
    repaired = repair(model / "bank", FolderCopy(original / "bank"), dry_run=True)
    assert sorted(repaired.mended) == sorted(DAMAGED)
    assert contents(model) == before


def test_a_wrong_copy_gives_nothing(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = make_model(tmp_path / "other", absent=("2.0",))
    for file in sorted((other / "bank/blocks").rglob("*.safetensors")):
        flip(file)
    damage(model)
    before = contents(model)
    repaired = repair(model / "bank", FolderCopy(other / "bank"))
    assert repaired.mended == ()
    assert any(line.startswith(FLIPPED) and "another digest" in line for line in repaired.left)
    assert contents(model) == before


def test_two_damaged_copies_mend_each_other(original: pathlib.Path, model: pathlib.Path) -> None:
    other = pathlib.Path(shutil.copytree(model, model.parent / "other"))
    flip(model / "bank" / FLIPPED)
    flip(model / "bank" / CUT)
    flip(other / "bank" / CUT)
    flip(other / "bank" / GENERIC_FILE)
    (other / "bank" / MANIFEST).write_text("{")  # it is not asked
    repaired = repair(model / "bank", FolderCopy(other / "bank"))
    assert repaired.mended == (FLIPPED,)
    assert [line.split()[0] for line in repaired.left] == [CUT]
    (other / "bank" / MANIFEST).write_bytes((model / "bank" / MANIFEST).read_bytes())
    assert repair(other / "bank", FolderCopy(model / "bank")).mended == (GENERIC_FILE,)
    assert contents(model)["bank/" + FLIPPED] == contents(original)["bank/" + FLIPPED]


def test_a_change_that_was_interrupted_is_finished_first(
    original: pathlib.Path, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(model)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "finish", dies_at_the_second())
        with pytest.raises(SystemExit):
            repair(model / "bank", FolderCopy(original / "bank"))
    assert (model / "bank" / "edit").is_dir()
    assert repair(model / "bank", FolderCopy(original / "bank")).left == ()
    assert contents(model) == contents(original)


def dies_at_the_second() -> Callable[[pathlib.Path], frozenset[object]]:
    """`commit.finish` of a process that dies when its own edit stands, before a file of it is in its place."""
    calls = []

    def finish(root: pathlib.Path) -> frozenset[object]:
        calls.append(root)
        if len(calls) > 1:
            raise SystemExit
        return frozenset()

    return finish


def test_the_command(original: pathlib.Path, model: pathlib.Path) -> None:
    def run(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["bank", "repair", *map(str, words)], catch_exceptions=True)
        return result.exit_code, result.output + str(result.exception or "")

    code, said = run(model)
    assert (code, "another copy" in said) == (2, True)
    damage(model)
    code, said = run(model, "--from", original, "--dry-run")
    assert (code, said.count("would mend  ")) == (0, 6)
    shutil.copyfile(original / "bank" / TREE, model / "bank" / TREE)
    code, said = run("-m", model / "bank", "--from", original, "--json")
    assert code == 0
    assert sorted(json.loads(said)["mended"]) == sorted(set(DAMAGED) - {TREE})
    code, said = run(model, "--from", original)
    assert (code, said.strip()) == (0, "nothing is damaged")
    flip(model / "bank" / FLIPPED)
    code, said = run(model, "--from", model)
    assert code == 1
    assert "another digest there" in said
    assert "1 problem left" in said
    assert "Nothing was changed" in said


@pytest.mark.slow
def test_from_the_hub(hub: HubServer, original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    hub.repo(REPO).commit(contents(original))
    pull(REPO, tmp_path / "pulled")
    bank = tmp_path / "pulled/bank"
    whole = contents(bank)
    flip(bank / FLIPPED)
    flip(bank / TREE)
    hub.requests.clear()
    assert CliRunner().invoke(app, ["bank", "repair", str(tmp_path / "pulled")]).exit_code == 0
    assert {name for name in hub.downloads() if name.endswith(".safetensors")} == {
        f"bank/{FLIPPED}",
        f"bank/{TREE}",
    }
    assert contents(bank) == whole
    # another version of the bank: its manifest says so before a block comes
    files = contents(original)
    files["bank/" + MANIFEST] = files["bank/" + MANIFEST].replace(b'"sha256": "', b'"sha256": "f')
    hub.repo(REPO).commit(files, sha="f" * 40)
    flip(bank / FLIPPED)
    hub.requests.clear()
    result = CliRunner().invoke(app, ["bank", "repair", str(tmp_path / "pulled"), "--from", f"{REPO}@{'f' * 40}"])
    assert result.exit_code == 1
    assert "it has another digest there" in result.output
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]
    # bytes that are not what that manifest says
    hub.instead[f"bank/{FLIPPED}"] = b"x" * len(whole[FLIPPED])
    damaged = contents(bank)
    with pytest.raises(HubError, match="not what the digests say"):
        CliRunner().invoke(app, ["bank", "repair", str(tmp_path / "pulled")], catch_exceptions=False)
    assert contents(bank) == damaged


def test_errors(model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(model / "bank" / FLIPPED)
    with pytest.raises(BankError, match="no bank at"):
        repair(tmp_path, FolderCopy(model / "bank"))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    before = contents(model)
    with pytest.raises(OutputError, match="the disk is full"):
        repair(model / "bank", FolderCopy(model.parent / "model/bank"))
    assert contents(model) == before
