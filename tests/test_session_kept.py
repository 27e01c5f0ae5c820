"""Sessions that are saved, loaded and changed, and whose context is full."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest
from test_session import A, B, C, alone, say
from tiny import load_aimed

from mlx_hiermem import load
from mlx_hiermem.bank import edit
from mlx_hiermem.config import ROOT, Path
from mlx_hiermem.errors import BankError, HierMemError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Topic
from mlx_hiermem.session import Session

MESSAGES = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def model(folder: pathlib.Path) -> MemoryModel:
    return load_aimed(folder, {"neon": A, "iron": B}, C)


# the context


@pytest.mark.slow
def test_the_oldest_turns_drop_and_the_system_message_stays(model: MemoryModel) -> None:
    model.config["max_position_embeddings"] = 300
    session = Session(model, memory="0.1", system="You are kind.", max_tokens=20)
    drops = 0
    for number in range(12):
        reply = say(session, f"question {number:02}")
        assert reply == alone(session)
        assert session.kv_tokens <= 300
        prompt = model.chat_tokens(
            [{"role": "system", "content": session.system}, *session.messages[session.first : -1]]
        )
        assert model.tokenizer.decode(prompt).startswith("<system>You are kind.")
        assert len(prompt) <= 280
        drops += bool(session.dropped)
    assert session.first > 0
    assert len(session.messages) == 24  # nothing is forgotten, only no longer shown
    assert 1 <= drops < 8  # several turns go between two drops
    assert session.messages[session.first]["role"] == "user"


def test_a_question_that_is_too_long_is_refused_in_one_line(model: MemoryModel) -> None:
    model.config["max_position_embeddings"] = 120
    session = Session(model, memory="0.1", max_tokens=20)
    say(session, "short")
    with pytest.raises(HierMemError, match=r"the question has \d+ tokens.*room for 100 beside a reply of 20"):
        say(session, "long" * 50)
    assert len(session.messages) == 2
    assert say(session, "short again") == alone(session)


def test_a_long_reply_gets_what_the_context_leaves(model: MemoryModel) -> None:
    model.config["max_position_embeddings"] = 60
    session = Session(model, memory="0.1", max_tokens=5000)
    say(session, "0123456789")
    assert session._reserve == 30
    assert session.kv_tokens <= 60
    assert session.last
    assert session.last.generation_tokens <= 60 - session.prefilled


def test_context_of_nested_and_silent_configs(model: MemoryModel) -> None:
    session = Session(model, memory="none")
    assert session.context is None
    model.config["text_config"] = {"max_position_embeddings": 77}
    assert session.context == 77


# saving, loading, changing the memory


def test_a_saved_conversation_goes_on_as_if_nothing_had_happened(model: MemoryModel) -> None:
    session = Session(model, system="Be kind.", max_tokens=5)
    say(session, "about neon")
    say(session, "now iron")
    data = json.loads(json.dumps(session.to_json()))
    other = Session(model, max_tokens=5)
    other.restore(data)
    assert (other.messages, other.system, other.topic) == (session.messages, session.system, session.topic)
    assert say(other, "and that?") == say(session, "and that?")
    assert other.selection.path == B


def test_a_conversation_that_began_beyond_the_reach_is_taken_up(model: MemoryModel) -> None:
    session = Session(model, max_tokens=3)
    say(session, "hello")
    session.topic = Topic(ROOT, 0.0, "hello")
    data = session.to_json()
    assert data["topic"] is None
    for topic in (None, {"path": "", "decided": 0.0}):  # the second as earlier versions wrote it
        other = Session(model, max_tokens=3)
        other.restore(data | {"topic": topic})
        assert (other.messages, other.topic) == (session.messages, None)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "other"},
        {"version": 2},
        {"messages": [{"role": "assistant", "content": "hm"}]},
        {"messages": [{"role": "user", "content": "unanswered"}]},
        {"messages": 3},
        {"messages": [{"role": "user"}]},
        {"memory": "lots"},
        {"topic": {"path": "x", "decided": 1}},
        {"topic": {"path": "0.1", "decided": "much"}},
    ],
)
def test_a_damaged_conversation_changes_nothing(model: MemoryModel, damage: dict[str, Any]) -> None:
    session = Session(model, memory="0.1", max_tokens=3)
    say(session, "first")
    before = json.dumps(session.to_json())
    with pytest.raises(HierMemError):
        session.restore(json.loads(before) | damage)
    with pytest.raises(HierMemError, match="not a saved conversation"):
        session.restore([])
    assert json.dumps(session.to_json()) == before


def test_a_topic_that_the_bank_lacks_is_forgotten(model: MemoryModel) -> None:
    data = Session(model).to_json() | {"topic": {"path": "3.9", "decided": 1.0}}
    session = Session(model)
    session.restore(data)
    assert session.topic is None


def test_a_pin_that_is_blocked_or_gone_is_forgotten(own: MemoryModel) -> None:
    data = Session(own, memory="0.1", max_tokens=3).to_json()
    assert own.bank
    edit.block(own.bank.root, [Path((0, 1))])
    for memory in ("0.1", "7.7"):
        session = Session(own, max_tokens=3)
        session.restore(data | {"memory": memory, "messages": MESSAGES})
        assert (session.memory, session.messages) == (own.default_memory, MESSAGES)


def test_changing_the_memory(model: MemoryModel, folder: pathlib.Path) -> None:
    session = Session(model, max_tokens=3)
    say(session, "about neon")
    for memory, blocks in (("2.2", ("2", "2.2")), ("generic", ("generic",)), ("none", ())):
        session.use(memory)
        assert say(session, "hm?") == alone(session)
        assert session.selection.blocks == blocks
    session.use("fetched")
    say(session, "and its symbol?")
    assert session.selection.path == C  # routed without a topic
    plain = Session(load(folder / "anchor"), max_tokens=2)
    assert plain.memory == "none"
    for memory in ("fetched", "generic"):
        with pytest.raises(BankError, match="no bank"):
            plain.use(memory)
    assert say(plain, "hello") == alone(plain)


def test_reset_forgets_the_conversation(model: MemoryModel) -> None:
    session = Session(model, max_tokens=4)
    say(session, "about neon")
    session.reset()
    assert (session.messages, session.topic, session.kv_tokens) == ([], None, 0)
    assert say(session, "now iron") == alone(session)


def test_system_messages_that_a_template_refuses(model: MemoryModel) -> None:
    model.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    session = Session(model, memory="none", system="Be kind.")
    with pytest.raises(HierMemError, match="takes no system message: System role not supported"):
        say(session, "hello")
    assert session.messages == []


@pytest.fixture
def own(folder: pathlib.Path, tmp_path: pathlib.Path) -> MemoryModel:
    """A model whose bank the test may edit."""
    return load_aimed(shutil.copytree(folder, tmp_path / "model"), {"neon": A, "iron": B}, C)


def test_what_is_blocked_meanwhile_is_left_by_the_next_turn(own: MemoryModel) -> None:
    assert own.bank
    assert own.cache
    session, pinned = Session(own, max_tokens=2), Session(own, A, max_tokens=2)
    for text in ("about neon", "now iron", "neon again"):
        say(session, text)
    say(pinned, "hm?")
    assert session.selection.path == A
    assert len(session._earlier)
    edit.block(own.bank.root, [A])
    session.draft("and its symbol?")
    assert session._drafted
    say(session, "and its symbol?")
    assert session.selection.path not in (A, B)
    assert (A in own.cache, Path((0,)) in own.cache) == (False, True)
    assert len(session._earlier) == 0, "keys and values of before are gone"
    assert session.messages[-1]["content"] == alone(session)
    with pytest.raises(BankError, match=r"0\.1 is blocked"):
        say(pinned, "and now?")
    with pytest.raises(BankError, match=r"0\.1 is blocked"):
        own.generate("a", memory=A, max_tokens=1)
    assert own.batch(["neon"], max_tokens=1)[0].selection.path != A
    edit.unblock(own.bank.root, [A])
    assert own.generate("neon", max_tokens=1).selection.path == A
    say(pinned, "and now?")


def test_what_is_removed_meanwhile_is_gone_at_once(own: MemoryModel) -> None:
    assert own.bank
    session = Session(own, max_tokens=2)
    say(session, "about neon")
    edit.remove(own.bank.root, [Path((0,))])
    say(session, "and its symbol?")
    assert session.selection.path == C
    assert own.cache
    assert {Path((0,)), A}.isdisjoint(own.cache._blocks)
    with pytest.raises(BankError, match="no node 0"):
        session.use(A)
    assert session.messages[-1]["content"] == alone(session)


def test_an_edit_that_does_not_touch_a_block_costs_no_reading(own: MemoryModel) -> None:
    assert own.bank
    assert own.cache
    own.generate("neon", max_tokens=1)
    read = own.cache.stats.bytes_read
    edit.block(own.bank.root, [B])
    own.generate("neon", max_tokens=1)
    assert own.cache.stats.bytes_read == read


def test_sessions_share_a_model(model: MemoryModel) -> None:
    """A server has one model and many conversations: each turn attaches its own memory."""
    one, two = Session(model, max_tokens=4), Session(model, max_tokens=4)
    for text in ("about neon", "and its symbol?"):
        say(one, text)
        say(two, "now iron")
    assert (one.selection.path, two.selection.path) == (A, B)
    assert say(one, "third") == alone(one)
