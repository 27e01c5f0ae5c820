"""The manifest's table: rows are found in the file, whatever its order and layout, and opening reads none."""

from __future__ import annotations

import json
import os
import pathlib
import random
from dataclasses import replace

import pytest

from mlx_hiermem.bank import manifest as manifest_module
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, BlockTable, FileEntry
from mlx_hiermem.config import AnchorIdentity, EmbedderIdentity, MemoryConfig, Path
from mlx_hiermem.errors import BankError, HierMemError

CONFIG = MemoryConfig("ffn", 12, (4, 2, 0), (0,), 8)


def row(path: Path) -> BlockEntry:
    long = "x" * (20_000 if path == (11, 11) else len(path) * path[-1])  # some rows are longer than a page
    return BlockEntry(path, sum(path), "ab" * 32, f"topic {path}: é “{long}”", sources=("a\nb", "c.txt"))


PATHS = [Path((a,)) for a in range(12)] + [Path((a, b)) for a in range(12) for b in range(a, 12)]


@pytest.fixture(autouse=True, params=[1, 100, manifest_module.STEP])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are longer than the distance between two places of the search, and shorter ones."""
    monkeypatch.setattr(manifest_module, "STEP", request.param)


@pytest.fixture
def manifest() -> BankManifest:
    shuffled = random.Random(0).sample(PATHS, len(PATHS))
    blocks = {path: row(path) for path in shuffled}
    labels = {Path((1, 2, 3)): "a leaf"}
    anchor, embedder = AnchorIdentity("a", "", "", 8, 1), EmbedderIdentity("e", "", 256)
    return BankManifest(anchor, CONFIG, embedder, blocks, FileEntry(1, "f"), labels=labels)


@pytest.fixture
def file(manifest: BankManifest, tmp_path: pathlib.Path) -> pathlib.Path:
    manifest.write(tmp_path / "bank.json")
    return tmp_path / "bank.json"


def test_every_row_is_found_without_reading_the_table(file: pathlib.Path) -> None:
    read = BankManifest.read(file)
    assert isinstance(read.blocks, BlockTable)
    for path in PATHS:
        assert read.blocks[path] == row(path)
    assert "_all" not in vars(read.blocks)
    assert read.labels == {Path((1, 2, 3)): "a leaf"}


def test_what_is_not_there(file: pathlib.Path) -> None:
    read = BankManifest.read(file)
    assert not read.has_block(Path((1, 2, 3)))  # a level without blocks
    assert read.label(Path((1, 2, 3))) == "a leaf"
    assert not read.has_block(Path((1, 2, 3, 4)))
    assert not read.has_block(Path(()))
    assert "_all" not in vars(read.blocks)
    for path in (Path((3, 2)), Path((12,)), Path((0, 12)), Path((5, 1))):
        assert path not in read.blocks
        assert not read.has_block(path)
        with pytest.raises(KeyError):
            read.blocks[path]
    assert "0.0" not in read.blocks


def test_as_a_mapping_it_is_the_dict_that_was_written(file: pathlib.Path, manifest: BankManifest) -> None:
    read = BankManifest.read(file)
    assert list(read.blocks) == PATHS  # sorted by level, then path
    assert len(read.blocks) == len(PATHS)
    assert read.blocks == manifest.blocks
    assert read.blocks | {Path((0,)): row(Path((1,)))} == {**manifest.blocks, Path((0,)): row(Path((1,)))}
    before = file.read_bytes()
    read.write(file.with_name("again.json"))
    assert file.with_name("again.json").read_bytes() == before


def test_no_blocks(manifest: BankManifest, file: pathlib.Path) -> None:
    replace(manifest, blocks={}).write(file)
    read = BankManifest.read(file)
    assert (len(read.blocks), list(read.blocks), read.has_block(Path((1,)))) == (0, [], False)


def test_a_table_in_another_order_or_layout_is_read_whole(file: pathlib.Path) -> None:
    text = file.read_text(encoding="utf-8")
    head, rows = text.split(' "blocks": [\n')
    lines = rows.removesuffix("\n ]\n}\n").split(",\n")
    random.Random(1).shuffle(lines)
    unsorted = f'{head} "blocks": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    compact = json.dumps(json.loads(text))
    for other in (unsorted, compact, compact + "\n", json.dumps(json.loads(text), indent=2)):
        file.write_text(other, encoding="utf-8")
        read = BankManifest.read(file)
        assert all(read.blocks[path] == row(path) for path in PATHS)
        assert not read.has_block(Path((3, 2)))
        assert len(read.blocks) == len(PATHS)


def test_what_was_opened_stays_when_the_file_is_replaced(file: pathlib.Path, manifest: BankManifest) -> None:
    read = BankManifest.read(file)
    few = replace(manifest, blocks={path: row(path) for path in PATHS[:3]})
    few.write(file.with_name("new.json"))
    os.replace(file.with_name("new.json"), file)
    assert read.blocks[PATHS[-1]] == row(PATHS[-1])
    assert not BankManifest.read(file).has_block(PATHS[-1])


def test_a_damaged_row_is_named_when_it_is_read(file: pathlib.Path) -> None:
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('{"path": "0.0", "bytes": 0', '{"path": "0.0", "bites": 0'), encoding="utf-8")
    read = BankManifest.read(file)
    assert read.blocks[Path((5, 7))] == row(Path((5, 7)))
    with pytest.raises(BankError, match=r"bank.json is incomplete: TypeError"):
        read.blocks[Path((0, 0))]
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(BankError, match="cannot read"):
        BankManifest.read(file)
    file.write_text("", encoding="utf-8")
    with pytest.raises(BankError, match="cannot read"):
        BankManifest.read(file)


ESC = "\x1b]0;owned\x07"


def test_what_a_bank_says_cannot_control_a_terminal(file: pathlib.Path, manifest: BankManifest) -> None:
    path = PATHS[0]
    hostile = replace(
        manifest,
        anchor=replace(manifest.anchor, name=f"{ESC}a"),
        blocks={path: replace(row(path), label=f"a{ESC}\x9b2J", sources=(f"{ESC}b\ud800",))},
        labels={Path((1, 2, 3)): f"{ESC}a\nleaf"},
        licence=ESC,
    )
    data = hostile.to_json()
    for text in (json.dumps(data), json.dumps(data, indent=1)):
        file.write_text(text)
        read = BankManifest.read(file)
        said = [read.anchor.name, read.label(path), read.licence, *read.blocks[path].sources]
        assert said == ["]0;owneda", "a]0;owned2J", "]0;owned", "]0;ownedb\ufffd"]
        assert read.label(Path((1, 2, 3))) == "]0;owneda\nleaf"


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("tree", "bytes", "12"),
        ("tree", "bytes", -1),
        ("tree", "sha256", None),
        ("anchor", "name", 7),
        ("anchor", "layers", "2"),
        ("embedder", "max_tokens", 1.5),
        ("memory", "hidden", True),
        ("memory", "block_sizes", [1.5]),
        ("memory", "kind", ["ffn"]),
    ],
)
def test_a_value_of_another_type_is_refused(file: pathlib.Path, part: str, key: str, value: object) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    data[part][key] = value
    file.write_text(json.dumps(data))
    with pytest.raises(HierMemError):
        BankManifest.read(file)


@pytest.mark.parametrize("change", [{"bytes": "1"}, {"documents": None}, {"label": 3}, {"sources": [1]}])
def test_a_row_of_other_types_is_refused(file: pathlib.Path, change: dict[str, object]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    data["blocks"][0] |= change
    file.write_text(json.dumps(data))
    with pytest.raises(BankError, match="is incomplete"):
        BankManifest.read(file)


def test_a_manifest_that_is_nested_too_deeply(file: pathlib.Path) -> None:
    file.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(BankError, match="nested too deeply"):
        BankManifest.read(file)
