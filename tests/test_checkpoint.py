"""Reading checkpoints: the right bits from every form of file, and one clear line for every bad one."""

import json
import os
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlx_hiermem.convert.checkpoint import RawTensor, is_finite, open_checkpoint
from mlx_hiermem.errors import CheckpointError

TENSORS = {
    "a.float32": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)),
    "b.float16": torch.arange(12, dtype=torch.float16).reshape(6, 2),
    "c.bfloat16": torch.arange(40, dtype=torch.bfloat16).reshape(4, 10),
    "d.float64": torch.tensor(1.5, dtype=torch.float64),
    "e.int64": torch.arange(3),
    "f.bool": torch.tensor([True, False]),
    "g.empty": torch.zeros(0, 4),
}


def assert_holds(path: pathlib.Path, tensors: dict[str, torch.Tensor] = TENSORS) -> None:
    with open_checkpoint(path) as source:
        assert sorted(source.names()) == sorted(tensors)
        for name, tensor in tensors.items():
            raw = source.read(name)
            assert (raw.dtype, raw.shape) == (source.dtype(name), source.shape(name))
            assert (raw.dtype, raw.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            assert np.array_equal(raw.float32(), tensor.float().numpy())
            if tensor.ndim and len(tensor) > 2:
                rows = source.rows(name, 1, 3)
                assert rows.shape == (2, *tensor.shape[1:])
                assert np.array_equal(rows.float32(), tensor[1:3].float().numpy())


def test_safetensors(tmp_path: pathlib.Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"kind": "ffn"})
    assert_holds(tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").metadata == {"kind": "ffn"}


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin"])
def test_pytorch(tmp_path: pathlib.Path, name: str, zip_format: bool) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zip_format)
    assert_holds(tmp_path / name)
    assert_holds(tmp_path / name)  # giving pages back must not have touched the file


