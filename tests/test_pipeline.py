"""`convert` as a whole: what a source is, and that OUT is a whole model or not there at all."""

import errno
import json
import pathlib
import shutil
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from sources import BASE, KINDS, hf_model, make_gguf, make_memory, memory_config
from tiny_openlm import random_openlm, save_openlm

from mlx_hiermem import load
from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import KINDS as MEMORY_KINDS
from mlx_hiermem.convert import pipeline
from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.errors import AnchorMismatchError, CheckpointError, HierMemError, OutputError

CONFIG = memory_config(transformers.LlamaConfig(**{**BASE, **KINDS["llama"][1]}))


@pytest.fixture
def memory(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_memory(tmp_path / "memory.safetensors", CONFIG, generic=6)


def left_in(folder: pathlib.Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file's content."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_anchor_and_bank(hf: pathlib.Path, memory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(str(hf), tmp_path / "model", memory=memory, progress=lambda *now: seen.append(now))
    assert (report.architecture, report.dtype, report.blocks) == ("llama", "float32", 3 + 9)
    assert report.parameters == sum(p.numel() for p in hf_model("llama").parameters())
    assert report.bank_bytes == sum(
        f.stat().st_size for f in (tmp_path / "model/bank/blocks").rglob("*.safetensors")
    )
    assert json.loads(json.dumps(report.to_json()))["source"] == "huggingface: tiny-llama"
    assert seen[-1][0] == seen[-1][1] > 0
    bank = MemoryBank.open(tmp_path / "model" / "bank")
    assert bank.manifest.anchor == identify(tmp_path / "model/anchor", "tiny-llama")
    assert list(bank.problems()) == []
    assert left_in(tmp_path / "model") == {"anchor", "bank", "source.json"}
    assert left_in(tmp_path) == {"model", "memory.safetensors"}
    model = load(tmp_path / "model")
    assert model.generate("ab", memory="0.1", max_tokens=3).text != ""
    assert model.selection.blocks == ("0", "0.1")


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_every_kind_of_memory(hf: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    config = memory_config(transformers.LlamaConfig(**{**BASE, **KINDS["llama"][1]}), kind)
    convert(str(hf), tmp_path / "model", memory=make_memory(tmp_path / "memory.safetensors", config))
    model = load(tmp_path / "model")
    assert model.bank
    assert model.bank.config == config
    model.generate("ab", memory="2.2", max_tokens=2)


def test_the_same_bytes_every_time(hf: pathlib.Path, memory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    convert(str(hf), tmp_path / "one", memory=memory)
    convert(str(hf), tmp_path / "two", memory=memory)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_what_a_source_is(hf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "gguf").mkdir()
    gguf = make_gguf(tmp_path / "gguf" / "tiny.gguf", hf_model("llama"))
    openlm = save_openlm(random_openlm(), tmp_path / "openlm")
    found = [find_source(str(src)) for src in (hf, gguf, gguf.parent, openlm, openlm.parent)]
    assert [source.kind for source in found] == ["huggingface", "gguf", "gguf", "openlm", "openlm"]
    assert [source.name for source in found] == ["tiny-llama", "tiny", "tiny", "epoch_1", "openlm"]


def test_gguf_and_openlm_sources(tmp_path: pathlib.Path) -> None:
    report = convert(str(make_gguf(tmp_path / "tiny.gguf", hf_model("llama"), "Q8_0")), tmp_path / "gguf")
    assert report.dtype == "float16"
    assert "Q8_0" in report.warnings[0]
    report = convert(
        str(save_openlm(random_openlm(hidden=64, ffn_width=96), tmp_path / "run")), tmp_path / "openlm"
    )
    assert report.architecture == "openlm"
    assert "no tokenizer" in report.warnings[0]


def spoil_nothing(folder: pathlib.Path) -> None:
    pass


BAD_SOURCES: dict[str, tuple[Callable[[pathlib.Path], Any], str, str]] = {
    "nothing there": (spoil_nothing, "absent", "no file or folder"),
    "empty folder": (lambda f: (f / "src").mkdir(), "src", "no config.json, no .pt and no .gguf"),
    "a text": (lambda f: (f / "src.txt").write_text("hi"), "src.txt", "not a checkpoint of a known kind"),
    "two GGUF files": (
        lambda f: [(f / name).write_bytes(b"") for name in ("a.gguf", "b.gguf")],
        "",
        "holds 2 GGUF files",
    ),
    "a part of a folder": (
        lambda f: [(f / "config.json").write_text('{"model_type": "llama"}'), (f / "model.bin").write_bytes(b"")],
        "model.bin",
        "a part of a Hugging Face model",
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources(tmp_path: pathlib.Path, name: str) -> None:
    prepare, src, message = BAD_SOURCES[name]
    prepare(tmp_path)
    before = left_in(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        convert(str(tmp_path / src), tmp_path / "out" / "model")
    assert message in str(raised.value)
    assert left_in(tmp_path) == before


def test_bad_options(hf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for options in ({"quantize": 3}, {"memory": tmp_path / "absent"}, {"key_map": tmp_path / "absent"}):
        with pytest.raises(HierMemError):
            convert(str(hf), tmp_path / "model", **options)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        convert(str(hf), tmp_path / "model", tokenizer=str(tmp_path / "absent"))
    assert left_in(tmp_path) == set()


def test_a_memory_for_another_anchor_leaves_nothing(hf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    wide = memory_config(transformers.LlamaConfig(**{**BASE, "hidden_size": 128}))
    memory = make_memory(tmp_path / "memory.safetensors", wide)
    with pytest.raises(AnchorMismatchError):
        convert(str(hf), tmp_path / "model", memory=memory)
    assert left_in(tmp_path) == {"memory.safetensors"}


def test_out_exists(hf: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    out.mkdir()
    convert(str(hf), out)  # an empty folder is as good as none
    first = snapshot(out)
    with pytest.raises(OutputError, match="exists already"):
        convert(str(hf), out)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "convert_huggingface", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(str(hf), out, overwrite=True)
    assert snapshot(out) == first  # the old model stays until the new one is whole
    assert left_in(tmp_path) == {"model"}
    convert(str(hf), out, quantize=8, overwrite=True)
    assert snapshot(out) != first
    assert left_in(tmp_path) == {"model"}
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("…")
    with pytest.raises(OutputError, match="not a model folder"):
        convert(str(hf), tmp_path / "precious", overwrite=True)


def test_resuming(
    hf: pathlib.Path, memory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(str(hf), tmp_path / "whole", memory=memory)
    own = pipeline.convert_memory

    def interrupted(*args: Any, **options: Any) -> None:
        def stop(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        own(*args, **options | {"progress": stop})

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "convert_memory", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(str(hf), tmp_path / "model", memory=memory)
    assert not (tmp_path / "model").exists()
    with pytest.raises(OutputError, match="--resume"):
        convert(str(hf), tmp_path / "model", memory=memory)
    with pytest.raises(OutputError, match="another source or other options"):
        convert(str(hf), tmp_path / "model", memory=memory, quantize=8, resume=True)
    with pytest.raises(OutputError, match="another source or other options"):
        convert(str(hf), tmp_path / "model", memory=memory, tokenizer=str(hf), resume=True)
    note = tmp_path / "model.partial" / "source.json"
    noted = note.read_text()
    note.write_text(json.dumps(json.loads(noted) | {"tokenizer": [{"name": "tokenizer.json"}]}))
    with pytest.raises(OutputError, match="another source or other options"):  # had another, and now has none
        convert(str(hf), tmp_path / "model", memory=memory, resume=True)
    note.write_text(noted)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "convert_huggingface", lambda *_, **__: 1 / 0)  # the anchor is not made again
        convert(str(hf), tmp_path / "model", memory=memory, resume=True)
    assert snapshot(tmp_path / "model") == snapshot(tmp_path / "whole")
    assert left_in(tmp_path) == {"model", "whole", "memory.safetensors"}


def test_out_may_be_a_link(hf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    for number, target in enumerate(("real", "not there yet")):
        link = tmp_path / f"link{number}"
        link.symlink_to(target)
        convert(str(hf), link)
        assert link.is_symlink()
        assert (tmp_path / target / "anchor" / "config.json").is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_overwriting_clears_an_interrupted_run(
    hf: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "convert_huggingface", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(str(hf), tmp_path / "model")
    assert left_in(tmp_path) == {"model.partial"}
    convert(str(hf), tmp_path / "model", overwrite=True)
    assert left_in(tmp_path) == {"model"}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[write] Unable to write 9 bytes to file.")],
    ids=["numpy", "mlx"],
)
def test_the_disk_fills_up(
    hf: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "convert_huggingface", full)
    with pytest.raises(OutputError, match="the disk is full"):
        convert(str(hf), tmp_path / "model")
    assert left_in(tmp_path) == set()


def test_too_small_a_disk(hf: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(9, 9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"converting needs up to 0.0 GB, the disk of .* has 0.0 GB free"):
        convert(str(hf), tmp_path / "model")
    assert left_in(tmp_path) == set()
