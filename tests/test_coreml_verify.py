"""`hiermem verify OUT --coreml` on exports of a tiny model: what passes, and all that must not."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
from coremltools.proto import Model_pb2

from mlx_hiermem.apps.cli import main as cli
from mlx_hiermem.convert.coreml import export
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.export import text_checks, verify
from mlx_hiermem.convert.export.exported import Exported
from mlx_hiermem.convert.export.references import open_reference
from mlx_hiermem.errors import CoreMLError, HierMemError
from mlx_hiermem.files import file_digest

pytestmark = pytest.mark.slow

WEIGHTS = "anchor.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
PROGRAM = "anchor.mlpackage/Data/com.apple.CoreML/model.mlmodel"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.make_model(tmp_path_factory.mktemp("coreml") / "model")


@pytest.fixture(scope="module")
def exported(model: pathlib.Path) -> pathlib.Path:
    """In float16, its memory in states. Do not write into it."""
    out = model.parent / "app"
    export.export(model, out, export.Options(context=64, weights="fp16"))
    return out


@pytest.fixture
def copy(exported: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """To be damaged; its files are the same until they are replaced."""
    return shutil.copytree(exported, tmp_path / "app", copy_function=os.link)


def write(folder: pathlib.Path, name: str, data: bytes, *, told: bool = False) -> None:
    """Replaces a file; `told`: in the manifest, too, so that only a run can find it."""
    file = folder / name
    file.unlink()
    file.write_bytes(data)
    if told:
        row = {"bytes": len(data), "sha256": file_digest(file)}
        edit(folder, lambda manifest: manifest["files"].update({name: row}))


def edit(folder: pathlib.Path, change: Callable[[Any], Any]) -> None:
    """Changes the manifest."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.unlink()
    file.write_text(json.dumps(manifest))


def checked(folder: pathlib.Path, **options: Any) -> dict[str, Any]:
    """All checks by name."""
    receipt = verify.verify_export(folder, verify.Options(**{"prompts": 1} | options))
    return {check.name: check for check in receipt.checks}


def failed(folder: pathlib.Path, **options: Any) -> dict[str, str]:
    """Name -> figure of the checks that failed."""
    return {name: check.figure for name, check in checked(folder, **options).items() if not check.passed}


def failed_texts(folder: pathlib.Path, model: pathlib.Path | None = None) -> set[str]:
    """The same for the checks that run the anchor."""
    exported = Exported(folder)
    reference = open_reference(str(model), exported.bank) if model else None
    return {check.name for check in text_checks.check_texts(exported, reference, 1) if not check.passed}


def test_an_export_passes(model: pathlib.Path, copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 10)
    checks = checked(copy, against=str(model), prompts=3, text=text)
    assert not [check for check in checks.values() if not check.passed]
    assert list(checks) == [
        *("digests", "interfaces", "retriever", "routes", "logits, memory none", "choices, memory none"),
        *("effect of memory 0.0", "logits, memory 0.0", "choices, memory 0.0"),
        *("effect of memory 2.2", "logits, memory 2.2", "choices, memory 2.2"),
        *("memory 0.0 again, by load_block", "memory none again, by load_block"),
        *("decode alone, float16 between operations", "decode alone, float32 between operations"),
        *("load_block", "choices in some.txt"),
    ]
    assert checks["choices in some.txt"].details["tokens"] == 590
    receipt = json.loads((copy / "receipt.json").read_text())
    assert receipt["verification"]["passed"]
    assert receipt["verification"]["source"] == {"by": "interpreter", "against": "model in PyTorch, float32"}
    assert receipt["weights"]["bound"] == 5e-4  # what the export wrote is kept


