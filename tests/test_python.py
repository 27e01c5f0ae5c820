"""The Python API: what other programs call, what it gives back, and what it says to wrong arguments."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any, cast

import mlx.core as mx
import pytest
from tiny import load_tiny, make_anchor, make_model

import mlx_hiermem
from mlx_hiermem import ArgumentError, HierMemError, MemoryBank, MemoryModel, Path, Response, Session, load
from mlx_hiermem.response import GrowingText
from mlx_hiermem.sampling import Options, Sampling

TALK = [
    {"role": "user", "content": "about neon"},
    {"role": "assistant", "content": "It is a gas."},
    {"role": "user", "content": "and iron?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MemoryModel:
    return load_tiny(make_model(tmp_path_factory.mktemp("python") / "model"))


def texts(responses: list[Response]) -> list[str]:
    return [response.text for response in responses]


# what is exported


@pytest.mark.slow
def test_importing_is_cheap_and_all_is_there() -> None:
    script = """
import sys
import mlx_hiermem
from mlx_hiermem.learn import __all__ as of_learn
from mlx_hiermem.convert import __all__ as of_convert
print(sorted({"mlx", "mlx_lm", "numpy", "torch", "transformers"} & set(sys.modules)))
assert {"learn", "convert"} <= {*of_learn, *of_convert}
from mlx_hiermem import *
from mlx_hiermem.learn import learn
from mlx_hiermem.convert import convert
print(all(map(callable, (learn, convert, load))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[]", "True"], done.stderr


def test_every_error_is_exported() -> None:
    from mlx_hiermem import errors

    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert found <= set(mlx_hiermem.__all__)


# what is answered


def test_text_messages_and_questions(model: MemoryModel) -> None:
    plain = model.generate("about neon", max_tokens=6)
    assert plain.selection.path == model.router.route("about neon").path
    asked = model.chat("about neon", max_tokens=6)
    assert asked.prompt_tokens > plain.prompt_tokens == len("about neon")
    assert asked.text == model.generate(TALK[:1], max_tokens=6).text
    assert asked.text == "".join(model.stream("about neon", chat=True, max_tokens=6))
    talk = model.chat(TALK, max_tokens=6)
    assert talk.prompt_tokens == len(model.chat_tokens(TALK))
    assert talk.selection.route.path == model.router.conversation(["about neon", "and iron?"]).route.path
    assert model.response is talk


def test_a_response_prints_its_text(model: MemoryModel) -> None:
    response = model.generate("abc", memory="1.1", max_tokens=4)
    assert f"{response}" == response.text
    assert response.selection.memory == "1.1"
    assert response.selection.blocks == ("1", "1.1")
    assert response.tokens_per_second > 0


def test_whoever_stops_reading_is_told_too(model: MemoryModel) -> None:
    pieces = []
    for piece in model.stream("abc", memory="none", max_tokens=50):
        pieces.append(piece)
        if len(pieces) == 3:
            break
    assert model.response
    assert (model.response.finish_reason, model.response.generation_tokens) == ("", 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.5, "top_k": 5, "seed": 1},
        {"temperature": 1.5, "min_p": 0.2, "top_p": 0.8, "seed": 1},
        {"repetition_penalty": 1.5},
    ],
)
def test_a_batch_says_what_each_prompt_is_told_alone(model: MemoryModel, options: Options) -> None:
    prompts, memories = ["abc", TALK, "about iron", "abc"], ["1.1", "fetched", "none", "generic"]
    alone = [
        model.generate(prompt, memory=memory, max_tokens=9, **options)
        for prompt, memory in zip(prompts, memories, strict=True)
    ]
    together = model.batch(prompts, memory=memories, max_sequences=3, max_tokens=9, **options)
    assert texts(together) == texts(alone)
    for one, other in zip(together, alone, strict=True):
        assert (one.selection.blocks, one.finish_reason) == (other.selection.blocks, other.finish_reason)
        assert (one.prompt_tokens, one.generation_tokens) == (other.prompt_tokens, other.generation_tokens)
        assert one.tokens_per_second > 0
    assert model.generate("abc", memory="none", max_tokens=9, **options).text == together_none(model, options)


