"""Conversations: which path a turn is answered on, the KV cache, drafts, and replies that are broken off."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import Aimed, load_aimed

from mlx_hiermem import cache
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import HYSTERESIS, Router, Topic, decidedness, follow
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.session import Session
from mlx_hiermem.tree import ClusterTree, Route

CONVERSATIONS = pathlib.Path(__file__).parent / "conversations.jsonl"
A, B, C = Path((0, 1)), Path((2, 0)), Path((2, 2))  # C is where a text goes that names nothing


@pytest.fixture
def model(folder: pathlib.Path) -> MemoryModel:
    return load_aimed(folder, {"neon": A, "iron": B}, C)


def say(session: Session, text: str) -> str:
    return "".join(session.ask(text))


def alone(session: Session) -> str:
    """The last reply, generated again from an empty cache."""
    system = [{"role": "system", "content": session.system}] if session.system else []
    tokens = session.model.chat_tokens(system + session.messages[session.shown : -1])
    replies = session.model.responses(tokens, Sampling(session._room(len(tokens))))
    return "".join(response.text for response in replies)


# the rule


def test_who_is_decided_leads_and_the_topic_keeps_its_most_decided_turn() -> None:
    assert follow(None, Route(A), 0.1, "a") == Topic(A, 0.1, "a", turns=1)
    assert follow(Topic(Path(), 0.0), Route(A), 0.1, "a") == Topic(A, 0.1, "a", turns=1)
    topic = Topic(A, 0.4, "a", aside="hm", turns=3)
    assert follow(topic, Route(A), 0.1, "b") is None
    assert follow(topic, Route(A), 0.3, "b") == Topic(A, 0.4, "b", turns=4)
    assert follow(topic, Route(A), 0.6, "b") == Topic(A, 0.6, "b", turns=4)
    assert follow(topic, Route(B), 0.4 * HYSTERESIS, "b") is None
    assert follow(topic, Route(B), 0.4 * HYSTERESIS + 0.01, "b") == Topic(B, 0.4 * HYSTERESIS + 0.01, "b", turns=1)
    assert follow(replace(topic, turns=0), Route(A), 0.3, "b") == Topic(A, 0.4, "b"), "it is not known since when"
    assert follow(topic, Route(), 0.0, "far") is None


def test_where_passages_say_it_who_is_near_to_one_leads() -> None:
    topic = Topic(A, 0.4, "a", turns=1)
    assert follow(topic, Route(B, passage=0.9), 0.01, "b", near=0.9) == Topic(B, 0.01, "b", turns=1)
    assert follow(topic, Route(B, passage=0.91), 9.0, "b", near=0.9) is None
    assert follow(topic, Route(B), 9.0, "b", near=0.9) == Topic(B, 9.0, "b", turns=1), "all its leaves have none"


def test_decidedness_is_the_gap_between_the_two_nearest_as_a_share() -> None:
    level1 = np.array([[[1.5, 0], [2, 0], [9, 9]]], dtype=np.float32)
    level2 = np.array([[[3, 0], [0, 0], [0, 0]]] * 3, dtype=np.float32)
    present = np.array([[True, False, False]] * 3)
    tree = ClusterTree([level1, level2], [np.ones((1, 3), bool), present])
    vector = np.array([1, 0], dtype=np.float32)
    assert decidedness(tree, vector, Path((0,))) == pytest.approx(0.5)
    assert decidedness(tree, vector, Path((0, 0))) == pytest.approx(0.5)  # an only child decides nothing
    assert decidedness(tree, vector, Path()) == 0
    twins = ClusterTree([np.array([[[1, 0], [1, 0], [9, 9]]], dtype=np.float32)], [np.ones((1, 3), bool)])
    assert decidedness(twins, vector, Path((0,))) == 0  # both are where the text is


def test_follow_ups_stay_and_changes_move(model: MemoryModel) -> None:
    session = Session(model, max_tokens=3)
    paths, stayed = [], []
    for text in ("about neon", "and its symbol?", "thanks", "now iron", "and that?", "neon again"):
        say(session, text)
        assert session.turn
        paths.append(session.selection.path)
        stayed.append(session.turn.route.stayed)
    assert paths == [A, A, A, B, B, A]
    assert any(stayed)
    assert Session(model).route("and its symbol?").topic.path == C  # alone it goes elsewhere
    assert session.selection.blocks == ("0", "0.1")
    assert session.selection.memory == "fetched"


def test_distances_are_those_to_the_path_that_was_taken(model: MemoryModel) -> None:
    tree = model.router.tree
    turn = model.router.turn("hm?", Topic(A, 9.0))
    assert turn.route.stayed
    expected = [tree.distances(turn.vector, Path())[0], tree.distances(turn.vector, Path((0,)))[1]]
    assert turn.route.distances == pytest.approx(expected)
    assert turn.needed == 9.0 * HYSTERESIS


def test_a_blocked_topic_is_left(model: MemoryModel) -> None:
    assert model.router.turn("hm?", Topic(A, 9.0)).topic.path == A
    assert model.router.turn("hm?", Topic(A, 9.0), blocked=[Path((0,))]).topic.path == C
    model.router.policy = BankPolicy(frozenset([A]))
    assert model.router.turn("hm?", Topic(A, 9.0)).topic.path == C
    session = Session(model, max_tokens=2, blocked=[Path((2,))])
    say(session, "about iron")
    assert session.selection.path[0] != 2


def test_real_conversations_on_the_real_tree(minilm: Embedder) -> None:
    """The conversations that were written after the rule was found; benchmarks/turns.py measures all of them."""
    from elements import BANK, DOCUMENTS

    from mlx_hiermem.bank.bank import MemoryBank

    bank = MemoryBank.open(BANK)
    router = Router(bank.tree, minilm)  # without a reach
    elements = DOCUMENTS.read_text(encoding="utf-8").splitlines()
    ids = {json.loads(line)["name"]: f"elements.jsonl:{number}" for number, line in enumerate(elements, 1)}
    talks = [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    right = []
    for talk in (talk for talk in talks if talk["id"].startswith("later-")):
        topic = None
        for turn in talk["turns"]:
            old, topic = topic, router.turn(turn["user"], topic).topic
            if "about" in turn:
                right.append(ids[turn["about"]] in bank.manifest.blocks[topic.path].sources)
            else:
                right.append(topic == old or (old is not None and topic.path == old.path))
    assert len(right) == 34
    assert sum(right) >= 32


# the cache


def test_the_cache_goes_on_where_the_path_stays_and_not_where_it_changes(model: MemoryModel) -> None:
    session, seen = Session(model, max_tokens=6, history="all"), dict[tuple[str, ...], list[int]]()
    for text in ("about neon", "and its symbol?", "now iron", "and that?", "neon again", "iron again", "and that?"):
        reply = say(session, text)
        assert reply == alone(session)
        prompt = model.chat_tokens(session.messages[:-1])
        # What was computed under these blocks before, as far as it is the same, is not computed again.
        known = seen.get(session.selection.blocks, [])
        pairs = zip(known, prompt[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        assert session.prefilled == len(prompt) - same
        seen[session.selection.blocks] = session._cached[: session.kv_tokens]
    assert same > 100  # back on iron


def test_a_question_that_leads_elsewhere_sees_nothing_of_before(model: MemoryModel) -> None:
    session, shown = Session(model, max_tokens=6), list[int]()
    for text in ("about neon", "and its symbol?", "now iron", "and that?", "neon again", "hm?"):
        assert say(session, text) == alone(session)
        shown.append(session.shown // 2)
        if text == "and that?":
            session.restore(json.loads(json.dumps(session.to_json())))  # it knows since when it is about iron
    assert shown == [0, 0, 2, 2, 4, 4]
    assert session.first == 0, "there was room for all"
    session.use("0.1")
    assert say(session, "and now?") == alone(session)
    assert session.shown == 0, "the path was named, and takes the whole conversation"


def test_what_gets_no_memory_sees_the_whole_conversation(model: MemoryModel) -> None:
    router = model.router
    assert isinstance(router.embedder, Aimed)
    router.embedder.names["rice"] = -5 * router.embedder.names["neon"]  # far from all there is
    near, far = (route.distances[-1] for route in router.route_batch(["about neon", "cook rice"]))
    router.policy = BankPolicy(reach=(near + far) / 2)
    session, shown = Session(model, max_tokens=6), list[int]()
    for text in ("about neon", "now iron", "cook rice", "neon again"):
        assert say(session, text) == alone(session)
        shown.append(session.shown // 2)
    assert shown == [0, 1, 0, 3]


def test_the_model_has_the_last_reply_with_its_figures(model: MemoryModel) -> None:
    session = Session(model, max_tokens=5)
    said = say(session, "neon")
    first = model.response
    assert first is not None
    assert first.text == said
    assert first.selection == session.selection
    assert 0 < first.generation_tokens <= 5
    assert first.tokens_per_second > 0
    say(session, "more")
    assert model.response is not None
    assert model.response.prompt_tokens > first.prompt_tokens > 0


def test_earlier_caches_keep_to_their_budget(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(model, max_tokens=6)
    session._earlier.max_bytes = 1
    for text in ("about neon", "now iron", "neon again"):
        assert say(session, text) == alone(session)
        assert session.prefilled == len(model.chat_tokens(session.messages[session.shown : -1]))
        assert session._earlier.nbytes <= 1


def test_processors_see_what_is_in_the_cache(model: MemoryModel) -> None:
    seen: list[int] = []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(len(tokens))
        return logits

    session = Session(model, max_tokens=2, logits_processors=[process])
    say(session, "about neon")
    seen.clear()
    say(session, "and its symbol?")
    assert session.last
    assert session.prefilled < seen[0] == len(session._cached) - 2


def test_reset_forgets_all_caches(model: MemoryModel) -> None:
    session = Session(model, max_tokens=6)
    for text in ("about neon", "now iron"):
        say(session, text)
    assert len(session._earlier)
    session.reset()
    assert len(session._earlier) == 0
    say(session, "about neon")
    assert session.prefilled == len(model.chat_tokens(session.messages[:-1]))


# drafts


def test_a_draft_is_routed_and_read_ahead_and_changes_nothing(
    model: MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = Session(model, max_tokens=6), Session(model, max_tokens=6)
    assert model.cache
    read, embedded = list[pathlib.Path](), list[str]()
    monkeypatch.setattr(cache, "read_ahead", lambda files: read.extend(files))
    embed = model.router.embedder.embed
    monkeypatch.setattr(model.router.embedder, "embed", lambda texts: embedded.extend(texts) or embed(texts))
    session.draft("about ir")
    session.draft("about iron")
    assert session._ahead
    session._ahead.result(5)
    assert {file.name for file in read[-2:]} == {"2.safetensors", "0.safetensors"}
    assert (session.messages, session.topic, model.selection.blocks, model.cache.blocks) == ([], None, (), 0)
    assert say(session, "about iron") == say(other, "about iron")
    assert session.topic == other.topic
    assert session._drafted
    assert session.turn is session._drafted[1]
    assert embedded == ["about ir", "about iron"]  # the other session's router remembers
    session.draft("and neon")  # all of its blocks are still to be read; now they are read for another session
    say(other, "about neon")
    assert model.cache.prefetch(A) is None


def test_a_draft_routed_before_something_changed_is_routed_again(model: MemoryModel) -> None:
    session = Session(model, max_tokens=6)
    session.draft("about iron")
    session.blocked = [Path((2, 0))]
    say(session, "about iron")
    assert session.selection.path != B
    session = Session(model, max_tokens=6)
    session.draft("and its symbol?")
    alone = session.route("and its symbol?").topic
    say(session, "about neon")
    session.draft("and its symbol?")
    assert session.route("and its symbol?").topic.path == A != alone.path
    for memory in ("none", "0.1"):
        session.use(memory)
        session.draft("about iron")  # is not routed
    assert session.selection.path == A


def test_a_new_system_message_is_heeded(model: MemoryModel) -> None:
    session = Session(model, memory="0.1", max_tokens=6)
    say(session, "first")
    session.system = "Be brief."
    assert say(session, "second") == alone(session)


def interrupted(responses: Iterator[Any], cache: list[Any], after: int, torn: bool) -> Iterator[Any]:
    """Ctrl-C inside the generator after some tokens, where `torn` with one layer a token ahead of the others."""
    for count, response in enumerate(responses):
        if count == after:
            if torn:
                cache[0].offset += 1
            raise KeyboardInterrupt
        yield response


@pytest.mark.parametrize("torn", [False, True])
def test_ctrl_c_keeps_the_session(model: MemoryModel, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    session = Session(model, memory="0.1", max_tokens=12)
    say(session, "first")
    real = model.responses
    with monkeypatch.context() as patch:
        patch.setattr(
            model,
            "responses",
            lambda *a, prompt_cache, **k: interrupted(
                real(*a, prompt_cache=prompt_cache, **k), prompt_cache, 4, torn
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            say(session, "second")
    assert session.messages[-1]["role"] == "assistant"
    assert session.messages[-1]["content"]
    assert say(session, "third") == alone(session)
    whole = len(model.chat_tokens(session.messages[:-1]))
    assert session.prefilled == whole if torn else session.prefilled < whole / 2


def break_off(session: Session, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the first token."""
    real = session.model.responses
    with monkeypatch.context() as patch:
        patch.setattr(
            session.model, "responses", lambda *a, **k: interrupted(real(*a, **k), k["prompt_cache"], 0, False)
        )
        with pytest.raises(KeyboardInterrupt):
            say(session, text)


def test_nothing_said_is_nothing_asked(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(model, memory="0.1", max_tokens=6)
    say(session, "first")
    before = list(session.messages)
    break_off(session, "second", monkeypatch)
    assert session.messages == before
    with pytest.raises(BankError):
        session.use("9.9")
    session.memory = "9.9"
    with pytest.raises(BankError):
        say(session, "second")
    assert session.messages == before
    session.memory = "0.1"
    assert say(session, "second") == alone(session)
    session.use("fetched")
    say(session, "about neon")
    before = session.topic, session.turn, session.selection, session.shown
    break_off(session, "now iron", monkeypatch)
    assert (session.topic, session.turn, session.selection, session.shown) == before
