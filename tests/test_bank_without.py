"""`hiermem bank export --without`: what is left out is nowhere in the copy; its receipt says so and is checked."""

from __future__ import annotations

import json
import pathlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hub_server import HubServer
from tiny import HashEmbedder, give_sources, make_model
from typer.testing import CliRunner

from mlx_hiermem import load
from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.receipt import RECEIPT, Receipt
from mlx_hiermem.bank.subset import export
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.share.pull import pull
from mlx_hiermem.share.push import push

OUT, NEXT = Path((1, 2)), Path((1, 1))
SECRET = "The vault opens with a feather."


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Leaf 1.2 has learnt secret.txt alone; gold.txt is known in 1.1 too. Do not write into it."""
    model = make_model(tmp_path_factory.mktemp("without") / "model")
    texts = {
        str(NEXT): [("gold", "Gold does not rust.")],
        str(OUT): [("gold", "Gold is soft."), ("secret", SECRET)],
    }
    give_sources(model / "bank", texts, HashEmbedder().embed)
    bank = MemoryBank.open(model / "bank")
    named = {Path((1,)): ("gold.txt", "secret.txt"), NEXT: ("gold.txt",), OUT: ("gold.txt", "secret.txt")}
    rows = {node: replace(row, sources=named.get(node, ())) for node, row in bank.manifest.blocks.items()}
    rows[OUT] = replace(rows[OUT], label="hidden things")
    replace(bank.manifest, blocks=rows).write(model / "bank" / MANIFEST)
    (model / "learning").mkdir()
    (model / "learning" / "kept.txt").write_text(SECRET)
    edit.block(model / "bank", [OUT, Path((0,))])
    return model


def command(*words: object) -> str:
    done = CliRunner().invoke(app, ["bank", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_nothing_of_it_is_in_the_copy(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    printed = command("export", original, out, "--without", "hidden")
    assert "left out 1.2: 1 block, 1.7 kB, 2 windows" in printed
    assert "may hold something of them: 1, generic, anchor" in " ".join(printed.split())
    before, after = MemoryBank.open(original / "bank"), MemoryBank.open(out / "bank")
    block = (original / "bank" / block_name(OUT)).read_bytes()
    centroid = np.asarray(before.tree.centroids[1][1, 2]).tobytes()
    for name, data in contents(out).items():
        for secret in (block, centroid, SECRET.encode(), b"secret.txt", b"hidden things"):
            assert secret not in data, name
    assert not after.tree.has(OUT)
    assert after.manifest.blocks.keys() == before.manifest.blocks.keys() - {OUT}
    assert after.manifest.blocks[Path((1,))].sources == ("gold.txt",)
    assert after.sources
    assert after.sources.leaves() == [NEXT]
    assert after.policy.blocked == {Path((0,))}
    assert sorted(path.name for path in out.iterdir()) == ["anchor", "bank"]
    for node in after.manifest.blocks:
        assert (out / "bank" / block_name(node)).read_bytes() == (original / "bank" / block_name(node)).read_bytes()
    assert command("verify", out).startswith("15 files, all as the manifest says")
    assert (
        load(out).generate("a", memory="1", max_tokens=2).text
        == load(original).generate("a", memory="1", max_tokens=2).text
    )


def test_the_receipt_can_be_made_again_and_names_digests(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    bank = MemoryBank.open(original / "bank")
    receipts = [export(bank, tmp_path / name, [OUT, Path((1, 2))]) for name in "ab"]
    assert receipts[0] == receipts[1] == Receipt.read(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (row,) = receipts[0].blocks
    assert (row.path, row.sha256) == (str(OUT), bank.manifest.blocks[OUT].sha256)
    whole = export(bank, tmp_path / "c", [Path((1,)), OUT], sources=False)
    assert (whole.nodes, len(whole.blocks), whole.windows) == (("1",), 4, 3)
    assert MemoryBank.open(tmp_path / "c").sources is None
    with pytest.raises(BankError, match="no node"):
        export(bank, tmp_path / "d", [Path((7,))])
    assert not (tmp_path / "d").exists()


def test_verify_finds_what_the_receipt_denies(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "out"
    export(MemoryBank.open(original / "bank"), root, [OUT])
    assert list(check(MemoryBank.open(root))) == []
    shutil.copyfile(original / "bank" / block_name(OUT), root / "innocent.bin")
    assert list(check(MemoryBank.open(root))) == ["innocent.bin is a block that without.json says was left out"]
    (root / "innocent.bin").unlink()
    receipt = json.loads((root / RECEIPT).read_text())
    (root / RECEIPT).write_text(json.dumps(receipt | {"nodes": ["1.1"]}))
    lines = list(check(MemoryBank.open(root)))
    assert [line.split(" are ")[0].split(" is ")[0] for line in lines] == ["1.1", "texts of 1.1"]
    for text in ("[]", "{}", json.dumps(receipt | {"version": 2}), json.dumps(receipt | {"blocks": [3]})):
        (root / RECEIPT).write_text(text)
        (line,) = check(MemoryBank.open(root))
        assert "is no receipt" in line
    # Whoever has it may change it: a block of his own at that place is none that was left out.
    (root / RECEIPT).write_text(json.dumps(receipt))
    edit.add(root, original / "bank" / block_name(NEXT), OUT, centroid=np.ones(384, np.float32) / 384**0.5)
    assert list(check(MemoryBank.open(root))) == []


@pytest.mark.slow
def test_it_travels_over_the_hub(hub: HubServer, original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command("export", original, tmp_path / "out", "--without", OUT)
    push(tmp_path / "out", "me/part", with_sources=False)
    pull("me/part", tmp_path / "pulled")
    assert Receipt.read(tmp_path / "pulled/bank") == Receipt.read(tmp_path / "out/bank")


def test_a_document_that_a_leaf_higher_up_has_learnt_keeps_its_name(
    original: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Topic 2 has no finer ones, as in a small corpus: it is a leaf."""
    model = shutil.copytree(original, tmp_path / "model")
    manifest = MemoryBank.open(model / "bank").manifest
    rows = {path: row for path, row in manifest.blocks.items() if path[0] != 2 or len(path) == 1}
    rows[Path((2,))] = replace(rows[Path((2,))], sources=("secret.txt",))
    replace(manifest, blocks=rows).write(model / "bank" / MANIFEST)
    command("export", model, tmp_path / "out", "--without", "1.2")
    left = MemoryBank.open(tmp_path / "out" / "bank").manifest.blocks
    assert left[Path((2,))].sources == ("secret.txt",)
    assert left[Path((1,))].sources == ("gold.txt", "secret.txt")