def together_none(model: MemoryModel, options: Options) -> str:
    """A batch leaves no memory attached."""
    return model.batch(["abc"], memory="none", max_tokens=9, **options)[0].text


def test_a_batch_of_none_and_of_questions(model: MemoryModel) -> None:
    assert model.batch([]) == []
    assert texts(model.batch(["about neon"], chat=True, max_tokens=5)) == [
        model.chat("about neon", max_tokens=5).text
    ]
    with pytest.raises(ArgumentError, match="2 memories for 1 prompts"):
        model.batch(["abc"], memory=["none", "none"])
    for wrong in ("abc", 5, None):
        with pytest.raises(ArgumentError, match="is not a list of prompts"):
            model.batch(wrong)  # type: ignore[arg-type]


def test_a_batch_keeps_to_the_context(tmp_path: pathlib.Path) -> None:
    opened = load(make_anchor(tmp_path / "anchor"))
    opened.config["max_position_embeddings"] = 12
    assert [r.generation_tokens for r in opened.batch(["abcdef", "abc"], max_tokens=7)] == [6, 7]
    assert [len(list(opened.stream(text, max_tokens=7))) for text in ("abcdef", "abc")] == [6, 7]
    for ask in (opened.batch, opened.generate):
        with pytest.raises(HierMemError, match="more than the model's 12"):
            ask(["abc", "x" * 12] if ask == opened.batch else "x" * 12)


# how tokens are drawn


def test_options_do_what_they_say(model: MemoryModel) -> None:
    def said(**options: Any) -> str:
        return model.generate("abc", memory="0.1", max_tokens=20, **options).text

    greedy = said()
    assert said(temperature=2.0, seed=1) == said(temperature=2.0, seed=1) != said(temperature=2.0, seed=2)
    assert said(temperature=2.0, top_k=1, seed=1) == greedy
    assert said(temperature=2.0, min_p=1.0, seed=1) == greedy
    assert said(temperature=2.0, top_p=1e-6, seed=1) == greedy
    assert said(repetition_penalty=5.0) != greedy
    assert said(sampler=lambda logprobs: mx.argmax(logprobs, axis=-1), temperature=2.0) == greedy
    only_a = said(
        logits_processors=[lambda _, logits: mx.where(mx.arange(logits.shape[-1]) == 65, logits, -mx.inf)]
    )
    assert len(set(only_a)) == 1


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(model: MemoryModel) -> None:
    whole = model.generate("abc", memory="0.1", max_tokens=20).text
    stop = whole[5:7]
    cut = whole[: whole.index(stop)]
    response = model.generate("abc", memory="0.1", max_tokens=20, stop=stop)
    assert (response.text, response.finish_reason) == (cut, "stop")
    assert "".join(model.stream("abc", memory="0.1", max_tokens=20, stop=[stop, "not there"])) == cut
    together = model.batch(["abc"], memory="0.1", max_tokens=20, stop=stop)[0]
    assert (together.text, together.finish_reason) == (cut, "stop")
    assert together.generation_tokens == response.generation_tokens < 20
    session = Session(model, "0.1", max_tokens=20)
    said = "".join(session.ask("hello"))
    session = Session(model, "0.1", max_tokens=20, stop=said[4:6])
    assert "".join(session.ask("hello")) == said[: said.index(said[4:6])] == session.messages[-1]["content"]


