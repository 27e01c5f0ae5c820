"""What is no checkpoint of ours: other software's forms name the tool that exports them; garbage is garbage."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from sources import make_hf

from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.errors import CheckpointError

FORMS = {
    ("consolidated.00.pth", "params.json", "tokenizer.model"): (
        "Meta's form of Llama",
        "convert_llama_weights_to_hf",
    ),
    ("consolidated.safetensors", "params.json"): ("Mistral's own form", "convert_mistral_weights_to_hf"),
    ("lit_model.pth", "model_config.yaml", "config.json"): ("a LitGPT checkpoint", "litgpt convert_from_litgpt"),
    ("zero_to_fp32.py", "latest", "config.json"): ("a DeepSpeed checkpoint", "python zero_to_fp32.py"),
    ("model.nemo",): ("a NeMo checkpoint", "export_ckpt"),
    ("tf_model.h5", "config.json"): ("a TensorFlow model", "from_tf"),
    ("flax_model.msgpack", "config.json"): ("a Flax model", "from_flax"),
}


@pytest.mark.parametrize("names", FORMS)
def test_other_software(tmp_path: pathlib.Path, names: tuple[str, ...]) -> None:
    what, tool = FORMS[names]
    for name in names:
        (tmp_path / name).write_text('{"model_type": "llama"}')
    for source in (tmp_path, tmp_path / names[0]):
        with pytest.raises(CheckpointError) as raised:
            find_source(str(source))
        assert f"is {what} ({names[0]})" in str(raised.value)
        assert tool in str(raised.value)


def test_beside_a_model_it_does_not_matter(tmp_path: pathlib.Path) -> None:
    folder = make_hf(tmp_path / "source")
    for names in FORMS:
        if names[0] not in ("consolidated.safetensors", "model.nemo"):
            (folder / names[0]).write_bytes(b"")
    assert find_source(str(folder)).files == (folder / "model.safetensors",)


def write(name: str, content: bytes) -> Callable[[pathlib.Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def only_model(folder: pathlib.Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"garbage\x00\x01")


def only_vocabulary(folder: pathlib.Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")


def without_embedding(folder: pathlib.Path) -> None:
    """A token of the chat template beyond the embeddings, as where a model was not resized."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 260, "content": "<|im_start|>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


TOKENIZERS: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "garbage": (write("tokenizer.json", b"garbage"), "cannot load the tokenizer of the source"),
    "empty": (write("tokenizer.json", b""), "cannot load the tokenizer of the source"),
    "a list": (write("tokenizer.json", b"[]"), "cannot load the tokenizer of the source"),
    "a table": (write("tokenizer.json", b"{}"), "cannot load the tokenizer of the source"),
    "not UTF-8": (write("tokenizer.json", b"\xff\xfe\x00"), "cannot load the tokenizer of the source"),
    "settings": (write("tokenizer_config.json", b"garbage"), "cannot load the tokenizer of the source"),
    "tokenizer.model": (only_model, "cannot load the tokenizer of the source"),
    "vocab.json": (only_vocabulary, "cannot load the tokenizer of the source"),
    "no embedding": (
        without_embedding,
        "the chat template has <|im_start|>, for which the model has no embeddings",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bad_tokenizers(tmp_path: pathlib.Path, name: str) -> None:
    spoil, message = TOKENIZERS[name]
    folder = make_hf(tmp_path / "source")
    spoil(folder)
    with pytest.raises(CheckpointError) as raised:
        convert(folder, tmp_path / "model")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
