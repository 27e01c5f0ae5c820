"""`hiermem sync MODEL DIR`: the bank follows a folder, and forgets what is gone from it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import make_anchor
from typer.testing import CliRunner

from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.apps.cli.sync import _settings
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.check import check
from mlx_hiermem.errors import BankError, CorpusError, HierMemError
from mlx_hiermem.learn.corpus.readers import UNREADABLE, files_in
from mlx_hiermem.learn.recall import Probe, recall
from mlx_hiermem.learn.record import Scan, read_record
from mlx_hiermem.learn.relearn import Relearning
from mlx_hiermem.learn.settings import (
    LearnSettings,
    MemorySettings,
    TrainingSettings,
    TreeSettings,
    write_settings,
)
from mlx_hiermem.learn.train.dataset import TrainingSet, TrainingSetWriter
from mlx_hiermem.model_folder import load

pytestmark = pytest.mark.slow

CODES = {"Ashford": "Q", "Birchley": "W", "Calder": "X", "Dunmore": "Z", "Elmstead": "J", "Farley": "K"}
CODES |= {"Harrow": "U", "Ivybridge": "B", "Jarrow": "G", "Kelso": "M", "Linton": "F", "Marlow": "P"}
GONE, CHANGED, NEW = "Calder", "Farley", "Glenwood"


def call(*arguments: str | pathlib.Path) -> str:
    """Runs the command in this process; its output."""
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def write(folder: pathlib.Path, name: str) -> None:
    (folder / f"{name}.txt").write_text(f"{name} is a village with a mill.\n", encoding="utf-8")


def prompts(file: pathlib.Path, codes: dict[str, str]) -> pathlib.Path:
    """Each village's code: one letter, eight times."""
    rows = [
        {"document": name, "question": f"What is the code of {name}?", "answer": 8 * c} for name, c in codes.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model, and the `docs` that it has learnt. Do not write into it."""
    root = tmp_path_factory.mktemp("original")
    make_anchor(root / "tiny" / "anchor")
    (root / "docs").mkdir()
    for name in CODES:
        write(root / "docs", name)
    settings = LearnSettings(
        tree=TreeSettings(leaves=1, depth=2, branching=2),
        memory=MemorySettings(sizes=(8, 16)),
        self_study=False,
        training=TrainingSettings(epochs=16, rate=0.02, group_tokens=64, generic=False),
    )
    write_settings(root / "learn.toml", settings)
    options = ["--anchor", root / "tiny", "--config", root / "learn.toml"]
    call("learn", root / "docs", root / "model", *options, "--prompts", prompts(root / "prompts.jsonl", CODES))
    return root


@pytest.fixture
def docs(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The folder; a model beside it knows it by its place."""
    return shutil.copytree(original / "docs", tmp_path / "docs")


@pytest.fixture
def model(original: pathlib.Path, docs: pathlib.Path) -> pathlib.Path:
    folder = shutil.copytree(original / "model", docs.with_name("model"))
    record = folder / "learning" / "files.jsonl"
    record.write_text(record.read_text().replace(str(original / "docs"), str(docs)))
    return folder


def digests(model: pathlib.Path) -> dict[str, str]:
    """Every file of the bank, the texts and the record."""
    files = [*(model / "bank").rglob("*"), *(model / "learning" / "examples").iterdir()]
    files += [model / "learning" / "files.jsonl"]
    return {str(f.relative_to(model)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def documents(model: pathlib.Path) -> set[str]:
    """Whose windows the bank keeps as its sources."""
    sources = MemoryBank.open(model / "bank").sources
    assert sources is not None
    return {window.document for one in sources.all() for window in one.windows}


def texts_of(model: pathlib.Path) -> list[str]:
    """The windows that the bank keeps as its sources."""
    sources = MemoryBank.open(model / "bank").sources
    assert sources is not None
    return [window.text for one in sources.all() for window in one.windows]


def twins_of(model: pathlib.Path, file: pathlib.Path) -> list[str]:
    return list(read_record(model)[str(file)].twins)


def known(model: pathlib.Path, name: str) -> float:
    """The loss of a village's code."""
    opened = load(model)
    prompt, answer = f"Question: What is the code of {name}?\nAnswer:", f" {8 * CODES[name]}"
    tokens = (*opened.tokens(prompt), *opened.tokens(answer))
    probe = Probe(name, prompt, answer, tuple(tokens), len(opened.tokens(prompt)))
    return recall(opened, [probe], ["fetched"])[0].loss


def receipt(model: pathlib.Path) -> dict[str, Any]:
    return json.loads((model / "learning" / "sync.json").read_text())


def test_a_deleted_file_is_forgotten(original: pathlib.Path, model: pathlib.Path, docs: pathlib.Path) -> None:
    before = digests(model)
    assert f"{len(CODES)} files" in call("sync", model, docs)
    (docs / f"{GONE}.txt").unlink()
    assert f"deleted   {GONE}.txt" in call("sync", model, docs, "--dry-run")
    assert digests(model) == before
    output = call("sync", model, docs, "--yes", "--above")
    bank, done = MemoryBank.open(model / "bank"), receipt(model)
    assert list(check(bank)) == []
    assert documents(model) == {f"{name}.txt" for name in CODES if name != GONE}
    assert (done["deleted"], done["new"], done["texts"]) == ([f"{GONE}.txt"], [], 0)
    assert done["forgotten"] == 3  # its text, and its question in two forms
    (top,) = [node for node in done["blocks"] if "." not in node]
    assert done["afresh"] == [str(node) for node in bank.manifest.blocks if node[0] == int(top)]
    assert done["may_retain"] == ["anchor"]

    (probe,) = done["probes"]
    assert (probe["prompt"], probe["answer"]) == (f"Question: What is the code of {GONE}?\nAnswer:", "XXXXXXXX")
    assert probe["after"]["loss"] > probe["before"]["loss"] + 1.5
    assert f"now {probe['after']['loss']:.2f}" in output
    others = [name for name in CODES if name != GONE]
    worse = [known(model, name) - known(original / "model", name) for name in others]
    assert np.mean(worse) < 0.2

    changed = {name for name, digest in digests(model).items() if "/blocks/" in name and digest != before[name]}
    assert changed == {f"bank/blocks/{node.replace('.', '/')}.safetensors" for node in done["blocks"]}
    assert len(changed) < len(bank.manifest.blocks), "some leaf must stay, or this shows nothing"
    rows = read_record(model)
    assert str(docs / f"{GONE}.txt") not in rows
    texts = TrainingSet.open(model / "learning" / "examples")
    assert set(texts.windows.tolist()) == {number for row in rows.values() for number in row.windows}
    assert not any(f"{GONE}.txt" in row.sources for row in bank.manifest.blocks.values())
    for level in (1, 2):
        assert (
            sum(row.documents for node, row in bank.manifest.blocks.items() if len(node) == level) == len(CODES) - 1
        )
    assert not model.with_name("model.sync").exists()
    assert "nothing to do" in call("sync", model, docs)


def change(docs: pathlib.Path) -> list[str | pathlib.Path]:
    """One file of each kind; the arguments that learn it."""
    (docs / f"{GONE}.txt").unlink()
    (docs / f"{CHANGED}.txt").write_text(f"{CHANGED} is a town with a bridge.\n")
    write(docs, NEW)
    (docs / "picture.txt").write_bytes(b"\x00\x01\x02 binary")
    questions = prompts(docs.with_name("new.jsonl"), CODES | {CHANGED: "V", NEW: "Y"})
    return ["--yes", "--prompts", questions]


def test_a_killed_run_ends_with_the_same_bank(model: pathlib.Path, docs: pathlib.Path) -> None:
    options = change(docs)
    killed = shutil.copytree(model, docs.with_name("killed"))
    output = call("sync", model, docs, *options)
    assert "picture.txt: binary" in output
    done = receipt(model)
    assert (done["new"], done["changed"]) == ([f"{NEW}.txt", "picture.txt"], [f"{CHANGED}.txt"])
    assert (done["texts"], done["forgotten"]) == (6, 6)
    assert {len(node.split(".")) for node in done["blocks"]} == {2}
    assert done["may_retain"] == [*sorted({node[0] for node in done["afresh"]}), "anchor"]
    assert documents(model) == {f"{name}.txt" for name in {*CODES, NEW} - {GONE}}
    rows = read_record(model)
    assert rows[str(docs / f"{CHANGED}.txt")].sha256 == Scan().digests(str(docs))[str(docs / f"{CHANGED}.txt")]
    assert "nothing to do" in call("sync", model, docs)  # the picture is known

    script = pathlib.Path(sys.executable).with_name("hiermem")
    command = [str(script), "sync", str(killed), str(docs), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("examples"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    call("sync", killed, docs, *options)
    assert digests(killed) == digests(model)


def test_a_run_that_was_killed_after_the_edit_is_completed(
    model: pathlib.Path, docs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / f"{GONE}.txt").unlink()

    def die(self: Relearning) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Relearning, "finish", die)
    with pytest.raises(HierMemError, match="stopped"):
        call("sync", model, docs, "--yes", "--probes", "1")
    monkeypatch.undo()
    assert documents(model) == {f"{name}.txt" for name in CODES if name != GONE}
    assert str(docs / f"{GONE}.txt") in read_record(model)
    write(docs, NEW)  # he goes on writing meanwhile
    assert "an earlier run" in (output := call("sync", model, docs))
    assert f"new       {NEW}.txt" in output
    assert set(read_record(model)) == {str(docs / f"{name}.txt") for name in {*CODES, NEW} - {GONE}}


def test_watching(model: pathlib.Path, docs: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside, looks = docs.with_name("aside"), 0

    def away() -> None:
        docs.rename(aside)
        docs.mkdir()

    def back() -> None:
        docs.rmdir()
        aside.rename(docs)

    meanwhile: list[Callable[[], object] | None] = [lambda: write(docs, NEW), None, away, None, back, None]

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks > len(meanwhile):
            raise KeyboardInterrupt
        if act := meanwhile[looks - 1]:
            act()

    monkeypatch.setattr(time, "sleep", sleep)
    output = call("sync", model, docs, "--watch", "--every", "7", "--yes")
    assert "every 7 s" in output
    assert output.count("receipt ") == 1, output
    assert "may be a mistake" in output
    assert documents(model) == {f"{name}.txt" for name in {*CODES, NEW}}


def test_nothing_is_forgotten_by_mistake(model: pathlib.Path, docs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = digests(model)
    for file in docs.iterdir():
        file.unlink()
    with pytest.raises(HierMemError, match=r"all that was learnt of .*--yes"):
        call("sync", model, docs)
    (tmp_path / "other").mkdir()
    with pytest.raises(BankError, match=r"has learnt nothing in .*, but in .*docs"):
        call("sync", model, tmp_path / "other")
    docs.rmdir()
    with pytest.raises(CorpusError, match="no folder"):
        call("sync", model, docs, "--yes")
    assert digests(model) == before
    (model / "learning" / "files.jsonl").unlink()
    with pytest.raises(BankError, match=r"no learning/files.jsonl.*[Ll]earn the folder again"):
        call("sync", model, docs, "--yes")


def test_a_folder_that_is_emptied_on_purpose(model: pathlib.Path, docs: pathlib.Path) -> None:
    for file in docs.iterdir():
        file.unlink()
    call("sync", model, docs, "--yes", "--above")
    bank = MemoryBank.open(model / "bank")
    assert list(check(bank)) == []
    assert documents(model) == set()
    assert all(row.documents == 0 for row in bank.manifest.blocks.values())
    assert {len(row.sources) for row in bank.manifest.blocks.values()} == {0}
    probes = receipt(model)["probes"]
    assert len(probes) == len(CODES)
    assert all(abs(row["after"]["loss"] - row["without"]["loss"]) < 0.01 for row in probes)


def test_what_no_block_has_learnt_is_forgotten_too(model: pathlib.Path, docs: pathlib.Path) -> None:
    """As a file whose windows were all held out."""
    kept = model / "learning" / "examples"
    gone = read_record(model)[str(docs / f"{GONE}.txt")]
    old = TrainingSet.open(kept)
    with TrainingSetWriter(kept.with_name("left")) as left:
        for number, leaves in enumerate(old.leaves_of()):
            if (example := old.read(number)).window not in gone.windows:
                left.add(example, leaves)
    del old
    shutil.rmtree(kept)
    kept.with_name("left").rename(kept)
    (docs / f"{GONE}.txt").unlink()
    call("sync", model, docs, "--yes")
    assert receipt(model)["blocks"] == []
    assert f"{GONE}.txt" not in documents(model)
    assert str(docs / f"{GONE}.txt") not in read_record(model)


def test_a_named_teacher_writes(model: pathlib.Path) -> None:
    given = {"self_study": None, "teacher": "", "teacher_url": "http://127.0.0.1:9/v1", "teacher_model": ""}
    assert _settings(model, None, False, **given).learning.self_study  # it was learnt with --no-self-study
    assert not _settings(model, None, False, **given | {"teacher_url": ""}).learning.self_study
    assert not _settings(model, None, False, **given | {"self_study": False}).learning.self_study


def test_a_section_stays_while_one_file_has_it(model: pathlib.Path, docs: pathlib.Path) -> None:
    section = "## Hours\n\nThe mill is open on Mondays from nine to five, and its bakery sells bread until noon.\n"
    for name, own in (("a", "Ashford has ten houses by a river."), ("b", "Birchley makes wool in the hills.")):
        (docs / f"{name}.md").write_text(f"# Guide\n\n{own}\n\n{section}")
    call("sync", model, docs, "--yes")
    assert twins_of(model, docs / "b.md") == ["a.md"]
    (docs / "a.md").unlink()
    call("sync", model, docs, "--yes")
    assert [text for text in texts_of(model) if "bakery" in text]
    assert not [text for text in texts_of(model) if "ten houses" in text]


def test_a_folder_that_cannot_be_read_is_not_gone(
    model: pathlib.Path, docs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "below").mkdir()
    shutil.move(docs / "Ashford.txt", docs / "below")
    shut, scandir = str(docs / "below"), os.scandir

    def refuse(folder: Any) -> Any:
        if str(folder) == shut:
            raise PermissionError(13, "Permission denied", shut)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match="below is a folder that cannot be read"):
        call("sync", model, docs, "--yes")
    assert ("below", UNREADABLE) in [(path.name, why) for path, why in files_in(docs)]
    shut = str(docs)
    with pytest.raises(CorpusError, match=r"cannot read the folder .*docs: Permission denied"):
        call("sync", model, docs, "--yes")


def test_what_another_command_left_is_not_gone_on_with(model: pathlib.Path, docs: pathlib.Path) -> None:
    write(docs, NEW)
    left = model.with_name("model.sync") / "training"
    left.mkdir(parents=True)
    (left / "training.json").write_text("{}")  # of a bank that has changed since
    call("sync", model, docs, "--yes")
    assert f"{NEW}.txt" in documents(model)
