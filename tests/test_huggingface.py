"""Hugging Face folders and hub ids to anchors: equal to transformers, bytes that repeat, and every bad input."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import generate, load
from safetensors.torch import load_file, save_file
from sources import KINDS, LLAMA3_ROPE, hf_model, make_hf, save_hf
from tiny import make_tokenizer

from mlx_hiermem.convert import parity
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.source import files_of, find_source
from mlx_hiermem.errors import AnchorError, CheckpointError, HierMemError

IDS = parity.prompt(40, 260)  # far beyond gemma's sliding window of 6


def error(anchor: pathlib.Path, source: pathlib.Path) -> float:
    """Relative difference of the anchor's logits, by plain mlx-lm, to those of its source in transformers."""
    ours, _ = load(str(anchor))
    ours.set_dtype(mx.float32)
    theirs = parity.TorchSide(parity.load_source(find_source(str(source))))
    return parity.difference(np.array(ours(mx.array(IDS))), theirs.run(IDS, "none")[1])


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(tmp_path: pathlib.Path, kind: str) -> None:
    convert_huggingface(make_hf(tmp_path / "hf", kind), tmp_path / "anchor")
    assert error(tmp_path / "anchor", tmp_path / "hf") < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    convert_huggingface(make_hf(tmp_path / "hf", dtype=dtype), tmp_path / "anchor")
    tensors = load_file(tmp_path / "anchor" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert error(tmp_path / "anchor", tmp_path / "hf") < 1e-5


def test_rotary_settings_old_and_new(tmp_path: pathlib.Path) -> None:
    """transformers 5 nests them in rope_parameters, older versions had rope_theta and rope_scaling."""
    folder = make_hf(tmp_path / "hf", rope_parameters=LLAMA3_ROPE, max_position_embeddings=16384)
    convert_huggingface(folder, tmp_path / "new")
    assert error(tmp_path / "new", folder) < 1e-5
    old = {"rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": LLAMA3_ROPE}
    edit(folder / "config.json", rope_parameters=None, **old)
    convert_huggingface(folder, tmp_path / "old")
    assert error(tmp_path / "old", folder) < 1e-5


def test_shards_and_pytorch_files_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    model = hf_model("qwen3", dtype=torch.bfloat16)
    whole, shards, torch_only = (tmp_path / name for name in ("whole", "shards", "torch"))
    save_hf(model, whole)
    model.save_pretrained(shards, max_shard_size="60KB")
    make_tokenizer(shards)
    assert len(list(shards.glob("*.safetensors"))) > 1
    save_hf(model, torch_only)
    torch.save(load_file(torch_only / "model.safetensors"), torch_only / "pytorch_model.bin")
    (torch_only / "model.safetensors").unlink()
    digests = set()
    for folder in (whole, whole, shards, torch_only):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        convert_huggingface(folder, out)
        digests.add(hashlib.sha256(b"".join(f.read_bytes() for f in sorted(out.iterdir()))).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(("bits", "hidden", "group"), [(4, 64, 64), (8, 64, 64), (4, 96, 32)])
def test_quantising(tmp_path: pathlib.Path, bits: int, hidden: int, group: int, capsys: Any) -> None:
    folder = make_hf(tmp_path / "hf", hidden_size=hidden, head_dim=32)
    convert_huggingface(folder, tmp_path / "anchor", quantize=bits)
    model, tokenizer = load(str(tmp_path / "anchor"))
    projection = model.layers[0].mlp.gate_proj
    assert (projection.bits, projection.group_size) == (bits, group)
    assert isinstance(generate(model, tokenizer, "abc", max_tokens=2), str)
    assert capsys.readouterr().out == ""
    with pytest.raises(AnchorError, match="quantised already"):
        convert_huggingface(tmp_path / "anchor", tmp_path / "again", quantize=4)


def test_an_anchor_converts_to_itself(tmp_path: pathlib.Path) -> None:
    convert_huggingface(make_hf(tmp_path / "hf"), tmp_path / "one", quantize=8)
    convert_huggingface(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


# Bad input: each of these spoils a good folder in one way.


def edit(file: pathlib.Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def config(**changes: Any) -> Callable[[pathlib.Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        loaded = load_file(folder / "model.safetensors")
        change(loaded)
        save_file(loaded, folder / "model.safetensors")

    return spoil


def truncate(folder: pathlib.Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)


def in_shards(folder: pathlib.Path) -> None:
    """Two .bin files and their index, instead of the safetensors."""
    loaded, index = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((sorted(loaded)[::2], sorted(loaded)[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: loaded[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


def test_shards_of_mixed_dtypes(tmp_path: pathlib.Path) -> None:
    """bfloat16 matrices, float32 norms, float16 embeddings: each stays what it is."""
    folder = make_hf(tmp_path / "hf", "qwen3")
    loaded = load_file(folder / "model.safetensors")
    for name, value in loaded.items():
        loaded[name] = value.to(
            torch.float16 if "embed" in name else torch.float32 if "norm" in name else torch.bfloat16
        )
    save_file(loaded, folder / "model.safetensors")
    in_shards(folder)
    convert_huggingface(folder, tmp_path / "anchor")
    saved = load_file(tmp_path / "anchor/model.safetensors")
    assert {name: value.dtype for name, value in saved.items()} == {n: v.dtype for n, v in loaded.items()}
    assert error(tmp_path / "anchor", folder) < 1e-5


NORM = "model.layers.1.input_layernorm.weight"
BAD: dict[str, tuple[Callable[[pathlib.Path], Any], type[HierMemError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), AnchorError, "cannot read"),
    "no model type": (config(model_type=None), CheckpointError, "names no model_type"),
    "unknown model type": (config(model_type="novel"), AnchorError, "novel not supported"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "holds no checkpoint"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), CheckpointError, "has no tokenizer"),
    "truncated": (truncate, CheckpointError, "truncated or damaged"),
    "a key is missing": (tensors(lambda t: t.pop(NORM)), AnchorError, f"Missing 1 parameters: {NORM}"),
    "a key is left over": (
        tensors(lambda t: t.update({"model.extra": torch.ones(2)})),
        AnchorError,
        "Received 1 parameters not in model: model.extra",
    ),
    "a wrong shape": (
        tensors(lambda t: t.update({NORM: torch.ones(3)})),
        AnchorError,
        f"(3,) for parameter {NORM}",
    ),
    "not a number": (tensors(lambda t: t[NORM].fill_(float("nan"))), CheckpointError, f"{NORM} has non-finite"),
    "infinite": (tensors(lambda t: t[NORM][5:6].fill_(float("inf"))), CheckpointError, f"{NORM} has non-finite"),
    "another head than the tied": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(260, 64)})),
        CheckpointError,
        "lm_head.weight differs",
    ),
    "mixture of experts": (config(num_local_experts=8), AnchorError, "mixture of experts (num_local_experts: 8)"),
    "mixture by name": (config(model_type="qwen3_moe"), AnchorError, "mixture of experts (model_type: qwen3_moe)"),
    "scaling that is no table": (
        config(rope_scaling=["x"]),
        AnchorError,
        "a setting of config.json cannot be read",
    ),
    "quantised by a word": (config(quantization_config="gptq"), AnchorError, "software (gptq)"),
    "quantised elsewhere": (config(quantization_config={"quant_method": "gptq"}), AnchorError, "software (gptq)"),
    "no gated FFN": (config(model_type="gpt2"), AnchorError, "have no gate"),
    "another activation": (config(hidden_act="relu"), AnchorError, "ignores hidden_act relu"),
    "sliding windows": (
        config(model_type="qwen2", use_sliding_window=True, sliding_window=9),
        AnchorError,
        "ignores sliding_window 9",
    ),
    "no head, and not tied": (
        config(tie_word_embeddings=False),
        AnchorError,
        "Missing 1 parameters: lm_head.weight",
    ),
    "a shard is cut short": (
        lambda f: [in_shards(f), cut(f / "pytorch_model-00002-of-00002.bin")],
        CheckpointError,
        "pytorch_model-00002-of-00002.bin is truncated",
    ),
    "a shard is absent": (
        lambda f: [in_shards(f), (f / "pytorch_model-00001-of-00002.bin").unlink()],
        CheckpointError,
        "lacks pytorch_model-00001-of-00002.bin, which",
    ),
    "an index of other files": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        CheckpointError,
        "lacks b.safetensors",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_hf(tmp_path_factory.mktemp("good") / "hf")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(good: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    spoil, error, message = BAD[name]
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    with pytest.raises(error) as raised:
        convert_huggingface(folder, tmp_path / "anchor")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]  # nothing half-written


def test_gemma_settings_that_mlx_lm_ignores(tmp_path: pathlib.Path) -> None:
    folder = make_hf(tmp_path / "hf", "gemma3_text")
    edit(folder / "config.json", final_logit_softcapping=30.0)
    with pytest.raises(AnchorError, match="ignores final_logit_softcapping"):
        convert_huggingface(folder, tmp_path / "anchor")
    edit(folder / "config.json", final_logit_softcapping=None, layer_types=["full_attention"] * 7)
    with pytest.raises(AnchorError, match="does not repeat every 6 layers"):
        convert_huggingface(folder, tmp_path / "anchor")


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of the hub's protocol that a download makes, for one repository."""

    folder: pathlib.Path
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/tiny/llama/tree/"):
            files = [(file.name, file.stat().st_size) for file in files_of(self.folder)]
            return self.answer_json([{"type": "file", "path": n, "size": size, "oid": n} for n, size in files])
        if path.startswith("/api/models/tiny/llama"):
            names = [{"rfilename": file.name} for file in files_of(self.folder)]
            return self.answer_json({"id": "tiny/llama", "sha": self.COMMIT, "siblings": names})
        file = self.folder / path.rpartition("/")[2]
        if not path.startswith("/tiny/llama/resolve/") or not file.is_file():
            return self.send_error(404)
        self.answer(file.read_bytes(), "application/octet-stream")

    do_HEAD = do_GET  # noqa: N815

    def answer_json(self, data: Any) -> None:
        self.answer(json.dumps(data).encode(), "application/json")

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(good: pathlib.Path) -> Iterator[str]:
    """The address of a hub on this machine."""
    handler = type("Handler", (Hub,), {"folder": good})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_hub_id(hub: str, good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    code = """if True:
        import pathlib, sys
        from mlx_hiermem.convert.pipeline import convert
        from mlx_hiermem.errors import CheckpointError
        out = pathlib.Path(sys.argv[1])
        try:
            convert("tiny/absent", out)
        except CheckpointError as error:
            print(error)
        assert not list(out.parent.glob("model*"))
        convert("tiny/llama", out)
    """
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot download tiny/absent from the hub: ")
    assert done.stdout.count("\n") == 1
    assert error(tmp_path / "model/anchor", good) < 1e-5
    source = json.loads((tmp_path / "model/source.json").read_text())
    assert (source["name"], source["revision"]) == ("tiny/llama", Hub.COMMIT)
