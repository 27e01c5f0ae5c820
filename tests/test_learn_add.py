"""`hiermem bank add MODEL DOCS`: new documents into an old bank, and no byte changed that need not be."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from books import COUNT, VILLAGES, text, write_library
from tiny import make_anchor
from typer.testing import CliRunner

from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError
from mlx_hiermem.files import replace_folder
from mlx_hiermem.learn.publish import kept_texts
from mlx_hiermem.learn.record import read_record, text_digest
from mlx_hiermem.learn.settings import LearnSettings, TrainingSettings, TreeSettings, write_settings
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.model_folder import load

pytestmark = pytest.mark.slow

QUICK = ["--epochs", "6", "--rate", "0.02", "--no-self-study"]
NEW = 2  # villages


def call(*arguments: str | pathlib.Path) -> str:
    """Runs the command in this process; its output."""
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model that has learnt the library. Do not write into it."""
    folder = tmp_path_factory.mktemp("original")
    make_anchor(folder / "tiny" / "anchor")
    settings = LearnSettings(
        tree=TreeSettings(leaves=1), self_study=False, training=TrainingSettings(epochs=6, rate=0.02)
    )
    write_settings(folder / "learn.toml", settings)
    options = ["--anchor", folder / "tiny", "--config", folder / "learn.toml"]
    call("learn", write_library(folder / "books"), folder / "model", *options)
    return folder / "model"


