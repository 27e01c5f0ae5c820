"""GGUF files to anchors: weights equal to the original model's, the real SmolLM2, parts, and every bad input."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
from elements import DOCUMENTS
from mlx_lm import generate, load
from safetensors.torch import load_file
from sources import KINDS, LLAMA3_ROPE, hf_model, make_gguf
from tokenizers import Tokenizer

from mlx_hiermem.anchor import load_anchor, read_config
from mlx_hiermem.convert import parity
from mlx_hiermem.convert.anchors.gguf import convert_gguf, llama3_factors
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.errors import AnchorError, CheckpointError, HierMemError, MissingDependencyError

IDS = parity.prompt(40, 260)


def convert(file: pathlib.Path, **options: Any) -> pathlib.Path:
    """Converts into a folder beside the file; returns it."""
    out = file.with_suffix(".anchor")
    convert_gguf(file, out, warn=lambda line: None, **options)
    return out


def error(anchor: pathlib.Path, model: torch.nn.Module) -> float:
    """Relative difference of the anchor's logits to a PyTorch model's."""
    ours, _, _ = load_anchor(anchor, mx.float32)
    return parity.difference(np.array(ours(mx.array(IDS))), parity.TorchSide(model).run(IDS, "none")[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_equals_the_original_and_transformers(tmp_path: pathlib.Path, kind: str) -> None:
    """The file was written from `model` here; transformers reads it by code that is not ours."""
    model = hf_model(kind)
    file = make_gguf(tmp_path / "model.gguf", model)
    if kind == "gemma3_text":
        model.model.embed_tokens.embed_scale = model.model.embed_tokens.embed_scale.bfloat16().float()
    anchor = convert(file)
    assert error(anchor, model) < 1e-5
    if kind in ("llama", "qwen2"):  # of the others transformers reads only the usual head sizes
        assert error(anchor, parity.load_source(find_source(str(file)))) < 1e-5


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float16), ("Q4_1", torch.float16)],
)
def test_dtypes(tmp_path: pathlib.Path, quant: str, dtype: torch.dtype) -> None:
    model, said = hf_model("qwen2"), []
    file = make_gguf(tmp_path / "model.gguf", model, quant)
    convert_gguf(file, tmp_path / "anchor", warn=said.append)
    tensors = load_file(tmp_path / "anchor" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert [quant in line for line in said] == [True] * quant.startswith("Q")
    for name, parameter in model.named_parameters():  # F16 and BF16 round, Q8_0 and Q4_1 have 127 and 15 steps
        scale = parameter.abs().max().item()
        step = {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 8e-3, "Q4_1": 7e-2}[quant]
        assert (tensors[name].float() - parameter).abs().max().item() <= step * scale


def test_llama3_rope_is_recovered_from_its_factors(tmp_path: pathlib.Path) -> None:
    model = hf_model("llama", rope_parameters=LLAMA3_ROPE, max_position_embeddings=16384)
    factors = llama3_factors(LLAMA3_ROPE, LLAMA3_ROPE["rope_theta"], 16).astype(np.float32)
    file = make_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": factors})
    anchor = convert(file)
    assert read_config(anchor)["rope_scaling"] == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    assert error(anchor, model) < 1e-5
    assert error(anchor, parity.load_source(find_source(str(file)))) < 1e-5
    other = make_gguf(tmp_path / "other.gguf", model, extra={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(AnchorError, match="not Llama 3's"):
        convert(other)


@pytest.mark.parametrize("key", ["rope.scale_linear", "rope.scaling.factor"])
def test_positions_scaled_as_files_of_2023_say_it(tmp_path: pathlib.Path, key: str) -> None:
    file = make_gguf(tmp_path / "model.gguf", hf_model("llama"))
    rebuild(lambda metadata, _: metadata.update({key: 8.0}))(file)
    config = read_config(convert(file))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    rebuild(lambda metadata, _: metadata.update({"rope.scaling.attn_factor": 0.5}))(file)
    with pytest.raises(AnchorError, match=r"scales its attention by 0\.5"):
        convert_gguf(file, tmp_path / "other")


def test_yarn_with_settings_of_its_own(tmp_path: pathlib.Path) -> None:
    file = make_gguf(tmp_path / "model.gguf", hf_model("llama"))
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0}
    rebuild(lambda metadata, _: metadata.update({f"rope.scaling.{key}": value for key, value in yarn.items()}))(
        file
    )
    assert read_config(convert(file))["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
    }  # fmt: skip
    rebuild(lambda metadata, _: metadata.update({"rope.scaling.yarn_ext_factor": 0.5}))(file)
    with pytest.raises(AnchorError, match="by yarn with ext_factor of its own"):
        convert_gguf(file, tmp_path / "other")


def test_the_same_bytes_every_time(tmp_path: pathlib.Path) -> None:
    file = make_gguf(tmp_path / "model.gguf", hf_model("llama"), "Q8_0")
    convert_gguf(file, tmp_path / "one", warn=str)
    convert_gguf(file, tmp_path / "two", warn=str)
    names = sorted(entry.name for entry in (tmp_path / "one").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_opens_in_mlx_lm_with_its_tokenizer(tmp_path: pathlib.Path) -> None:
    model, tokenizer = load(str(convert(make_gguf(tmp_path / "model.gguf", hf_model("llama")), quantize=8)))
    assert tokenizer.encode("xabc<c>") == [tokenizer.convert_tokens_to_ids(t) for t in ("x", "abc", "<c>")]
    assert tokenizer.eos_token_ids == {259}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert isinstance(generate(model, tokenizer, "abc", max_tokens=2), str)


# Tokenizers


def test_another_tokenizer_can_be_given(tmp_path: pathlib.Path) -> None:
    from tiny import make_tokenizer

    (tmp_path / "given").mkdir()
    make_tokenizer(tmp_path / "given")
    file = make_gguf(tmp_path / "model.gguf", hf_model("llama"))
    anchor = convert(file, tokenizer=tmp_path / "given")
    assert (anchor / "tokenizer.json").read_bytes() == (tmp_path / "given" / "tokenizer.json").read_bytes()


# The real SmolLM2


def test_smollm2_answers(smollm2_anchor: pathlib.Path) -> None:
    model, tokenizer = load(str(smollm2_anchor))
    model.set_dtype(mx.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert "Paris" in generate(model, tokenizer, prompt, max_tokens=12)


def test_smollm2_tokens(smollm2_anchor: pathlib.Path, smollm2_gguf: pathlib.Path) -> None:
    """Against transformers' reading of the same file, which has all but the rule that digits stand alone."""
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(smollm2_anchor / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert ours.encode("In 1984").tokens == ["In", "Ġ", "1", "9", "8", "4"]
    for line in DOCUMENTS.read_text().splitlines():
        text = json.loads(line)["text"]
        assert ours.decode(ours.encode(text).ids) == text
        words = "".join(char for char in text if not char.isnumeric())
        assert ours.encode(words).ids == theirs(words)["input_ids"]


# Bad input: each of these spoils a good file in one way.


def truncate(size: int) -> Callable[[pathlib.Path], None]:
    def spoil(file: pathlib.Path) -> None:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size + size if size < 0 else size)

    return spoil


