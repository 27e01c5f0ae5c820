"""From tokens to text: whole characters, spaces, stop strings, and the tokens that belong to a piece."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tiny import make_anchor

from mlx_hiermem.apps.server.text import Detokenizer, Piece, ReplyText
from mlx_hiermem.batch import Token
from mlx_hiermem.tokenizer import load_tokenizer

EOS = 259


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a byte."""
    return load_tokenizer(make_anchor(tmp_path_factory.mktemp("text") / "anchor"))


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def pieces(tokenizer: Any, text: str, stops: list[str], end: str = "stop") -> list[Piece]:
    """What comes of a reply; it ends with the end-of-text token, or by its length."""
    reply = ReplyText(tokenizer, ids(tokenizer, "prompt"), stops)
    tokens = [Token(0, token) for token in ids(tokenizer, text)]
    if end == "stop":
        tokens.append(Token(0, EOS, "stop"))
    else:
        tokens[-1] = Token(0, tokens[-1].token, end)
    shown = []
    for token in tokens:
        if piece := reply.add(token):
            shown.append(piece)
            if piece.finish_reason:
                break
    return shown


def test_characters_come_whole_and_spaces_stay(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ids(tokenizer, "is"))
    text = " 10 é€😀 x"
    parts = [detokenizer.add(token) for token in ids(tokenizer, text)]
    assert [part for part in parts if part] == list(text)
    assert detokenizer.rest() == ""


def test_half_a_character_at_the_end_is_left_out(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    assert "".join(detokenizer.add(token) for token in ids(tokenizer, "a€")[:-1]) == "a"
    assert detokenizer.rest() == ""


def test_special_tokens_are_not_shown(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    tokens = [*ids(tokenizer, "a"), *[EOS] * 9, *ids(tokenizer, "b")]
    assert "".join(map(detokenizer.add, tokens)) + detokenizer.rest() == "ab"


def test_bytes_that_are_no_text_hold_nothing_back_for_long(tokenizer: Any) -> None:
    numbers = random.Random(0)
    for _ in range(50):
        detokenizer = Detokenizer(tokenizer, [])
        for _ in range(40):
            detokenizer.add(numbers.randrange(256))
            assert len(detokenizer._new) < 4
        for letter in "the end!":
            detokenizer.add(ids(tokenizer, letter)[0])
        assert tokenizer.decode(detokenizer._before) == "!"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one, two", [", t"], "one"),
        ("one, two!", ["x", "wo", "two!"], "one, t"),  # the first to be complete
        ("one, two", ["wo", "two"], "one, "),  # of those complete at once the first to begin
        ("one, two", ["one"], ""),
        ("aaab", ["aab"], "a"),
        ("one, tx", [", t!"], "one, tx"),  # a beginning that came to nothing
        ("one, t", [", t!"], "one, t"),
        ("é€ and", ["€"], "é"),
    ],
)
@pytest.mark.parametrize("end", ["stop", "length"])
def test_stop_strings(tokenizer: Any, text: str, stops: list[str], expected: str, end: str) -> None:
    shown = pieces(tokenizer, text, stops, end)
    assert "".join(piece.text for piece in shown) == expected
    assert shown[-1].finish_reason == ("stop" if expected != text else end)
    assert all(piece.finish_reason is None for piece in shown[:-1])
    offsets = [offset for piece in shown for offset in piece.offsets]
    assert offsets == sorted(offsets)
    assert tokenizer.decode([token.token for piece in shown for token in piece.tokens]) == expected


def test_what_may_become_a_stop_string_waits(tokenizer: Any) -> None:
    reply = ReplyText(tokenizer, [], ["ab!"])
    texts = [(piece.text if (piece := reply.add(Token(0, token))) else None) for token in ids(tokenizer, "xabab")]
    assert texts == ["x", None, None, "ab", None]
    last = reply.add(Token(0, ids(tokenizer, "!")[0]))
    assert last is not None
    assert (last.text, last.finish_reason, last.generated) == ("", "stop", 6)
