"""An anchor's conversion that was interrupted goes on after the last whole shard, and gives the same bytes."""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
import torch
from safetensors.torch import load_file
from sources import hf_model, make_gguf, make_hf
from test_adapters import peft_adapter
from test_pipeline import left_in, snapshot
from tiny_openlm import random_openlm, save_openlm

from mlx_hiermem.convert import pipeline
from mlx_hiermem.convert.anchors import shards
from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.errors import OutputError

SMALL = 60_000  # bytes a shard, so that a tiny model has many


def pytorch_file(folder: pathlib.Path) -> pathlib.Path:
    make_hf(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def with_adapter(folder: pathlib.Path) -> pathlib.Path:
    make_hf(folder)
    peft_adapter(folder)
    return folder


SOURCES: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "safetensors": make_hf,
    "pytorch": pytorch_file,
    "adapter": with_adapter,
    "gguf": lambda folder: make_gguf(folder.with_suffix(".gguf"), hf_model("qwen3"), "Q8_0"),
    "openlm": lambda folder: save_openlm(random_openlm(qk_norm=True), folder),
}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards are small; the list has the names of those that were written, and a number in front ends the run."""
    names: list[str] = []
    save = shards._save

    def counted(file: pathlib.Path, tensors: dict[str, mx.array]) -> None:
        if names[:1] == [str(len(names) - 1)]:
            raise KeyboardInterrupt
        save(file, tensors)
        names.append(file.name)

    monkeypatch.setattr(shards, "SHARD", SMALL)
    monkeypatch.setattr(shards, "_save", counted)
    return names


# A tiny OpenLM layer is too small to be quantised.
CASES = [(kind, None) for kind in SOURCES] + [(kind, 8) for kind in SOURCES if kind != "openlm"]


@pytest.mark.parametrize(("kind", "quantize"), CASES)
def test_goes_on(tmp_path: pathlib.Path, saved: list[str], kind: str, quantize: int | None) -> None:
    source = SOURCES[kind](tmp_path / "source")
    convert(source, tmp_path / "whole", quantize=quantize)
    total = len(saved)
    assert total > 2
    for stop in sorted({1, total // 2, total - 1}):
        saved[:] = [str(stop)]
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "model", quantize=quantize)
        assert not (tmp_path / "model").exists()
        saved[:] = []
        convert(source, tmp_path / "model", quantize=quantize, resume=True)
        assert len(saved) == total - stop
        assert snapshot(tmp_path / "model") == snapshot(tmp_path / "whole")
        assert not any(tmp_path.rglob(".staging*"))
        assert not any(tmp_path.rglob("*.partial"))
        pipeline.shutil.rmtree(tmp_path / "model")


def test_another_source_is_not_mixed_in(tmp_path: pathlib.Path, saved: list[str]) -> None:
    source = pytorch_file(tmp_path / "source")
    saved[:] = ["3"]
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "model")
    torch.save(hf_model("llama", seed=5).state_dict(), source / "pytorch_model.bin")
    saved[:] = []
    with pytest.raises(OutputError, match="had another source or other options"):
        convert(source, tmp_path / "model", resume=True)
    convert(source, tmp_path / "model", overwrite=True)
    convert(source, tmp_path / "other")
    assert snapshot(tmp_path / "model") == snapshot(tmp_path / "other")


KILLED = """
import pathlib, sys, time
from mlx_hiermem.convert.anchors import shards
from mlx_hiermem.convert.pipeline import convert
shards.SHARD, save = int(sys.argv[3]), shards._save
shards._save = lambda *arguments: (save(*arguments), print(flush=True), time.sleep(0.3))
convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_after_a_kill(tmp_path: pathlib.Path, saved: list[str]) -> None:
    source = pytorch_file(tmp_path / "source")
    convert(source, tmp_path / "whole")
    total = len(saved)
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "model"), str(SMALL)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for _ in range(total * 3 // 4):
            assert process.stdout.readline() == b"\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert left_in(tmp_path) == {"source", "whole", "model.partial"}
    saved[:] = []
    convert(source, tmp_path / "model", resume=True)
    assert 0 < len(saved) <= total - total * 3 // 4
    assert snapshot(tmp_path / "model") == snapshot(tmp_path / "whole")


def test_a_full_disk_keeps_what_is_whole(
    tmp_path: pathlib.Path, saved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pytorch_file(tmp_path / "source")
    convert(source, tmp_path / "whole")
    total = len(saved)
    saved[:] = []

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[write] Unable to write 9 bytes to file.")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_weights", full)
        patch.setattr("mlx_hiermem.convert.anchors.huggingface.save_weights", full)
        with pytest.raises(OutputError, match="the disk is full"):
            convert(source, tmp_path / "model", resume=True)
    staged = len(saved)
    assert staged > 2
    convert(source, tmp_path / "model", resume=True)
    assert len(saved) == total
    assert snapshot(tmp_path / "model") == snapshot(tmp_path / "whole")
