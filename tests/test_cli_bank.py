"""`hiermem bank` as its user meets it: what is printed, one-line errors, exit codes, nothing half-written."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command_line import Run
from tiny import make_anchor

from mlx_hiermem.apps.cli.models import is_no_number
from mlx_hiermem.bank import commit, edit
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.remote import Origin
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.evaluate.questions import read_questions

COMMANDS = (
    "ls",
    "show",
    "verify",
    "repair",
    "block",
    "unblock",
    "remove",
    "add",
    "add-block",
    "merge",
    "quantize",
    "export",
)


def files(model: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(model)): file.read_bytes() for file in model.rglob("*") if file.is_file()}


def test_the_group_and_its_help() -> None:
    code = "from mlx_hiermem.apps.cli.main import main; main()"

    def help_of(*arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments, "--help"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    assert " bank " in help_of()
    listed = help_of("bank")
    assert all(f" {command} " in listed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(bank_command: Run, command: str) -> None:
    result = bank_command(command, "--help")
    assert result.code == 0
    assert f"hiermem bank {command}" in result.out.split("Example:")[1]


def test_ls(bank_command: Run, copied: pathlib.Path) -> None:
    bank_command("block", copied, "2")
    (copied / "bank/blocks/0/1.safetensors").unlink()
    result = bank_command("ls", copied)
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["path", "label", "bytes", "documents", "state"]
    assert ["0.1", "topic", "0.1", "1.7", "kB", "missing"] in lines
    assert ["2.1", "topic", "2.1", "1.7", "kB", "blocked"] in lines
    total = "11 blocks · 23.8 kB · float32 · 1 missing · 3 blocked: their texts go to the nearest open sibling"
    assert total in " ".join(result.out.split())  # in a narrow terminal it takes two lines
    rows = json.loads(bank_command("ls", copied, "0", "--json").out)
    assert [(row["path"], row["state"]) for row in rows] == [
        ("0", "on disk"),
        ("0.0", "on disk"),
        ("0.1", "missing"),
        ("0.2", "on disk"),
    ]
    assert json.loads(bank_command("ls", copied / "bank", "0.2", "--json").out)[0]["label"] == "topic 0.2"


def test_show_as_a_tree(bank_command: Run, copied: pathlib.Path) -> None:
    bank_command("block", copied, "2.1", "--on-blocked", "parent")
    shown = bank_command("show", copied).out
    assert "├── 1 topic 1  3.3 kB\n" in shown
    assert "2.1 topic 2.1  1.7 kB  blocked" in shown
    assert "1 blocked: their texts stop at the parent" in shown
    assert "1.0" not in bank_command("show", copied, "--depth", "1").out


def test_show_as_a_picture(bank_command: Run, copied: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = bank_command("show", copied, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html")
    assert result.out.split() == ["written", str(tmp_path / "a.png"), "written", str(tmp_path / "a.html")]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>model</h1>" in (tmp_path / "a.html").read_text()
    result = bank_command("show", copied, "--html", tmp_path / "nowhere" / "a.html")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "cannot write" in result.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "a.png", "model"]


@pytest.mark.slow
def test_the_earlier_name_of_route_and_the_policy(bank_command: Run, copied: pathlib.Path) -> None:
    routed = json.loads(bank_command("path", copied, "some text", "--json").out)
    assert routed["avoided"] == []
    bank_command("block", copied, routed["path"])
    again = json.loads(bank_command("path", copied, "some text", "--json").out)
    assert again["path"] != routed["path"]
    assert again["path"].startswith(routed["path"][:2])
    assert again["avoided"] == [routed["path"]]
    assert (
        f"{routed['path']} topic {routed['path']} would be nearer, but is blocked"
        in bank_command("path", copied, "some text").out
    )
    bank_command("block", copied, "--on-blocked", "parent")
    assert json.loads(bank_command("path", copied, "some text", "--json").out)["path"] == routed["path"][:1]


def test_verify(bank_command: Run, copied: pathlib.Path) -> None:
    result = bank_command("verify", copied)
    assert (result.code, result.out) == (0, "13 files, all as the manifest says\n")
    (copied / "bank/blocks/0/1.safetensors").unlink()
    (copied / "bank/blocks/0/0.safetensors").write_bytes(b"abc")
    result = bank_command("verify", copied)
    assert result.code == 1
    assert result.out.splitlines() == [
        "blocks/0/0.safetensors has 3 bytes, the manifest says 1744",
        "blocks/0/1.safetensors is missing",
    ]
    assert result.err.startswith("hiermem: 2 problems in")
    result = bank_command("verify", copied, "--json")
    assert (result.code, len(json.loads(result.out)["problems"])) == (1, 2)


def test_verify_says_how_an_interrupted_change_is_finished(bank_command: Run, copied: pathlib.Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "finish", lambda _: frozenset())  # the process dies where it would carry it out
        edit.remove(copied / "bank", [Path((1,))])
    result = bank_command("verify", copied)
    assert (result.code, "a change was interrupted" in result.out) == (1, True)
    assert result.err.endswith("Make a change, then verify again.\n")
    assert bank_command("remove", copied, "1").code == 0
    assert bank_command("verify", copied).code == 0


def test_verify_does_not_vouch_for_what_is_on_the_hub(bank_command: Run, copied: pathlib.Path) -> None:
    Origin("me/tiny", "c" * 40).write(copied / "bank")
    (copied / "bank/blocks/0/1.safetensors").unlink()
    assert bank_command("verify", copied).out == "12 files, all as the manifest says; 1 more is on the hub\n"
    answer = json.loads(bank_command("verify", copied, "--json").out)
    assert answer == {"files": 12, "remote": 1, "problems": []}


def test_block_and_unblock(bank_command: Run, copied: pathlib.Path) -> None:
    assert "blocked  1.2, 2" in bank_command("block", copied, "2.1", "2", "1.2").out
    result = bank_command("block", copied, "--on-blocked", "parent")
    assert "Their texts stop at the parent." in result.out
    assert bank_command("unblock", copied, "1", "2").out == "blocked  nothing\n"
    for arguments in (("block", copied), ("block", copied, "1", "--on-blocked", "uncle"), ("unblock", copied)):
        assert bank_command(*arguments).code == 2


def test_a_folder_may_be_called_like_a_node(
    bank_command: Run, copied: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    assert "blocked  1.2" in bank_command("block", ".", "1.2").out
    monkeypatch.chdir(copied.parent)
    three = copied.rename(copied.with_name("3"))
    refused = bank_command("block", "3", "1")
    assert refused.code == 2
    assert "3 is a model here" in refused.err
    assert "blocked  1" in bank_command("block", "./3", "1").out
    three.rename(copied)
    assert not any(map(is_no_number, ("1", "1.2", ".5", "0.5", "10.7.3")))
    assert all(map(is_no_number, (".", "..", "model", "1x", "me/model")))


@pytest.mark.slow
def test_remove_with_a_probe(bank_command: Run, copied: pathlib.Path, tmp_path: pathlib.Path) -> None:
    routed = json.loads(bank_command("path", copied, "some text", "--json").out)["path"]
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": 1, "prompt": "some text", "answer": "[b]10", "relation": "r", "aliases": ["ten"]}]
    questions.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    result = bank_command("remove", copied, routed, "--probe", questions, "-n", "4", "--json")
    answers = json.loads(result.out)
    assert (answers["removed"], answers["bytes"]) == ([routed], 1744)
    assert answers["may_retain"] == [routed[:1], "generic", "anchor"]
    (row,) = answers["probe"]
    assert row["prompt"] == "some text"
    assert row["before"] != row["after"]  # a random block more or less is heard
    assert not MemoryBank.open(copied / "bank").tree.has(Path.parse(routed))
    top = routed[:1]
    result = bank_command("remove", copied, top, "--probe", questions, "-n", "4")
    assert result.code == 0
    assert "[b]10" in result.out
    assert "right    0 of 1 before, 0 after" in result.out
    assert "The generic block and the anchor may still hold something" in " ".join(result.out.split())
    assert bank_command("verify", copied).code == 0


@pytest.mark.real
def test_add_by_example_and_by_centroid(bank_command: Run, copied: pathlib.Path, original: pathlib.Path) -> None:
    bank_command("remove", copied, "1")
    block = original / "bank/blocks/1.safetensors"
    result = bank_command(
        "add-block", copied, block, "--path", "1", "--label", "[new] gases", "--example", "some text"
    )
    assert result.out == "added    1 [new] gases · 3.3 kB\n"
    assert json.loads(bank_command("path", copied, "some text", "--json").out)["nodes"][0] == {
        "node": "1",
        "label": "[new] gases",
        "distance": 0.0,
        "bytes": 3280,
        "documents": 0,
    }
    np.save(copied / "centroid.npy", np.ones(384, np.float32))
    child = original / "bank/blocks/1/0.safetensors"
    result = bank_command("add-block", copied, child, "--path", "1.0", "--centroid", copied / "centroid.npy")
    assert result.out == "added    1.0 topic 1.0 · 1.7 kB\n"
    assert bank_command("verify", copied).code == 0


def test_merge(bank_command: Run, copied: pathlib.Path, original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = shutil.copytree(original, tmp_path / "other")
    bank_command("remove", copied, "1")
    bank_command("remove", other, "0", "2")
    result = bank_command("merge", copied, other, tmp_path / "out")
    assert f"{tmp_path / 'out'}: 11 blocks, 23.8 kB" in result.out
    merged, before = MemoryBank.open(tmp_path / "out"), MemoryBank.open(original / "bank")
    assert merged.manifest.blocks == before.manifest.blocks
    assert bank_command("verify", tmp_path / "out").code == 0
    assert bank_command("merge", copied, other, tmp_path / "out", "--prefer", "both").code == 2


def test_quantize(bank_command: Run, copied: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = bank_command("quantize", copied, tmp_path / "out", "--bits", "8,4")
    lines = [line.split() for line in result.out.splitlines()]
    assert [(line[0], line[1], line[2]) for line in lines[1:4]] == [
        ("1", "3", "8"),
        ("2", "8", "4"),
        ("generic", "1", "8"),
    ]
    assert lines[4][:2] == ["all", "12"]
    assert "32 values share a scale and a bias" in result.out
    assert f"written  {tmp_path / 'out'}" in result.out
    assert bank_command("verify", tmp_path / "out").code == 0
    listed = bank_command("ls", tmp_path / "out", "1").out
    assert [line.split()[-3] for line in listed.splitlines()[1:3]] == ["8", "4"]
    assert "8 bits in groups of 32, then 4 bits in groups of 32" in listed
    assert {row["bits"] for row in json.loads(bank_command("ls", copied, "--json").out)} == {32}
    assert "8 bits in groups of 32, then 4" in bank_command("show", tmp_path / "out").out
    rows = json.loads(bank_command("quantize", copied / "bank", tmp_path / "bank", "--bits", "16, 8", "--json").out)
    assert [(row["level"], row["quantization"] and row["quantization"]["bits"]) for row in rows] == [
        (1, None),
        (2, 8),
        (0, None),
    ]
    assert MemoryBank.open(tmp_path / "bank").manifest.totals()["bytes"] == sum(r["bytes_after"] for r in rows[:2])
    for bits in ("5", "", "8;4", "-8", "eight"):
        assert bank_command("quantize", copied, tmp_path / "other", "--bits", bits).code == 2
    assert bank_command("quantize", copied, tmp_path / "other", "--bits", "8", "--group-size", "48").code == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ls", "nowhere"), "there is no model at nowhere"),
        (("ls", "MODEL", "7"), "no node 7"),
        (("ls", "MODEL", "chemistry"), "'chemistry' is not a path"),
        (("show", "nowhere", "--html", "x.html"), "there is no model at nowhere"),
        (("show", "MODEL", "--html", "/dev/null/x.html"), "cannot write /dev/null/x.html: Not a directory"),
        (("verify", "nowhere"), "there is no model at nowhere"),
        (("block", "MODEL", "7"), "no node 7"),
        (("unblock", "MODEL", "1"), "1 is not blocked"),
        (("remove", "MODEL", "1", "7"), "no node 7"),
        (("remove", "MODEL", "1", "--probe", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("add-block", "MODEL", "nowhere", "--path", "1", "--replace"), "there is no block file nowhere"),
        (("add-block", "MODEL", "MODEL/bank/bank.json", "--path", "1", "--replace"), "cannot read the block"),
        (
            ("add-block", "MODEL", "MODEL/bank/generic.safetensors", "--path", "2.0", "--centroid", "no.npy"),
            "no centroid",
        ),
        (("merge", "MODEL", "nowhere", "out"), "there is no model at nowhere"),
        (("merge", "MODEL", "MODEL", "MODEL/bank"), "exists already"),
        (("quantize", "nowhere", "out", "--bits", "8"), "there is no model at nowhere"),
        (("quantize", "MODEL", "MODEL/bank", "--bits", "8"), "exists already"),
        (("quantize", "MODEL", "out", "--bits", "8", "--group-size", "64"), "gate is 32 wide"),
    ],
)
def test_errors_are_one_line_and_change_nothing(
    bank_command: Run, copied: pathlib.Path, arguments: tuple[str, ...], message: str
) -> None:
    before = files(copied)
    result = bank_command(*(argument.replace("MODEL", str(copied)) for argument in arguments))
    assert (result.code, result.err.count("\n"), result.out) == (1, 1, "")
    assert result.err.startswith("hiermem: ")
    assert message in result.err
    assert files(copied) == before
    assert not pathlib.Path("out").exists()
    assert not pathlib.Path("x.html").exists()


def test_a_bank_without_a_model_cannot_be_probed(
    bank_command: Run, copied: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "p", "answer": "a"}')
    before = files(copied)
    result = bank_command("remove", copied / "bank", "1", "--probe", tmp_path / "q.jsonl")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert files(copied) == before


def test_a_probe_knows_an_answer(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "p", "answer": "10", "aliases": ["Ten"]}\n\n{"prompt": "q", "answer": 7}\n')
    question, other = read_questions(file)
    assert [question.is_right(reply) for reply in ("10", " 10.", "ten", "100", "is 10", "tens", "")] == [
        *(True, True, True),
        *(False, False, False, False),
    ]
    assert other.answer == "7"
    for content in ("", "[]", '{"prompt": "p"}', "{", '{"prompt": "p", "answer": "a", "aliases": 3}'):
        file.write_text(content)
        with pytest.raises(HierMemError, match=r"q\.jsonl"):
            read_questions(file)


def test_an_anchor_alone_has_no_bank(bank_command: Run, tmp_path: pathlib.Path) -> None:
    make_anchor(tmp_path / "anchor")
    assert "there is no bank in" in bank_command("ls", tmp_path / "anchor").err
