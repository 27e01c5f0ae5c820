"""A GGUF file's tokenizer, rebuilt from its metadata as a `tokenizers` tokenizer.json.

Two kinds: byte-level BPE (`gpt2`), whose merges the file lists and whose way of cutting text into words it
only names; and SentencePiece BPE (`llama`), whose merges follow from the scores. What cannot be rebuilt
exactly is refused: a tokenizer that is almost right makes a model quietly worse.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_hiermem.errors import AnchorError, CheckpointError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
SPACE = "▁"  # how SentencePiece spells a space

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> how text is cut before the merges. None is GPT-2's own pattern, which ByteLevel has;
# the SmolLM and StarCoder family sets every digit apart first.
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "phi-2", "smollm", "starcoder", "refact", "codeshell")),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
}
DIGITS = ("smollm", "starcoder", "refact", "codeshell")
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe")  # a word that is a token is not taken apart and merged
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Spellings of control tokens that end a turn or a text. llama.cpp goes by these too: many files name only one.
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
)


def write_tokenizer(metadata: Mapping[str, Any], folder: pathlib.Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json from the `tokenizer.*` metadata.

    Raises AnchorError for a tokenizer of a kind that cannot be rebuilt exactly, CheckpointError for a
    damaged one.
    """
    ggml = described(metadata)
    kind = ggml.get("model")
    if kind not in BUILDERS or not ggml.get("tokens"):
        raise AnchorError(
            f"the file's tokenizer is of the kind '{kind}', which cannot be rebuilt",
            f"Known kinds: {', '.join(BUILDERS)}. Give the original's with --tokenizer.",
        )
    tokenizer = BUILDERS[kind](ggml, metadata["general.architecture"])
    _add_special_tokens(tokenizer, ggml)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {name: ggml["tokens"][ggml[key]] for name, key in SPECIAL.items() if key in ggml}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **names,
    }
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def described(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its tokenizer. An id beyond its vocabulary counts for nothing."""
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    size = len(ggml.get("tokens") or ())
    beyond = [key for key in (*SPECIAL.values(), *END_KEYS) if key in ggml and not 0 <= ggml[key] < size]
    return {key: value for key, value in ggml.items() if key not in beyond}


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer: those that the file names, and control tokens known by their spelling."""
    ggml = described(metadata)
    named = {int(ggml[key]) for key in END_KEYS if key in ggml}
    pairs = zip(ggml.get("tokens") or (), ggml.get("token_type") or (), strict=False)
    spelt = {i for i, (token, kind) in enumerate(pairs) if kind in (CONTROL, USER_DEFINED) and token in ENDS}
    return sorted(named | spelt)


def _byte_level(ggml: Mapping[str, Any], architecture: str) -> Tokenizer:
    """Byte-level BPE. Bytes that the vocabulary lacks are dropped, as llama.cpp does: the file's unknown token
    is often the end of text, which has no place inside a prompt."""
    pre = ggml.get("pre")
    if pre not in SPLITS:
        raise AnchorError(
            f"the file's tokenizer cuts words in a way that is not known ('{pre}')",
            f"Known: {', '.join(SPLITS)}. Give the original tokenizer with --tokenizer.",
        )
    merges = [_pair(merge) for merge in ggml.get("merges", ())]
    tokenizer = _bpe(_vocabulary(ggml["tokens"]), merges, ignore_merges=pre in WHOLE_WORDS)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre in DIGITS else []
    if (pattern := SPLITS[pre]) is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if pattern == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    _frame(tokenizer, ggml, add_bos=pre in WHOLE_WORDS)
    return tokenizer


def _sentencepiece(ggml: Mapping[str, Any], architecture: str) -> Tokenizer:
    """SentencePiece BPE with byte fallback. llama.cpp stores the runs of spaces in Gemma's vocabulary as such."""
    tokens, types = list(ggml["tokens"]), ggml.get("token_type") or [NORMAL] * len(ggml["tokens"])
    spaces = {i for i, token in enumerate(tokens) if types[i] == USER_DEFINED and not token.strip(" " + SPACE)}
    for i in spaces:
        tokens[i] = SPACE * len(tokens[i])
    vocab = _vocabulary(tokens)
    scores = ggml.get("scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError("the file's SentencePiece tokenizer has no scores", "Give --tokenizer.")
    if architecture.startswith("gemma"):  # its scores do not follow the order of its merges, its ids do
        scores = [-i for i in range(len(tokens))]
    pieces = [i for i in range(len(tokens)) if types[i] == NORMAL or i in spaces]
    unknown = tokens[ggml["unknown_token_id"]] if "unknown_token_id" in ggml else None
    tokenizer = _bpe(
        vocab, _merges(tokens, pieces, vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    prefix = ggml.get("add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    _frame(tokenizer, ggml, add_bos=True)
    return tokenizer


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError("the file's vocabulary has the same token twice", "Give --tokenizer.")
    return vocab


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    unknown = [merge for merge in merges if "".join(merge) not in vocab or any(part not in vocab for part in merge)]
    if not merges or unknown:
        raise CheckpointError(f"the file's merges do not fit its vocabulary: {unknown[:3]}", "Give --tokenizer.")
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))


def _merges(
    tokens: Sequence[str], pieces: Sequence[int], vocab: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first: the order in which SentencePiece merges.

    Ways to make the same piece, which have the same score, are ordered by their parts' ids.
    """
    allowed = set(pieces)
    merges = []
    for piece in pieces:
        token = tokens[piece]
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut], -1), vocab.get(token[cut:], -1)
            if left in allowed and right in allowed:
                merges.append((-scores[piece], piece, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(merges)]


def _frame(tokenizer: Tokenizer, ggml: Mapping[str, Any], add_bos: bool) -> None:
    """Puts BOS and EOS around a text where the file asks for it; `add_bos` is llama.cpp's default."""
    bos = ggml.get("bos_token_id") if ggml.get("add_bos_token", add_bos) else None
    eos = ggml.get("eos_token_id") if ggml.get("add_eos_token", False) else None
    before, after = ([] if i is None else [(ggml["tokens"][i], i)] for i in (bos, eos))
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(t for t, _ in before), "$A", *(t for t, _ in after)], special_tokens=[*before, *after]
        )


def _add_special_tokens(tokenizer: Tokenizer, ggml: Mapping[str, Any]) -> None:
    """Control tokens are special; user-defined ones are matched whole but are text like any other."""
    types = ggml.get("token_type") or ()
    vocab = tokenizer.get_vocab()
    chosen = {index for index, kind in enumerate(types) if kind == CONTROL}
    chosen |= {ggml[key] for key in SPECIAL.values() if key in ggml}
    special = [ggml["tokens"][index] for index in sorted(chosen)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    own = [token for token, kind in zip(ggml["tokens"], types, strict=False) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own if token in vocab])