def rebuild(
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any], architecture: str = "llama"
) -> Callable[[pathlib.Path], None]:
    """Writes the file again with changed metadata (of the architecture) and tensors."""

    def spoil(file: pathlib.Path) -> None:
        reader = gguf.GGUFReader(file)
        fields = {k: field for k, field in reader.fields.items() if not k.startswith("GGUF.")}
        own = {k.removeprefix("llama."): f.contents() for k, f in fields.items() if k.startswith("llama.")}
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        change(own, tensors)
        writer = gguf.GGUFWriter(file, architecture)
        types = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}
        for key, value in own.items():
            writer.add_key_value(f"{architecture}.{key}", value, types.get(type(value), gguf.GGUFValueType.UINT32))
        for key, field in fields.items():
            if key.startswith("tokenizer."):
                kinds = {"sub_type": field.types[1]} if len(field.types) > 1 else {}
                writer.add_key_value(key, field.contents(), field.types[0], **kinds)
        for name, value in tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return spoil


def metadata(**changes: Any) -> Callable[[pathlib.Path], None]:
    def change(own: dict[str, Any], _: Any) -> None:
        own.update({key.replace("__", "."): value for key, value in changes.items()})

    return rebuild(change)


NORM = "blk.1.attn_norm.weight"
BAD: dict[str, tuple[Callable[[pathlib.Path], Any], type[HierMemError], str]] = {
    "empty": (lambda f: f.write_bytes(b""), CheckpointError, "truncated or not a GGUF"),
    "not GGUF": (lambda f: f.write_bytes(b"x" * 4096), CheckpointError, "truncated or not a GGUF"),
    "truncated in the data": (truncate(-5000), CheckpointError, "truncated or not a GGUF"),
    "truncated in the metadata": (truncate(2000), CheckpointError, "truncated or not a GGUF"),
    "another architecture": (rebuild(lambda m, t: None, "mamba"), AnchorError, "architecture 'mamba'"),
    "a mixture of experts": (metadata(expert_count=8), AnchorError, "mixture of experts (expert_count 8)"),
    "scaled in another way": (metadata(rope__scaling__type="longrope"), AnchorError, "positions by 'longrope'"),
    "half of it rotated": (
        metadata(rope__dimension_count=8, attention__key_length=16),
        AnchorError,
        "head size 16",
    ),
    "metadata missing": (
        rebuild(lambda m, t: m.pop("block_count")),
        CheckpointError,
        "lacks the metadata llama.bl",
    ),
    "a tensor missing": (
        rebuild(lambda m, t: t.pop(NORM)),
        AnchorError,
        "Missing 1 parameters: model.layers.1.inp",
    ),
    "no embeddings": (
        rebuild(lambda m, t: t.pop("token_embd.weight")),
        CheckpointError,
        "lacks the tensor token_embd",
    ),
    "a tensor left over": (
        rebuild(lambda m, t: t.update({"blk.0.novel.weight": np.ones(2, np.float32)})),
        CheckpointError,
        "blk.0.novel.weight",
    ),
    "a wrong shape": (rebuild(lambda m, t: t.update({NORM: np.ones(2, np.float32)})), AnchorError, "shape (2,)"),
    "not a number": (rebuild(lambda m, t: t[NORM].fill(np.nan)), CheckpointError, "non-finite"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_gguf(tmp_path_factory.mktemp("good") / "model.gguf", hf_model("llama"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input(good: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    spoil, kind, message = BAD[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(good.read_bytes())
    spoil(file)
    with pytest.raises(kind) as raised:
        convert(file)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]  # nothing half-written


def test_values_beyond_float16(tmp_path: pathlib.Path) -> None:
    model = hf_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 1e5
    file = make_gguf(tmp_path / "model.gguf", model, "Q8_0")
    with pytest.raises(CheckpointError, match="values too large for float16"):
        convert(file)


def test_the_package_is_optional(
    good: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlx-hiermem\[gguf\]'"):
        convert_gguf(good, tmp_path / "anchor")


# Where a reply ends, and files in parts


def split(file: pathlib.Path, parts: int = 2) -> list[pathlib.Path]:
    """Writes a file's tensors in several files, as llama.cpp's gguf-split does."""
    reader = gguf.GGUFReader(file)
    names = [file.with_name(f"model-{n:05}-of-{parts:05}.gguf") for n in range(1, parts + 1)]
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[0]
                writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_a_file_in_parts_is_joined(tmp_path: pathlib.Path) -> None:
    model = hf_model("llama")
    (tmp_path / "parts").mkdir()
    file = make_gguf(tmp_path / "parts" / "whole.gguf", model)
    parts = split(file)
    file.unlink()
    source = find_source(str(tmp_path / "parts"))
    assert source.files == tuple(parts)
    assert error(convert(parts[1]), model) < 1e-5  # whichever part is named
    swapped = parts[0].read_bytes()
    parts[0].write_bytes(parts[1].read_bytes())
    parts[1].write_bytes(swapped)
    with pytest.raises(CheckpointError, match="is part 2 of 2"):
        convert(parts[0])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"not in .*: model-00002-of-00002\.gguf"):
        convert(parts[0])
