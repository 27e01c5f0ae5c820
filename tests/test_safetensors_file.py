"""The header of a safetensors file: what is damaged or odd is refused before its data is read."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_hiermem.errors import CheckpointError, FileError
from mlx_hiermem.safetensors_file import StoredTensor, read_header


def test_header_of_a_good_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.array(1, np.int8)}, file, {"made": "by"})
    header, data = read_header(file), file.read_bytes()
    assert header.metadata == {"made": "by"}
    found = header.tensors["a"]
    assert (found.dtype, found.shape) == ("F32", (2, 3))
    assert np.frombuffer(data[found.begin : found.end], "<f4").tolist() == [0, 1, 2, 3, 4, 5]
    assert header.tensors["s"].shape == ()
    assert max(tensor.end for tensor in header.tensors.values()) == len(data)


def safetensors(table: Any, size: int = 8) -> bytes:
    head = (table if isinstance(table, str) else json.dumps(table)).encode()
    return len(head).to_bytes(8, "little") + head + bytes(size)


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "its header is longer than the file"),
        (b"\xff" * 64, "its header is longer than the file"),
        (safetensors({"a": ROW})[:40], "its header is longer than the file"),
        (safetensors("not json"), "its header is not JSON"),
        (safetensors("[" * 100_000), "its header is not JSON"),
        (safetensors([1]), "its header is not a table"),
        (safetensors({"__metadata__": 3}), "its header is not a table"),
        (safetensors({"a": {"shape": [1]}}), "the header entry of a is incomplete"),
        (safetensors({"a": 3}), "the header entry of a is incomplete"),
        (safetensors({"a": ROW | {"data_offsets": [0, 4, 8]}}), "the header entry of a is incomplete"),
        (safetensors({"a": ROW | {"shape": [3]}}), r"the shape \(3,\) of a does not fit its 8 bytes"),
        (safetensors({"a": ROW | {"shape": [-2], "data_offsets": [8, 0]}}), "does not fit"),
        (safetensors({"a": ROW | {"data_offsets": [-8, 0]}}), "does not fit"),
        (safetensors({"a": ROW}, size=4), "the data of a ends beyond the end of the file"),
        (safetensors(f'{{"a": {json.dumps(ROW)}, "a": {json.dumps(ROW)}}}'), "lists tensors twice: a"),
    ],
)
def test_damaged_headers(tmp_path: pathlib.Path, content: bytes, why: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.safetensors is truncated or damaged: .*({why})"):
        read_header(tmp_path / "a.safetensors", CheckpointError)


def test_a_type_that_is_not_known_is_passed_on(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(safetensors({"a": ROW | {"dtype": "F4"}}))
    begin = len(safetensors({"a": ROW | {"dtype": "F4"}})) - 8
    assert read_header(tmp_path / "a").tensors == {"a": StoredTensor("F4", (2,), begin, begin + 8)}
    with pytest.raises(FileError, match=r"cannot read .*nothing: No such file"):
        read_header(tmp_path / "nothing")


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ({"a": ONE | {"shape": "1"}}, "incomplete"),
        ({"a": ONE | {"shape": [1.0]}}, "incomplete"),
        ({"a": ONE | {"shape": [float("inf")]}}, "incomplete"),
        ({"a": ONE | {"shape": [1] * 40}}, "incomplete"),
        ({"a": ONE | {"shape": [True]}}, "incomplete"),
        ({"a": ONE | {"data_offsets": {"0": 0}}}, "incomplete"),
        ({"a": ONE | {"dtype": None}}, "incomplete"),
        ({"a": [1]}, "incomplete"),
        ({"a": ONE, "b": ONE}, "a and b overlap"),
        ([ONE], "not a table"),
        (7, "not a table"),
    ],
)
def test_odd_headers(tmp_path: pathlib.Path, rows: Any, why: str) -> None:
    (tmp_path / "a").write_bytes(safetensors(rows, size=8))
    with pytest.raises(FileError, match=why):
        read_header(tmp_path / "a")


def test_a_header_that_is_nested_too_deeply(tmp_path: pathlib.Path) -> None:
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "a").write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(FileError, match="not JSON"):
        read_header(tmp_path / "a")
