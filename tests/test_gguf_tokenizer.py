"""Tokenizers of GGUF files, token for token; where a reply ends."""

import io
import json
import pathlib
from typing import Any

import pytest
from elements import DOCUMENTS
from sources import byte_tokens
from tokenizers import Tokenizer

from mlx_hiermem.convert.anchors.gguf_tokenizer import end_tokens, write_tokenizer
from mlx_hiermem.errors import AnchorError, CheckpointError, HierMemError


def build(folder: pathlib.Path, architecture: str = "llama", **ggml: Any) -> Tokenizer:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in ggml.items()}
    write_tokenizer(metadata | {"general.architecture": architecture}, folder, 100)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 1984", ",", " x", "^", "23", "\n", "\n", "end"]),
        ("smollm", ["It", "'s", " ", "1", "9", "8", "4", ",", " x", "^", "2", "3", "\n", "\n", "end"]),
        ("llama-bpe", ["It", "'s", " ", "198", "4", ",", " x", "^", "23", "\n\n", "end"]),
        ("qwen2", ["It", "'s", " ", "1", "9", "8", "4", ",", " x", "^", "2", "3", "\n\n", "end"]),
    ],
)
def test_words_are_cut_as_the_file_says(tmp_path: pathlib.Path, pre: str, words: list[str]) -> None:
    text = "It's 1984, x^23\n\nend"
    tokenizer = build(tmp_path, model="gpt2", pre=pre, tokens=[*byte_tokens()[:256], "ab"], merges=["a b"])
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in cut] == words
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_token_for_token(tmp_path: pathlib.Path, prefix: bool) -> None:
    import sentencepiece

    texts = [json.loads(line)["text"] for line in DOCUMENTS.read_text().splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=700, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=prefix, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(original.get_piece_size())
    types = [2 if original.is_unknown(i) else 3 if original.is_control(i) else 1 for i in ids]
    types = [6 if original.is_byte(i) else types[i] for i in ids]
    tokenizer = build(
        tmp_path, model="llama", tokens=[original.id_to_piece(i) for i in ids],
        scores=[original.get_score(i) for i in ids], token_type=types,
        unknown_token_id=0, bos_token_id=1, eos_token_id=2, add_space_prefix=prefix,
    )  # fmt: skip
    for text in [*texts, "  two  spaces ", "naïve ☃ 漢字", "\ttab\nline"]:
        assert tokenizer.encode(text).ids == [1, *original.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_an_id_beyond_the_vocabulary_counts_for_nothing(tmp_path: pathlib.Path) -> None:
    given = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "eos_token_id": 2}
    tokenizer = build(tmp_path, **given, padding_token_id=2**32 - 1, bos_token_id=3, add_bos_token=True)
    assert tokenizer.encode("ab").tokens == ["ab"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "ab"
    assert not {"pad_token", "bos_token"} & settings.keys()


BAD_TOKENIZERS: dict[str, tuple[dict[str, Any], type[HierMemError], str]] = {
    "another kind": ({"model": "t5"}, AnchorError, "of the kind 't5'"),
    "unknown words": ({"pre": "novel"}, AnchorError, "not known ('novel')"),
    "no words": ({"pre": None}, AnchorError, "not known ('None')"),
    "merges of other tokens": ({"merges": ["x yz"]}, CheckpointError, "merges do not fit"),
    "a token twice": ({"tokens": ["a", "b", "ab", "a"]}, CheckpointError, "same token twice"),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_tokenizers_that_cannot_be_rebuilt(tmp_path: pathlib.Path, name: str) -> None:
    change, kind, message = BAD_TOKENIZERS[name]
    good = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    with pytest.raises(kind) as raised:
        build(tmp_path, **{**good, **change})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("named", "types", "ends"),
    [
        ({"eos_token_id": 0}, (3, 3, 3, 1), [0, 1]),  # the turn's end is known by its spelling alone
        ({"eos_token_id": 0, "eot_token_id": 2}, (3, 3, 3, 1), [0, 1, 2]),
        ({"eos_token_id": 1}, (1, 3, 3, 1), [1]),  # a text that looks like one is no control token
        ({"eos_token_id": 0}, (3, 4, 3, 1), [0, 1]),  # older files call it the user's
        ({"eos_token_id": 0, "eot_token_id": 4}, (3, 1, 3, 1), [0]),  # beyond the vocabulary
        ({}, (), []),
    ],
)
def test_ends_by_name_and_by_spelling(named: dict[str, int], types: tuple[int, ...], ends: list[int]) -> None:
    ggml = {"tokens": ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "a"], "token_type": list(types), **named}
    assert end_tokens({f"tokenizer.ggml.{key}": value for key, value in ggml.items()}) == ends