@pytest.fixture
def model(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_library(tmp_path_factory.mktemp("news") / "news", NEW, COUNT)


def digests(model: pathlib.Path) -> dict[str, str]:
    """Every file of the bank."""
    files = (file for file in sorted((model / "bank").rglob("*")) if file.is_file())
    return {
        file.relative_to(model / "bank").as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def sources_of(bank: MemoryBank) -> dict[Path, set[str]]:
    """Leaf -> the documents whose windows it keeps."""
    assert bank.sources is not None
    return {one.leaf: {window.document for window in one.windows} for one in bank.sources.all()}


def losses(model: MemoryModel, numbers: range) -> float:
    """Mean loss on villages' texts, each with the memory that it is routed to."""
    found = []
    for number in numbers:
        model.select("fetched", text(number))
        tokens = mx.array(model.tokens(text(number)))[None]
        found.append(float(nn.losses.cross_entropy(model.anchor(tokens[:, :-1]), tokens[:, 1:]).mean()))
    return float(np.mean(found))


def test_documents_are_learnt_and_other_blocks_keep_their_bytes(
    original: pathlib.Path, model: pathlib.Path, news: pathlib.Path
) -> None:
    output = call("bank", "add", model, news, *QUICK)
    before, after = digests(original), digests(model)
    bank, old = MemoryBank.open(model / "bank"), MemoryBank.open(original / "bank")
    assert list(check(bank)) == []
    changed = {name for name in after if after[name] != before[name]}
    learnt = {node for node in bank.manifest.blocks if bank.manifest.blocks[node] != old.manifest.blocks[node]}
    assert changed - {"policy.json", WINDOWS_FILE, INDEX_FILE} == {
        "bank.json",
        *(f"blocks/{node[0]}/{node[1]}.safetensors" for node in learnt),
    }
    assert bank.policy.reach >= old.policy.reach > 0
    assert after.keys() == before.keys()
    assert len(learnt) < len(old.tree.nodes(2)), "some leaf must be none of them, or this shows nothing"
    assert f"{NEW} documents to {len(learnt)} block" in output

    kept, before_it = sources_of(bank), sources_of(old)
    assert all(kept[leaf] >= documents for leaf, documents in before_it.items())  # sources grow where learnt
    assert {leaf for leaf in kept if kept[leaf] != before_it.get(leaf)} == learnt
    assert {f"{name}.txt" for name in VILLAGES[COUNT : COUNT + NEW]} <= set().union(*kept.values())

    named = {source for node in learnt for source in bank.manifest.blocks[node].sources}
    assert {f"{name}.txt" for name in VILLAGES[COUNT : COUNT + NEW]} <= named
    new, known = range(COUNT, COUNT + NEW), range(COUNT)
    grown, was = load(model), load(original)
    assert losses(grown, new) < losses(was, new) - 0.1  # what is new is known
    assert losses(grown, known) < losses(was, known) + 0.02  # and nothing forgotten
    assert len(TrainingSet.open(model / "learning" / "examples")) == COUNT + NEW
    assert not model.with_name("model.learn").exists()


def test_a_killed_addition_ends_with_the_same_bank(
    original: pathlib.Path, model: pathlib.Path, news: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole = shutil.copytree(original, tmp_path / "whole")
    call("bank", "add", whole, news, *QUICK)
    script = pathlib.Path(sys.executable).with_name("hiermem")
    for said in ("examples",):
        command = [str(script), "bank", "add", str(model), str(news), *QUICK]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(said):
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL, f"it ended before it said {said}"
    call("bank", "add", model, news, *QUICK)
    assert digests(model) == digests(whole)


def test_documents_get_a_leaf_of_their_own(model: pathlib.Path, news: pathlib.Path) -> None:
    with pytest.raises(BankError, match="no room for a leaf"):
        call("bank", "add", model, news, "--new-leaf", *QUICK)
    means = np.load(model.with_name("model.learn") / "means.npy")
    shutil.rmtree(model.with_name("model.learn"))
    bank = MemoryBank.open(model / "bank")
    texts = model / "learning" / "examples"
    gone = bank.tree.route(means)[0].path  # where the new documents would go
    assert len(TrainingSet.open(texts).ids(gone))
    output = call("bank", "remove", model, str(gone), "--yes")
    assert "dropped" in output
    assert not len(TrainingSet.open(texts).ids(gone)), "removed texts must not be learnt again"
    before = digests(model)
    output = call("bank", "add", model, news, "--new-leaf", *QUICK)
    assert f"{gone} is new" in output
    grown = MemoryBank.open(model / "bank")
    assert list(check(grown)) == []
    assert grown.tree.has(gone)
    assert grown.manifest.blocks[gone].label
    upper = [Path((0,)), Path((1,))]
    assert all(
        digests(model)[f"blocks/{node}.safetensors"] == before[f"blocks/{node}.safetensors"] for node in upper
    )


def test_what_cannot_be_rehearsed_is_told(model: pathlib.Path, news: pathlib.Path) -> None:
    shutil.rmtree(model / "learning")
    assert "may fade" in call("bank", "add", model, news, *QUICK)
    assert not (model / "learning").exists()


def test_one_document_is_enough(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = tmp_path / f"{VILLAGES[COUNT]}.txt"
    page.write_text(text(COUNT))
    assert "1 document to" in call("bank", "add", model, page, *QUICK)


def test_bad_input_changes_nothing(model: pathlib.Path, tmp_path: pathlib.Path, news: pathlib.Path) -> None:
    before = digests(model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HierMemError, match="nothing to learn"):
        call("bank", "add", model, tmp_path / "empty", *QUICK)
    with pytest.raises(BankError, match="no anchor"):
        call("bank", "add", model / "bank", news, *QUICK)
    for wrong in (["--path", "0.1"], ["--replace"], ["--label", "x"]):
        done = CliRunner().invoke(app, ["bank", "add", str(model), str(news), *wrong])
        assert done.exit_code == 2
        assert wrong[0] in done.output
    assert digests(model) == before


def test_texts_put_aside_by_a_killed_swap_come_back(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = kept_texts(model)
    before, new = TrainingSet.open(texts).digest, texts.with_name("new")
    new.mkdir()
    own, renamed = os.rename, list[pathlib.Path]()

    def rename(source: pathlib.Path, target: pathlib.Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(source)
        own(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(new, texts)
    monkeypatch.undo()
    assert not texts.exists()
    assert TrainingSet.open(kept_texts(model)).digest == before


def test_the_files_are_recorded(original: pathlib.Path, model: pathlib.Path, news: pathlib.Path) -> None:
    call("bank", "add", model, news, *QUICK)
    record, texts = read_record(model), TrainingSet.open(model / "learning" / "examples")
    assert read_record(original).items() <= record.items()
    new = record[str(news / f"{VILLAGES[COUNT]}.txt")]
    assert new.sha256 == hashlib.sha256((text(COUNT) + "\n").encode()).hexdigest()
    numbers = [number for row in record.values() for number in row.windows]
    assert sorted(numbers) == sorted(texts.windows.tolist()) == list(range(COUNT + NEW))
    assert "binary" in record[str(news / "picture.txt")].why
    rows, bank = record.values(), MemoryBank.open(model / "bank")
    assert bank.sources is not None
    for node in bank.manifest.blocks:
        if len(node) == 2:
            documents = sum(row.homes.get(str(node), (0, 0))[0] for row in rows)
            assert documents == bank.manifest.blocks[node].documents
    kept = {text_digest(w.document, w.text) for one in bank.sources.all() for w in one.windows}
    assert kept == {digest for row in rows for digest in row.texts}