def test_nothing_is_shown_that_may_be_a_stop_string() -> None:
    text = GrowingText(["END", "E!"])
    assert [text.add(piece) for piece in ("ab", "cE", "N", "x", "E", "N", "D more")] == [
        "ab",
        "c",
        "",
        "ENx",
        "",
        "",
        "",
    ]
    assert (text.text, text.stopped) == ("abcENx", True)
    last = GrowingText(["END"])
    assert (last.add("abE"), last.add("N", last=True), last.stopped) == ("ab", "EN", False)


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. It is a whole number, 1 or more"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": "hot"}, "temperature is 'hot'. It is a number, 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5. It is a number, between 0 and 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": None}, "min_p is None"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": 5}, "an option is of the wrong type"),
        ({"sampler": "greedy"}, "'greedy' is not a function"),
        ({"logits_processors": ["x"]}, "'x' is not a function"),
        ({"temp": 1.0}, "there is no option temp. There are max_tokens, temperature"),
        ({"logprobs": True}, "there is no option logprobs"),
    ],
)
def test_wrong_options(model: MemoryModel, options: dict[str, Any], message: str) -> None:
    for call in (model.generate, model.stream, model.chat, lambda text, **more: model.batch([text], **more)):
        with pytest.raises(ArgumentError, match=message):
            call("abc", **options)
    with pytest.raises(ArgumentError, match=message):
        Session(model, **options)


@pytest.mark.parametrize(
    "prompt",
    ["", [], None, 5, b"abc", ["abc"], [{"role": "user"}], [{"role": "user", "content": 5}], {"role": "user"}],
)
def test_what_is_no_prompt(model: MemoryModel, prompt: Any) -> None:
    for call in (model.generate, model.stream, model.chat, lambda one: model.batch(["abc", one])):
        with pytest.raises(ArgumentError):
            call(prompt)


def test_other_wrong_arguments(model: MemoryModel) -> None:
    for memory in (5, ["none"], "lots"):
        with pytest.raises(HierMemError, match="unknown memory"):
            model.generate("abc", memory=memory)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="routed by the user's messages"):
        model.chat([{"role": "system", "content": "Be kind."}])
    with pytest.raises(ArgumentError, match="5 is no model"):
        load(5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no model"):
        Session("my-model")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="5 is no folder of a bank"):
        MemoryBank.open(5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="5 is no question"):
        next(Session(model).ask(5))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="max_sequences is 0"):
        model.batch(["abc"], memory="none", max_sequences=0)
    assert Sampling().draw() is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("none", "none"),
        ("off", "none"),
        ("auto", "fetched"),
        ("on", "fetched"),
        ("routed", "fetched"),
        ("1.2", "1.2"),
    ],
)
def test_a_memory_by_its_words(model: MemoryModel, written: str, meant: str) -> None:
    assert model.choose(written, "text").memory == meant
    assert model.choose(Path((1, 2)), "").path == (1, 2)


# what is shown


def test_what_a_model_a_bank_and_a_session_say_of_themselves(model: MemoryModel, tmp_path: pathlib.Path) -> None:
    assert repr(model) == "<MemoryModel model: 12 blocks of memory, unknown context>"
    assert isinstance(model.bank, MemoryBank)
    assert repr(model.bank) == f"<MemoryBank {model.bank.root}: 12 blocks (ffn, float32) for anchor>"
    session = Session(model, "generic", max_tokens=3)
    list(session.ask("hello"))
    assert repr(session).startswith("<Session with model: memory generic, 1 turns, ")
    plain = load(make_anchor(tmp_path / "plain"))
    plain.config["max_position_embeddings"] = 64
    assert repr(plain) == "<MemoryModel plain: no memory, 64 tokens of context>"


def test_what_cannot_be_learnt_or_converted_by_its_type(tmp_path: pathlib.Path) -> None:
    from mlx_hiermem.convert import convert
    from mlx_hiermem.learn import learn

    out, wrong = tmp_path / "out", cast(Any, 5)
    for documents in (5, "docs", [5]):
        with pytest.raises(ArgumentError, match="is no list of documents"):
            learn(cast(Any, documents), out, "anchor")
    with pytest.raises(ArgumentError, match="5 is no folder"):
        learn(["docs"], wrong, "anchor")
    with pytest.raises(ArgumentError, match="5 is no model folder"):
        learn([str(tmp_path)], out, wrong)
    with pytest.raises(ArgumentError, match="5 are no settings"):
        learn(["docs"], out, "anchor", wrong)
    with pytest.raises(ArgumentError, match="5 is no checkpoint"):
        convert(wrong, out)
    with pytest.raises(ArgumentError, match="5 is no folder"):
        convert(tmp_path, wrong)
