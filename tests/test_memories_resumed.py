"""Converting memories goes on after an interruption, meets no other writer, and stays within its memory."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from memory_checkpoints import assert_same, convert, design, documented, make_tensors, save, settings_of

from mlx_hiermem.bank import writer as bank_writer
from mlx_hiermem.bank.bank import MANIFEST
from mlx_hiermem.bank.writer import BankWriter
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import OutputError


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    write_block = bank_writer.write_block

    def counted(file: pathlib.Path, *arguments: Any) -> tuple[int, str]:
        names.append(file.name)
        return write_block(file, *arguments)

    monkeypatch.setattr(bank_writer, "write_block", counted)
    return names


def interrupt(checkpoint: pathlib.Path, out: pathlib.Path, share: float = 0.5) -> None:
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, out, progress=progress)
    assert not out.exists()


def test_resume_writes_only_what_is_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = design(k=8, sizes=(2, 2))
    tensors = make_tensors(config, generic=3)
    file = save(tmp_path / "m.safetensors", tensors, settings_of(config))
    writes = count_writes(monkeypatch)
    interrupt(file, tmp_path / "bank")
    first = len(writes)
    journal = tmp_path / "bank.partial/journal.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert 0.5 * 73 < len(rows) <= first < 73
    (tmp_path / "bank.partial" / rows[3]["name"]).write_bytes(b"damaged since")
    with journal.open("a") as stream:
        stream.write('{"name": "half a li')
    convert(file, tmp_path / "bank", resume=True)
    assert len(writes) - first == 73 - len(rows) + 1
    assert_same(tmp_path / "bank", tensors, config)
    convert(file, tmp_path / "again")
    manifests = [(tmp_path / name / MANIFEST).read_text() for name in ("bank", "again")]
    assert manifests[0] == manifests[1]


def test_resume_refuses_another_source(tmp_path: pathlib.Path) -> None:
    file = save(tmp_path / "m.safetensors", make_tensors(design()), settings_of(design()))
    interrupt(file, tmp_path / "bank")
    save(file, make_tensors(design(), seed=1))
    with pytest.raises(OutputError, match="had another source or other settings"):
        convert(file, tmp_path / "bank", resume=True)
    (tmp_path / "bank.partial/journal.jsonl").write_text("3\n4\n")
    with pytest.raises(OutputError, match=r"the journal in .* is damaged"):
        convert(file, tmp_path / "bank", resume=True)


def test_the_folder_to_write_into_must_be_there(tmp_path: pathlib.Path) -> None:
    file = save(tmp_path / "m.safetensors", make_tensors(design()), settings_of(design()))
    with pytest.raises(OutputError, match=r"cannot write .*: No such file"):
        convert(file, tmp_path / "nowhere/bank")


def test_two_writers_do_not_meet(tmp_path: pathlib.Path) -> None:
    with BankWriter(tmp_path / "bank", "a") as first:
        first.write("blocks/0.safetensors", {"gate": ((1,), b"1234")}, "float32")
        with pytest.raises(OutputError, match="another process is writing"):
            BankWriter(tmp_path / "bank", "a", resume=True)


SLOW = """
import pathlib, sys, time
from memory_checkpoints import convert
slowly = lambda done, total: (print(flush=True), time.sleep(0.2))
convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), progress=slowly)
"""


@pytest.mark.slow
def test_resume_after_a_kill(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = design(k=8, sizes=(2, 2))
    tensors = make_tensors(config)
    file = save(tmp_path / "m.safetensors", tensors, settings_of(config))
    command = [sys.executable, "-c", SLOW, str(file), str(tmp_path / "bank")]
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == b"\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "bank").exists()
    finished = len((tmp_path / "bank.partial/journal.jsonl").read_text().splitlines()) - 1
    assert 3 <= finished < 72
    writes = count_writes(monkeypatch)
    convert(file, tmp_path / "bank", resume=True)
    assert len(writes) == 72 - finished
    assert_same(tmp_path / "bank", tensors, config)


def make_large(file: pathlib.Path, config: MemoryConfig) -> int:
    """A bfloat16 safetensors file of zeros with holes instead of data, made in no time; returns its bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for level, units in enumerate(config.block_sizes, 1):
        shapes = {f"tree.level{level}.centroids": ("F32", (config.branching ** (level - 1), config.branching, 384))}
        for part, shape in config.shapes(units).items():
            shapes[f"memory.level{level}.{documented(part)}"] = ("BF16", (config.branching**level, *shape))
        for name, (dtype, shape) in shapes.items():
            size = int(np.prod(shape)) * (4 if dtype == "F32" else 2)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + size)}
            offset += size
    head = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        stream.truncate(8 + len(head) + offset)
    return offset


MEASURED = """
import pathlib, re, sys
import torch
from mlx_hiermem.convert.memories import *
from mlx_hiermem.config import AnchorIdentity
def status(field):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
before = status("VmRSS")
convert_memory(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), anchor=AnchorIdentity("big", "", "", 512, 10),
               anchor_dims=AnchorDims(512, 2048, 512, 512))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc/self/status")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: pathlib.Path, suffix: str) -> None:
    config = MemoryConfig("ffn", 5, (64, 64, 64), tuple(range(10)), 512, "bfloat16")
    file = tmp_path / "m.safetensors"
    size = make_large(file, config)
    largest = config.parameters(64) * 2
    if suffix == ".pt":
        from safetensors.torch import load_file

        torch.save(load_file(file), tmp_path / "m.pt")
        file = tmp_path / "m.pt"
    command = [sys.executable, "-c", MEASURED, str(file), str(tmp_path / "bank")]
    grown = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert size > 300e6
    assert grown < 16 * largest + (24 << 20) < size / 5