@pytest.mark.parametrize("key", ["av_model_sd", "state_dict", "model"])
def test_nested_state_dicts(tmp_path: pathlib.Path, key: str) -> None:
    other = {"optimizer": {"m": torch.ones(2)}, "epoch": 3, "name": "run", "args": {"lr": [1e-3, None]}}
    torch.save({key: TENSORS} | other, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as source:
        assert source.extras == {"epoch": 3, "name": "run", "args": {"lr": [1e-3, None]}}


def test_averages_are_preferred(tmp_path: pathlib.Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "av_model_sd": {"a": torch.ones(1)}}, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", {"a": torch.ones(1)})


def test_nested_tensors_get_dotted_names(tmp_path: pathlib.Path) -> None:
    torch.save({"layers": {"0": {"w": torch.ones(2)}}, "head": torch.zeros(1)}, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", {"layers.0.w": torch.ones(2), "head": torch.zeros(1)})


def test_views_and_shared_storage(tmp_path: pathlib.Path) -> None:
    base = torch.arange(60.0).reshape(5, 12)
    tensors = {"base": base, "turned": base.T, "tail": base[2:], "stretched": base[:1].expand(4, 12)}
    torch.save(tensors, tmp_path / "m.pt")
    assert_holds(tmp_path / "m.pt", tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: pathlib.Path, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save: Any = save_file if suffix == "safetensors" else torch.save
    names, weight_map = sorted(TENSORS), {}
    for shard, part in enumerate((names[:3], names[3:])):
        file = f"{stem}-{shard}.{suffix}"
        save({name: TENSORS[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    assert_holds(tmp_path)
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file({"stray": torch.ones(1)}, tmp_path / "adapter.safetensors")  # the index does not list it
    assert_holds(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"lost": file}}))
    assert_refused(tmp_path, "the shards lack tensors that the index lists: lost")
    (tmp_path / file).unlink()
    assert_refused(tmp_path, f"lacks {file}, which")


def test_usual_name_before_others(tmp_path: pathlib.Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert_holds(tmp_path, {"a": torch.ones(1)})


def test_the_usual_index_before_mistrals_own(tmp_path: pathlib.Path) -> None:
    for stem, value in (("consolidated", torch.zeros(1)), ("model", torch.ones(1))):
        save_file({"a": value}, tmp_path / f"{stem}-1.safetensors")
        index = {"weight_map": {"a": f"{stem}-1.safetensors"}}
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert_holds(tmp_path, {"a": torch.ones(1)})


def assert_refused(path: pathlib.Path, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_paths(tmp_path: pathlib.Path) -> None:
    assert_refused(tmp_path / "nowhere", "there is no file or folder")
    assert_refused(tmp_path, "holds no checkpoint, only nothing")
    (tmp_path / "notes.txt").write_text("hello")
    assert_refused(tmp_path, "holds no checkpoint, only notes.txt")
    assert_refused(tmp_path / "notes.txt", "is not a checkpoint that can be read")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../other.safetensors"}}'])
def test_bad_index(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, "the index")


def test_two_checkpoints_in_a_folder(tmp_path: pathlib.Path) -> None:
    for epoch in (1, 2):
        torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / f"epoch_{epoch}.pt")
    assert_refused(tmp_path, "the tensor a is in both epoch_1.pt and epoch_2.pt")


def _header(table: Any, data: int = 8) -> Callable[[bytes], bytes]:
    head = (table if isinstance(table, str) else json.dumps(table)).encode()
    return lambda _: len(head).to_bytes(8, "little") + head + b"\0" * data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "its header is longer than the file"),
        (lambda data: data[:40], "its header is longer than the file"),
        (lambda data: data[:-1], "ends beyond the end of the file"),
        (lambda data: b"\xff" * 64, "its header is longer than the file"),
        (_header("not json"), "its header is not JSON"),
        (_header([1]), "its header is not a table"),
        (_header({"a": {"shape": [1]}}), "the header entry of a is incomplete"),
        (_header({"a": ENTRY | {"shape": [3]}}), "the shape (3,) of a does not fit its 8 bytes"),
        (_header({"a": ENTRY | {"shape": [-2], "data_offsets": [8, 0]}}), "does not fit"),
        (_header({"a": ENTRY | {"dtype": "F8_E4M3"}}), "the tensor a has the dtype F8_E4M3"),
        (_header(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'), "lists tensors twice: a"),
    ],
)
def test_bad_safetensors(tmp_path: pathlib.Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(100)}, file)
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(file, message)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is truncated or not a PyTorch file"),
        (lambda data: data[:-200], "is truncated or not a PyTorch file"),
        (lambda data: data[: len(data) // 2], "is truncated or not a PyTorch file"),
        (lambda data: b"hello, this is a text", "is truncated or not a PyTorch file"),
        (lambda data: pickle.dumps({"a": Harmful()}), "could execute code when opened: it is refused"),
    ],
)
def test_bad_pytorch_files(tmp_path: pathlib.Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = tmp_path / "m.pt"
    torch.save({"a": torch.ones(1000)}, file)
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(file, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1), "b": Harmful()}, "could execute code when opened: it is refused"),
        ([torch.ones(1)], "holds a list, not a dictionary of tensors"),
        ({"epoch": 3}, "holds no tensors. Its keys are epoch."),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "the tensor a is complex64"),
        ({"a": torch.ones(2).to_sparse()}, "the tensor a is float32, torch.sparse_coo"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "lists tensors twice: a.b"),
    ],
)
def test_pytorch_files_with_other_things(tmp_path: pathlib.Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    assert_refused(tmp_path / "m.pt", message)


def test_torch_is_not_needed_for_safetensors(tmp_path: pathlib.Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors")
    torch.save(TENSORS, tmp_path / "m.pt")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mlx_hiermem.convert.checkpoint import open_checkpoint\n"
        "print(open_checkpoint('m.safetensors').read('c.bfloat16').float32().sum())\n"
        "try: open_checkpoint('m.pt')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert float(first) == sum(range(40))
    assert second.startswith("MissingDependencyError reading m.pt needs PyTorch")
    assert "mlx-hiermem[torch]" in second


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    for value in (limits.max, limits.min, limits.smallest_normal, -0.0, torch.inf, -torch.inf, torch.nan):
        tensor = torch.zeros(2, 33, dtype=dtype)
        tensor[1, 7] = value
        for sign in (1, -1):  # also NaN has a sign
            assert is_finite(_raw(tensor * sign)) == bool(torch.isfinite(tensor).all())
    assert is_finite(_raw(torch.zeros(0, dtype=dtype)))
    assert is_finite(_raw(torch.tensor([-1, 3])))


def _raw(tensor: torch.Tensor) -> RawTensor:
    data = tensor.view(torch.int16).numpy().view("u2") if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return RawTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def test_rounding_is_pytorchs() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-45, 38, 20_000)
    for dtype in (torch.float16, torch.bfloat16):
        ours = _raw(values).astype(str(dtype).removeprefix("torch.")).float32()
        assert np.array_equal(ours, values.to(dtype).float().numpy())
