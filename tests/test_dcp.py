"""Distributed checkpoints (DCP), as FSDP writes them: read as PyTorch reads them, row by row; nothing is run."""

import json
import os
import pathlib
import pickle
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from sources import hf_model, make_memory, memory_config
from test_checkpoint import TENSORS, assert_holds
from tiny import make_tokenizer
from tiny_openlm import random_openlm
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.convert.checkpoint import open_checkpoint
from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.convert.verify import verify
from mlx_hiermem.errors import CheckpointError


def save(state: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    with warnings.catch_warnings(action="ignore"):  # that there is one process only
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def assert_refused(folder: pathlib.Path, message: str) -> None:
    def read() -> None:
        with open_checkpoint(folder) as source:
            for name in source.names():
                source.read(name)

    with pytest.raises(CheckpointError) as caught:
        read()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", ["", "model", "state_dict"])
def test_holds_what_was_saved(tmp_path: pathlib.Path, table: str) -> None:
    state = {table: TENSORS, "optimizer": {"m": torch.ones(2)}} if table else TENSORS
    save(state, tmp_path / "dcp")
    assert_holds(tmp_path / "dcp")


def test_plain_values_are_extras(tmp_path: pathlib.Path) -> None:
    save({"model": TENSORS, "epoch": 3, "config": {"kind": "ffn", "layers": [0, 2]}}, tmp_path / "dcp")
    with open_checkpoint(tmp_path / "dcp") as source:
        assert source.extras == {"epoch": 3, "config": {"kind": "ffn", "layers": [0, 2]}}
        assert {file.name for file in source.files} == {".metadata", "__0_0.distcp"}


def shard(folder: pathlib.Path, name: str, tensor: torch.Tensor, chunks: list[tuple[slice, ...]]) -> None:
    """Writes a tensor's chunks as the ranks of a larger run do: each archive in a file of its own rank."""
    save({name: torch.zeros(1)}, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata[name]
    [info] = metadata.storage_data.values()
    entry.size, entry.chunks, entry.properties.dtype = tensor.shape, [], tensor.dtype
    metadata.storage_data = {}
    for rank, chunk in enumerate(chunks):
        offsets = torch.Size([part.start for part in chunk])
        values = tensor[chunk].clone()
        entry.chunks.append(ChunkStorageMetadata(offsets, values.shape))
        file = folder / f"__{rank}_0.distcp"
        with file.open("wb") as stream:
            stream.write(b"another rank's tensor")  # archives stand behind one another
            torch.save(values, stream)
        here = type(info)(file.name, 21, file.stat().st_size - 21)
        metadata.storage_data[MetadataIndex(name, offsets, rank)] = here
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uneven_shards_along_any_axis(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 6, 5).to(dtype)
    every = slice(0, 5)
    rows = [(slice(0, 3), slice(0, 6), every), (slice(3, 6), slice(0, 6), every), (slice(6, 7), slice(0, 6), every)]
    tiles = [(slice(i, j), slice(k, k + 3), every) for i, j in ((0, 4), (4, 7)) for k in (0, 3)]
    for number, chunks in enumerate((rows, tiles)):
        shard(tmp_path / str(number), "w", tensor, chunks)
        assert_holds(tmp_path / str(number), {"w": tensor})
        with open_checkpoint(tmp_path / str(number)) as source:
            for start in range(7):
                for stop in range(start, 8):
                    found = source.rows("w", start, stop).float32()
                    assert np.array_equal(found, tensor[start:stop].float().numpy())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


def test_bad_metadata(tmp_path: pathlib.Path) -> None:
    folder = save({"w": torch.ones(3)}, tmp_path / "dcp")
    good = (folder / ".metadata").read_bytes()
    for content, message in (
        (pickle.dumps(Harmful()), "could execute code when opened"),
        (good[:-40], "damaged"),
        (pickle.dumps({"a": 1}), "is not the metadata of a distributed checkpoint"),
        (b"", "is not the metadata"),
        (good.replace(b"__0_0.distcp", b"/etc/passwd."), "lacks /etc/passwd., which .metadata lists"),
    ):
        (folder / ".metadata").write_bytes(content)
        assert_refused(folder, message)


def test_bad_data(tmp_path: pathlib.Path) -> None:
    folder = save({"w": torch.ones(1000)}, tmp_path / "dcp")
    data = folder / "__0_0.distcp"
    good = data.read_bytes()
    for content in (good[:200], good[:-900], b"", os.urandom(len(good)), pickle.dumps({"a": Harmful()})):
        data.write_bytes(content)
        assert_refused(folder, "is truncated or damaged")
    data.unlink()
    assert_refused(folder, "lacks __0_0.distcp")


@pytest.mark.parametrize("layout", ["beside", "trainer", "inner"])
def test_an_anchor_equals_its_source(tmp_path: pathlib.Path, layout: str) -> None:
    """Beside config.json, in the Trainer's own folder, and by that folder's name. The names have FSDP's parts."""
    model, folder = hf_model("llama"), tmp_path / "run"
    model.config.save_pretrained(folder)
    make_tokenizer(folder)
    state = {
        name.replace("layers.1.", "layers.1._fsdp_wrapped_module."): t for name, t in model.state_dict().items()
    }
    weights = folder if layout == "beside" else folder / "pytorch_model_fsdp_0"
    save({"model": state}, weights)
    if layout != "beside":
        save({"optimizer": {"m": torch.ones(3)}}, folder / "optimizer_0")
    source = weights if layout == "inner" else folder
    assert find_source(str(source)).kind == "huggingface"
    convert(source, tmp_path / "model")
    receipt = verify(tmp_path / "model", str(source))
    assert receipt.passed, receipt.checks


def test_without_a_config(tmp_path: pathlib.Path) -> None:
    save({"model": hf_model("llama").state_dict()}, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"but no config\.json\. Copy config\.json"):
        find_source(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="Give its folder"):
        find_source(str(tmp_path / "run/__0_0.distcp"))


def test_an_openlm_anchor(tmp_path: pathlib.Path) -> None:
    model = random_openlm()
    folder = save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "run")
    settings = {"n_heads": model.config.heads, "model_norm": model.config.norm, "seq_len": 2048}
    (folder / "model.json").write_text(json.dumps(settings))
    assert find_source(str(folder)).kind == "openlm"
    convert(folder, tmp_path / "model")
    assert verify(tmp_path / "model", str(folder)).passed


def test_a_memory(tmp_path: pathlib.Path) -> None:
    """A bank of a distributed checkpoint has the very bytes of the same bank's safetensors."""
    model = hf_model("llama")
    model.save_pretrained(tmp_path / "source")
    make_tokenizer(tmp_path / "source")
    from safetensors import safe_open

    file = make_memory(tmp_path / "memory.safetensors", memory_config(model.config), generic=3)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dictionary
        settings = {key: json.loads(value) for key, value in opened.metadata().items()}
    memory = save({"model": tensors, "config": settings}, tmp_path / "memory")
    convert(tmp_path / "source", tmp_path / "one", memory=file)
    convert(tmp_path / "source", tmp_path / "two", memory=memory)
    one, two = (MemoryBank.open(tmp_path / name / "bank") for name in ("one", "two"))
    assert one.manifest.blocks == two.manifest.blocks
    assert one.manifest.generic == two.manifest.generic
    receipt = verify(tmp_path / "two", str(tmp_path / "source"), memory)
    assert receipt.passed, receipt.checks
    shutil.rmtree(memory)
