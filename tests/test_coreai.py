"""Exports to Core AI, run by Apple's own interpreter: every architecture, the compressed formats, the retriever."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import tiny
from sources import KINDS, hf_model, save_hf
from tiny_openlm import random_openlm, save_openlm

torch = pytest.importorskip("torch")
pytest.importorskip("coreai_torch", reason="needs the extra coreai")
pytest.importorskip("coreai_opt", reason="needs the extra coreai")

from test_coreml_architectures import CONTEXT, EXACT, LAYERS, TOKENS, UNITS, Twin, close, halves, memory_of  # noqa: E402

from mlx_hiermem.apps.cli import main as cli  # noqa: E402
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface  # noqa: E402
from mlx_hiermem.convert.anchors.openlm import convert_openlm  # noqa: E402
from mlx_hiermem.convert.coreai import asset, compress, export  # noqa: E402
from mlx_hiermem.convert.coreai.anchor import Anchor  # noqa: E402
from mlx_hiermem.convert.coreai.interpreter import Runtime  # noqa: E402
from mlx_hiermem.convert.export import verify  # noqa: E402
from mlx_hiermem.convert.export.architecture import Architecture  # noqa: E402
from mlx_hiermem.convert.export.exported import COREAI, Exported, Runner  # noqa: E402
from mlx_hiermem.convert.export.exporter import Options  # noqa: E402
from mlx_hiermem.convert.export.shape import CACHES, Export  # noqa: E402
from mlx_hiermem.errors import CoreAIError, CoreMLError, HierMemError  # noqa: E402

pytestmark = pytest.mark.slow


def saved(anchor: pathlib.Path, path: pathlib.Path, precision: Any) -> tuple[Runtime, dict, dict]:
    """An asset, opened, and what the manifest says of it."""
    sizes, shape = Architecture.read(anchor), Export(CONTEXT, LAYERS, UNITS, "input")
    module = Anchor(sizes, shape, precision).eval()
    calls = {name: module.arguments(tokens) for name, tokens in shape.functions.items()}
    asset.save({name: asset.Function(module, call, ["logits"], CACHES) for name, call in calls.items()}, path)
    memory = {"mode": "input", "layers": LAYERS, "units": UNITS, "hidden": sizes.hidden}
    return Runtime(path), export.CoreAI().describe(sizes, shape, {}), memory


def check(model: Any, anchor: pathlib.Path, folder: pathlib.Path) -> None:
    """Prefill and decode, three memories in turn that leave no trace; float16 is for the exports below."""
    for precision, tolerance in ((torch.float32, EXACT),):
        program, described, memory = saved(anchor, folder / f"{precision}.aimodel", precision)
        twin, runner = Twin(model, described, memory["hidden"]), Runner(program, described, memory)
        first, second = memory_of(memory["hidden"], 1), memory_of(memory["hidden"], 2)
        found: dict[str, np.ndarray] = {}
        for name, tensors in (("", None), ("1", first), ("2", second), ("1", first), ("", None)):
            runner.set_memory(tensors)
            logits = runner.feed(TOKENS)
            close(logits, twin.logits(tensors), tolerance)
            np.testing.assert_array_equal(logits, found.setdefault(name, logits))
        runner.reset()
        alone = runner.feed(TOKENS[:10], only="decode")  # token by token
        assert np.abs(alone - found[""][:10]).max() < 1e-2 * np.abs(alone).max()
        program.close()


@pytest.mark.parametrize("kind", KINDS)
def test_huggingface(kind: str, tmp_path: pathlib.Path) -> None:
    model = halves(hf_model(kind))
    convert_huggingface(save_hf(model, tmp_path / "source"), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)


def test_one_head_of_keys(tmp_path: pathlib.Path) -> None:
    """As Gemma 3 270M has it: a norm over a head is one over all heads, and is taken once."""
    model = halves(hf_model("gemma3_text", num_key_value_heads=1))
    convert_huggingface(save_hf(model, tmp_path / "source"), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)


def test_openlm(tmp_path: pathlib.Path) -> None:
    model = halves(random_openlm(norm="gain_only_lp_layer_norm", position="rotary", qk_norm=True))
    tiny.make_tokenizer(tmp_path)
    convert_openlm(save_openlm(model, tmp_path), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)


@pytest.mark.parametrize("form", ["int8", "int8_channel", "int4", "lut4"])
def test_a_format_leaves_what_the_optimiser_leaves(form: str) -> None:
    """Of a single matrix and of a convolution, to the bit; and not more than a step is lost."""
    values = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float16).astype(np.float32)
    left = compress.rounded(values, form)
    assert 0 < np.abs(left - values).max() < (0.03 if "8" in form else 1.0)
    product = torch.nn.Conv2d(64, 48, 1, bias=False, dtype=torch.float16)
    product.weight = torch.nn.Parameter(torch.from_numpy(values).half()[:, :, None, None], requires_grad=False)
    made = compress.compress(torch.nn.Sequential(product), {"0": form}, (torch.zeros(1, 64, 1, 1).half(),))
    np.testing.assert_array_equal(made[0].weight[:, :, 0, 0].float().numpy(), left)
    assert compress.size(values.shape, form) < 0.6 * compress.size(values.shape, "fp16")


@pytest.mark.parametrize("form", ["fp16", "int8", "int8_channel", "int4", "lut4"])
def test_a_format_is_what_is_stored(form: str, tmp_path: pathlib.Path) -> None:
    """In so many bytes of the asset, which computes with them what the format says."""
    shape = (192, 256)
    torch.manual_seed(0)
    product = torch.nn.Conv2d(shape[1], shape[0], 1, bias=False, dtype=torch.float16).requires_grad_(False)
    weight, given = product.weight[:, :, 0, 0].float().numpy().copy(), torch.randn(1, shape[1], 1, 4).half()
    module = compress.compress(torch.nn.Sequential(product), {"0": form}, (given,))
    asset.save({"main": asset.Function(module, {"x": given}, ["y"])}, tmp_path / "one.aimodel")
    size = sum(file.stat().st_size for file in (tmp_path / "one.aimodel").rglob("*") if file.is_file())
    assert 0 <= size - compress.size(shape, form) < 2000
    program = Runtime(tmp_path / "one.aimodel")
    found = program.run("main", {"x": given.numpy()})["y"][0, :, 0].astype(np.float32)
    program.close()
    expected = compress.rounded(weight, form) @ given[0, :, 0].float().numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_long_contexts_are_warned_of(model: pathlib.Path) -> None:
    sizes = Architecture.read(model / "anchor")
    assert "(apple/coreai-models #124)" in export.CoreAI().warnings(sizes, Export(2048), {})[0]
    assert not export.CoreAI().warnings(sizes, Export(1024), {})


def test_unknown_formats() -> None:
    with pytest.raises(HierMemError, match="unknown weight format 'int2'"):
        compress.rounded(np.ones((2, 2), np.float32), "int2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.make_model(tmp_path_factory.mktemp("coreai") / "model")


@pytest.fixture(scope="module")
def exported(model: pathlib.Path) -> pathlib.Path:
    """In blocks of 8 bits. Do not write into it."""
    out = model.parent / "app"
    said: list[str] = []
    export.export(model, out, Options(context=64), say=said.append)
    assert "running what was written" in said
    return out


def test_the_folder(exported: pathlib.Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == (COREAI, 1)
    assert manifest["anchor"]["compression"] == {"fp16": 1, "int8": 28}
    assert list(manifest["anchor"]["states"]) == ["k_cache", "v_cache"]
    assert {"gate", "up", "down"} < set(manifest["anchor"]["inputs"])
    receipt = json.loads((exported / "receipt.json").read_text())
    assert receipt["measured"]["kl"] < receipt["weights"]["bound"]
    assert receipt["versions"]["coreai-core"] == "1.0.0b3"
    assert receipt["overflow"]["peaks"]


def test_an_export_passes(
    model: pathlib.Path, exported: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["verify", str(exported), "--coreai", "--against", str(model), "--prompts", "1", "--json"]
    monkeypatch.setattr("sys.argv", ["hiermem", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    receipt = json.loads(capsys.readouterr().out)
    assert not end.value.code, [check for check in receipt["checks"] if not check["passed"]]
    names = [check["name"] for check in receipt["checks"]]
    assert names == [
        *("digests", "interfaces", "retriever", "routes", "logits, memory none", "choices, memory none"),
        *("effect of memory 0.0", "logits, memory 0.0", "choices, memory 0.0"),
        *("effect of memory 2.2", "logits, memory 2.2", "choices, memory 2.2"),
        *("memory 0.0 again", "memory none again", "decode alone, float16 between operations", "last position"),
    ]
    assert receipt["source"]["by"] == Runtime.name


def test_what_is_wrong_is_found(exported: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CoreMLError, match="not mlx-hiermem-coreml"):
        verify.verify_export(exported, verify.Options(format="mlx-hiermem-coreml"))
    asset_folder = exported / "anchor.aimodel"
    with pytest.raises(CoreAIError, match="is no Core AI asset"):
        Runtime(tmp_path)
    copy = shutil.copytree(asset_folder, tmp_path / "copy.aimodel")
    (copy / "main.mlirb").write_bytes((copy / "main.mlirb").read_bytes()[:-1])
    with pytest.raises(CoreAIError, match="has changed"):
        Runtime(copy)
    program = Exported(exported).program
    with pytest.raises(CoreAIError, match="decode is not given position"):
        program.run("decode", {"input_ids": np.zeros((1, 1), np.int32)})
    program.close()


def test_a_memory_swaps_without_the_states(exported: pathlib.Path) -> None:
    """What the caller owns is the caller's: two states of one program do not meet."""
    opened = Exported(exported)
    one, other = opened.runner(), opened.runner()
    ids = np.arange(20) % opened.anchor["vocabulary"]
    alone = one.feed(ids)
    other.feed(ids[::-1])
    one.reset()
    np.testing.assert_array_equal(one.feed(ids), alone)
    assert one.state["k_cache"].any()
    opened.program.close()