def test_a_memory_by_input(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "app"
    export.export(model, out, export.Options(context=64, weights="fp16", memory="input"))
    assert verify.check_interfaces(Exported(out)).passed
    assert not failed_texts(out, model)


def test_an_anchor_without_memory(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "app"
    export.export(model / "anchor", out, export.Options(context=64, weights="int8"))
    checks = checked(out, against=str(model / "anchor"), prompts=2)
    assert not [check for check in checks.values() if not check.passed]
    assert "logits, memory none" in checks
    assert not [name for name in checks if "0.0" in name]


def without_decode(model: Any) -> None:
    del model.mlProgram.functions["decode"]
    names = [one.name for one in model.description.functions]
    del model.description.functions[names.index("decode")]
    model.description.defaultFunctionName = "prefill"


def edit_program(folder: pathlib.Path, change: Callable[[Any], Any]) -> None:
    model = Model_pb2.Model()
    model.ParseFromString((folder / PROGRAM).read_bytes())
    change(model)
    write(folder, PROGRAM, model.SerializeToString(), told=True)


def flipped(data: bytes) -> bytes:
    return data[:-200] + bytes(255 - byte for byte in data[-200:])


TAMPERED: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "weights": (
        lambda out: write(out, WEIGHTS, flipped((out / WEIGHTS).read_bytes())),
        f"digests ({WEIGHTS} was changed)",
    ),
    "truncated block": (
        lambda out: write(out, "bank/blocks/0.safetensors", (out / "bank/blocks/0.safetensors").read_bytes()[:-9]),
        "digests (bank/blocks/0.safetensors has ",
    ),
    "truncated weights that the manifest knows": (
        lambda out: write(out, WEIGHTS, (out / WEIGHTS).read_bytes()[:-20], told=True),
        "is cut off: it ends at",
    ),
    "truncated block that the manifest knows": (
        lambda out: write(out, "bank/blocks/0.safetensors", b"\0" * 99, told=True),
        "blocks/0.safetensors",
    ),
    "missing file": (
        lambda out: (out / "bank/tree.safetensors").unlink(),
        "digests (bank/tree.safetensors is missing)",
    ),
    "missing function": (
        lambda out: edit_program(out, without_decode),
        "interfaces (there is no function decode)",
    ),
    "shape of a state": (
        lambda out: edit(out, lambda m: m["anchor"]["states"]["k_cache"].update(shape=[4, 2, 32, 32])),
        "interfaces (k_cache of decode is float16 [4, 2, 64, 32], told is float16 [4, 2, 32, 32])",
    ),
    "shape of an output": (
        lambda out: edit(out, lambda m: m["anchor"]["outputs"]["logits_0"].update(shape=[1, -1, 259])),
        "interfaces (logits_0 of decode is float16 [1, 1, 260], told is float16 [1, 1, 259])",
    ),
    "type of an input": (
        lambda out: edit(out, lambda m: m["anchor"]["inputs"]["position"].update(dtype="float16")),
        "interfaces (position of decode is int32 [1], told is float16 [1])",
    ),
    "no such state": (
        lambda out: edit(out, lambda m: m["anchor"]["states"].pop("up")),
        "interfaces (up of decode is not in the manifest)",
    ),
    "context": (
        lambda out: edit(out, lambda m: m["anchor"].update(context=128)),
        "interfaces (k_cache has room for 64 tokens, the context is 128)",
    ),
    "vocabulary": (
        lambda out: edit(out, lambda m: m["anchor"].update(vocabulary=261)),
        "interfaces (the logits have [260] values, the vocabulary 261)",
    ),
    "memory": (
        lambda out: edit(out, lambda m: m["memory"].update(units=5)),
        "interfaces (the memory has {'layers': [1, 3], 'units': 5, 'hidden': 32}, the bank's ",
    ),
    "load_block": (
        lambda out: edit(out, lambda m: m["anchor"].update(load_block="load")),
        "interfaces (there is no function load)",
    ),
    "retriever": (
        lambda out: edit(out, lambda m: m["retriever"].update(lengths=[16, 32])),
        "interfaces (input_ids of the retriever takes [(1, 16), (1, 32), (1, 64), (1, 128), (1, 256)], told is",
    ),
    "manifest": (lambda out: edit(out, lambda m: m["anchor"].pop("logits")), "manifest.json has no anchor.logits"),
    "version": (lambda out: edit(out, lambda m: m.update(version=2)), "known is mlx-hiermem-coreml 1"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_fails_in_one_line(
    what: str, copy: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper, message = TAMPERED[what]
    tamper(copy)
    monkeypatch.setattr("sys.argv", ["hiermem", "verify", str(copy), "--coreml", "--prompts", "1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("hiermem: ")] == lines[-1:]
    assert message in lines[-1]


def test_a_text_ends_where_a_reply_does(exported: pathlib.Path) -> None:
    runner, prompt = Exported(exported).runner(), np.arange(5)
    ids, logits = text_checks._write_on(runner, prompt, [])
    assert len(ids) == len(logits) == len(prompt) + text_checks.GENERATED - 1
    for said in (0, 3):
        end = int(ids[len(prompt) + said])
        before = list(ids[len(prompt) :]).index(end)
        shorter, rows = text_checks._write_on(runner, prompt, [end])
        np.testing.assert_array_equal(shorter, ids[: len(prompt) + before])
        np.testing.assert_array_equal(rows, logits[: len(shorter)])


def test_other_values_fail_against_the_source(model: pathlib.Path, copy: pathlib.Path) -> None:
    """A manifest that agrees with changed weights hides nothing from the comparison."""
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[4096:4352] = data[8192:8448]
    write(copy, WEIGHTS, bytes(data), told=True)
    assert {"logits, memory none", "logits, memory 0.0", "logits, memory 2.2"} <= failed_texts(copy, model)


def broken(function: str, change: Callable[[dict[str, np.ndarray], Any], Any]) -> Callable[..., Any]:
    """`Program.run`, with something done to the outputs and state of one function."""
    run = Program.run

    def wrapped(self: Program, name: str, inputs: Any, state: Any = None, **how: Any) -> dict[str, np.ndarray]:
        outputs = run(self, name, inputs, state, **how)
        if name == function:
            change(outputs, state)
        return outputs

    return wrapped


def add_noise(outputs: dict[str, np.ndarray], state: Any) -> None:
    outputs["logits_0"][..., 7] += np.float16(3)


def forget(outputs: dict[str, np.ndarray], state: Any) -> None:
    state["up"] = state["up"] * 0


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize(("gap", "passes"), [(0.0, True), (0.04, True), (0.06, False)])
def test_only_a_tie_excuses_another_choice(gap: float, passes: bool, form: str) -> None:
    ours = np.zeros((12, 8), np.float32)
    ours[:, 3] = 4.0
    theirs = ours.copy()
    theirs[-1, 5] = 4.0 + gap

    class Source:
        def logits(self, ids: np.ndarray, memory: str) -> np.ndarray:
            return theirs

    checks = text_checks._parity(form, Source(), "none", [(np.arange(12), ours)], [10])
    found = {check.name: check.passed for check in checks}
    assert found["choices, memory none"] is passes


def test_a_wrong_decode_is_found(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "run", broken("decode", add_noise))
    assert failed_texts(copy) == {
        "decode alone, float16 between operations",
        "decode alone, float32 between operations",
    }


def test_a_wrong_swap_is_found(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "run", broken("load_block", forget))
    assert failed_texts(copy) == {"memory 0.0 again, by load_block", "load_block"}


def test_a_memory_without_effect_is_found(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Program.run

    def ignoring(self: Program, name: str, inputs: Any, state: Any = None, **how: Any) -> dict[str, np.ndarray]:
        if name in ("prefill", "decode"):
            forget({}, state)
        return run(self, name, inputs, state, **how)

    monkeypatch.setattr(Program, "run", ignoring)
    assert {"effect of memory 0.0", "effect of memory 2.2"} <= failed_texts(copy)


def test_what_cannot_be_asked(model: pathlib.Path, copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CoreMLError, match=r"is no exported folder"):
        checked(model)
    with pytest.raises(CoreMLError, match=r"some.txt needs a model to compare with. Name it with --against"):
        checked(copy, text=tmp_path / "some.txt")
    with pytest.raises(HierMemError, match=r"there is no file or folder"):
        checked(copy, against=str(tmp_path / "nothing"))
